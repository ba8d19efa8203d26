"""Draws docs/images/quickstart.svg from the output of a real quickstart.

    palate quickstart > quickstart.txt 2>&1
    python docs/tools/quickstart_picture.py quickstart.txt

Keeps the steps, the figures and the first two questions. Every line is one of the output; a line [...] marks what is left out.
"""

from __future__ import annotations

import re
import sys
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

PICTURE = Path(__file__).resolve().parents[1] / "images" / "quickstart.svg"
_WIDTH = 104
_QUESTIONS = 2


def lines_to_show(output: str) -> list[str]:
    """Returns the lines of the output that the picture has."""
    shown: list[str] = []
    questions = 0
    for line in output.splitlines():
        if line.startswith("Q  "):
            questions += 1
            if questions == _QUESTIONS + 1:
                shown += ["", "[...]", ""]
        answer = line.startswith(("Q  ", "base", "tuned", "   ")) and 0 < questions <= _QUESTIONS
        figure = line.startswith(("training ", "held-out ", "disagree ")) or re.match(r" {19}\d", line)
        step = re.match(r"\[ *\d+ s\] (training|serving|the service)", line)
        if answer or figure or step:
            if step or line.startswith("Q  "):
                shown.append("")
            shown.append(_without_folders(line))
    return shown


def draw(lines: list[str]) -> str:
    """Returns the lines as an SVG of a terminal."""
    console = Console(record=True, width=_WIDTH, file=StringIO())
    console.print(Text("$ make quickstart", style="bold"))
    for line in lines:
        style = (
            "dim" if re.match(r"\[", line) else "bold" if line.startswith(("Q  ", "base", "tuned", "disagree")) else ""
        )
        console.print(Text(line, style=style))
    svg = console.export_svg(title="palate quickstart", unique_id="quickstart")
    # No fonts from another server: the reader's own monospace font does.
    return re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)


def _without_folders(line: str) -> str:
    return re.sub(r" is in /\S+", " is written", line)


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(draw(lines_to_show(Path(sys.argv[1]).read_text(encoding="utf-8"))), encoding="utf-8")
    print(PICTURE)

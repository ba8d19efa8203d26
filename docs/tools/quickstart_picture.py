"""Draws docs/images/quickstart.svg from the output of a real quickstart.

    palate quickstart > quickstart.txt 2>&1
    python docs/tools/quickstart_picture.py quickstart.txt

Keeps two steps, the figures and the last two questions, word for word; a line [...] marks what is left out.
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
    head, *questions = re.split(r"^(?=Q  )", output, flags=re.MULTILINE)
    last, disagree, _ = questions[-1].partition("\ndisagree ")
    shown: list[str] = []
    for line in head.splitlines():
        if re.match(r"\[ *\d+ s\] (training|serving)", line):
            shown += ["", line]
        elif line.startswith(("training loss", "training margin", "held-out ")) or re.match(r" {19}\d", line):
            shown.append(line)
    shown += ["", "[...]"]
    for question in (*questions[:-1], last)[-_QUESTIONS:]:
        shown.append("")
        for line in question.strip().splitlines():
            if line.startswith(("Q  ", "base", "tuned", "   ")):
                shown.append(line)
            elif line and shown[-1] != "   [...]":  # a further paragraph of an answer
                shown.append("   [...]")
    verdict = next(line for line in output.splitlines() if line.startswith("disagree ")) if disagree else ""
    return [*shown, "", verdict]


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


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(draw(lines_to_show(Path(sys.argv[1]).read_text(encoding="utf-8"))), encoding="utf-8")
    print(PICTURE)

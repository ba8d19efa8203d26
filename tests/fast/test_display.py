"""What a person sees: the live block on a terminal, plain lines elsewhere, nothing when nothing was asked for."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest

import palate.ui.display
from palate.ui import make_display
from palate.ui.terminal import sparkline

SCRIPT = """
import json
from palate.ui import make_display
start = {"kind": "start", "step": 0, "total_steps": 40}
first = {"kind": "train", "step": 1, "total_steps": 40, "loss": 0.7}
step = {"kind": "train", "step": 10, "total_steps": 40, "loss": 0.5, "rewards/margins": 0.25,
        "rewards/accuracies": 0.75, "tokens_per_s": 310.4, "seconds_left": 240.0}
evaluation = {"kind": "eval", "step": 10, "total_steps": 40, "eval_loss": 0.55}
end = {"kind": "end", "step": 10, "total_steps": 40, "reading": {"verdict": "learning", "text": "It went down."}}
with make_display(SHOW, "my-job") as display:
    if display.wants_news:
        display.log("loading the model\\nstep 10/40 loss 0.5000\\nvalidation at step 10/40 loss\\n")
        display.metrics("".join(json.dumps(entry) + "\\n" for entry in (start, first, step, evaluation, end)).encode())
print("the result")
"""


def run(show: bool, *, terminal: bool) -> tuple[str, str]:
    """Returns (stdout, stderr) of the script, with stderr a terminal or a pipe."""
    command = [sys.executable, "-c", SCRIPT.replace("SHOW", str(show))]
    if not terminal:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout, done.stderr
    controller, side = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "140", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=side, env=environment, text=True)
    os.close(side)
    shown = b""
    while True:
        try:
            piece = os.read(controller, 65536)
        except OSError:  # Linux's way to say that the other side is closed
            break
        if not piece:
            break
        shown += piece
    os.close(controller)
    stdout, _ = process.communicate(timeout=30)
    return stdout, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())


def test_a_terminal_shows_figures_time_left_the_curve_and_the_reading() -> None:
    stdout, stderr = run(True, terminal=True)
    assert stdout == "the result\n"
    assert "loading the model" in stderr
    figures = "loss 0.500  validation 0.550  margin +0.25  accuracy 0.75  310 tokens/s  4 min left"
    for words in ("my-job", "10/40", figures, "loss 0.700 █▁ 0.500", "learning. It went down."):
        assert words in stderr
    assert "step 10/40 loss" not in stderr  # the live block has it


def test_a_pipe_shows_the_log_as_it_is() -> None:
    assert run(True, terminal=False) == (
        "the result\n",
        "loading the model\nstep 10/40 loss 0.5000\nvalidation at step 10/40 loss\n",
    )


def test_nothing_is_shown_when_nothing_was_asked_for() -> None:
    assert run(False, terminal=False) == ("the result\n", "")


@pytest.mark.parametrize("losses", [[-1e308, 1e308], [1.7e308] * 130, [-1.7e308, 1.7e308] * 65, [5e-324, 1e-323]])
def test_a_curve_of_any_size_is_drawn(losses: list[float]) -> None:
    assert len(sparkline(losses)) == min(40, len(losses))


def test_a_curve_reaches_from_the_lowest_to_the_highest_block() -> None:
    assert sparkline([1.0, 4.5, 8.0]) == "▁▅█"


def test_a_service_s_start_shows_its_stages_and_nothing_of_the_engine_but_how_far_it_has_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with make_display(False, "svc", stages=True) as display:
        display.log("palate: starting the engine for qwen\nERROR Error parsing config for /x: unknown\n")
        display.log("WARNING libtcmalloc is not found\n")
        monkeypatch.setattr(palate.ui.display, "_QUIET_S", 0.0)  # as if time had passed
        display.log(
            "Loading safetensors checkpoint shards:  50% Completed | 1/2 [00:01<00:01]\nW1129 Triton not available\n"
        )
        display.log("  warnings.warn(\n(EngineCore pid=5) ERROR Failed to load CPU gemm_4bit_forward\n")
        display.log("palate: vllm 1.0 has answered its first request, 3 s after the start\n")
    lines = [re.sub(r"^\[ +\d+ s\] ", "", line) for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "starting the engine for qwen",
        "  50% of the weights are loaded",
        "  the engine is still starting",
        "vllm 1.0 has answered its first request, 3 s after the start",
    ]

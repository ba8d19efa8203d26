"""Ctrl-C for those who wait for a job: real processes, a real training that continues, and the way back to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from palate import TrainingJob
from tests.slow.conftest import until
from tests.support.trainings import SETTINGS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SAID = "job long continues: `palate watch long` follows it, `palate stop long` stops it"


def interrupted(home: Path, *command: str, after: str, by: signal.Signals = signal.SIGINT) -> tuple[int, str, str]:
    """Presses Ctrl-C, or sends another signal, once a line of stderr contains a text. Returns exit code, stdout, stderr."""
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PALATE_HOME": str(home)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job ignores it
    )
    assert process.stderr is not None
    try:
        seen = ""
        while after not in seen:
            line = process.stderr.readline()
            assert line, seen
            seen += line
        process.send_signal(by)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    return process.returncode, out, seen + err


def test_ctrl_c_leaves_the_job_and_says_how_to_go_on(home: Path, tiny: Path, prefs: Path) -> None:
    settings = [f"--set={name}={value}" for name, value in {**SETTINGS, "max_steps": 100_000}.items()]
    train = ["train", str(prefs), "--model-uri", str(tiny), "--name", "long", *settings]
    code, out, err = interrupted(home, "-m", "palate.cli", *train, after="step 2/")
    job = TrainingJob.get("long")
    try:
        assert (code, out) == (130, "")
        assert err.endswith(f"interrupted\n{SAID}\n")
        assert "Traceback" not in err
        assert job.status == "Running"

        code, out, err = interrupted(home, "-m", "palate.cli", "watch", "long", after="step 2/")
        assert (code, out) == (130, "")
        assert err.endswith(f"interrupted\n{SAID}\n")

        code, out, err = interrupted(home, "-m", "palate.cli", "watch", "long", after="step 2/", by=signal.SIGTERM)
        assert (code, out) == (143, "")
        assert err.endswith(f"ended by SIGTERM\n{SAID}\n")
        assert job.status == "Running"

        script = "from palate import TrainingJob; TrainingJob.get('long').wait()"
        code, _, err = interrupted(home, "-c", script, after="step 2/")
        assert code != 0
        assert err.endswith(f"KeyboardInterrupt\n{SAID}\n")
        assert job.status == "Running"
    finally:
        job.stop()
    until(job.is_completed)
    assert job.status == "Stopped"

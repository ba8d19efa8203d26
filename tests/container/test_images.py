"""The images as they are built here: what they hold, what they do not hold, who they run as, how they end."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib.metadata import version

import pytest

import palate
from tests.slow.conftest import until
from tests.support.engine import BASE, Engine
from tests.support.images import Image
from tests.support.images import palate as run_palate

pytestmark = [pytest.mark.slow, pytest.mark.container, pytest.mark.timeout(3600)]

LIMIT_GB = {"trainer": 2.2, "server": 3.4}
"""Unpacked, base image included; as built plus some room, so that growth is noticed."""


@pytest.fixture(params=["trainer", "server"])
def image(request: pytest.FixtureRequest) -> Image:
    found: Image = request.getfixturevalue(request.param)
    return found


def inside(engine: Engine, image: Image, program: str, *options: str) -> str:
    """Runs Python source in a container of the image, and returns what it prints."""
    return engine.run(
        "run", "--rm", "--network=none", *options, "--entrypoint=python", image.name, "-c", program
    ).stdout


CONTENTS = """
import importlib.metadata, json, pathlib, shutil, sys
import boto3, palate, palate_recipes, palate_server, palate_trainer, torch, transformers
prefix = pathlib.Path(sys.prefix)
root = pathlib.Path("/")
caches = [*root.glob("*/.cache"), *root.glob("home/*/.cache"), *root.glob("src")]
print(json.dumps({
    "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "boto3")},
    "tools": [tool for tool in ("gcc", "cc", "g++", "git", "uv") if shutil.which(tool)],
    "pip": [path.name for tool in ("pip", "uv") for path in prefix.glob(f"lib/python3*/site-packages/{tool}")],
    "caches": [str(path) for path in caches],
    "uncompiled": sum(not list(path.parent.glob(f"__pycache__/{path.stem}.*.pyc")) for path in prefix.rglob("*.py")),
    "tests": sum(1 for path in prefix.rglob("tests") if path.is_dir()),
    "cuda": torch.version.cuda,
}))
"""


def test_a_build_says_what_it_made(engine: Engine, image: Image) -> None:
    program, size_gb = image.facts["program"], image.facts["size_bytes"] / 1e9
    print(
        f"\n{image.name}: {size_gb:.2f} GB, built in {image.seconds:.0f} s (layers that the engine had are not built again)"
    )
    assert image.name == f"palate-{program}:{palate.__version__}-cpu"
    assert size_gb < LIMIT_GB[program]
    assert re.search(r"\[ +\d+ s\] .*FROM", image.log)
    assert image.log.splitlines()[-1] == "next: palate images list"
    listed = json.loads(run_palate(engine, "images", "list", "--json").stdout)
    assert image.facts in listed


def test_its_labels_say_what_it_is(engine: Engine, image: Image) -> None:
    labels = json.loads(engine.run("image", "inspect", image.name).stdout)[0]["Config"]["Labels"]
    standard = {name.removeprefix("org.opencontainers.image."): value for name, value in labels.items()}
    assert standard["version"] == palate.__version__
    assert standard["licenses"] == "Apache-2.0"
    assert standard["base.name"] == BASE
    assert standard["base.digest"].startswith("sha256:")
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", standard["revision"])
    assert labels["ai.palate.variant"] == "cpu"


def test_it_runs_as_a_user_without_rights(engine: Engine, image: Image) -> None:
    config = json.loads(engine.run("image", "inspect", image.name).stdout)[0]["Config"]
    assert config["User"] == "palate"
    assert config["StopSignal"] == "SIGTERM"
    assert config["Healthcheck"]["Test"]
    assert config["Entrypoint"] == ["tini", "--", "palate-run"]
    answer = inside(
        engine,
        image,
        "import os, pathlib; home = pathlib.Path(os.environ['PALATE_HOME']); (home / 'x').touch();"
        " print(os.getuid(), os.access('/opt/palate', os.W_OK), os.access('/usr/local/bin', os.W_OK))",
    )
    assert answer.split() == ["1000", "False", "False"]


def test_it_holds_what_was_locked_and_no_tools_of_the_build(engine: Engine, image: Image) -> None:
    answer = inside(engine, image, CONTENTS, "--user=0")
    found = json.loads(answer.splitlines()[-1])
    assert (found["tools"], found["pip"], found["caches"], found["tests"], found["cuda"]) == ([], [], [], 0, None)
    assert found["uncompiled"] < 20  # the image's user cannot write bytecode; some files are for other Pythons
    assert found["versions"] == {name: version(name) for name in found["versions"]}


def test_both_images_keep_their_common_packages_once(engine: Engine, trainer: Image, server: Image) -> None:
    layers = [
        json.loads(engine.run("image", "inspect", image.name).stdout)[0]["RootFS"]["Layers"]
        for image in (trainer, server)
    ]
    base = json.loads(engine.run("image", "inspect", BASE).stdout)[0]["RootFS"]["Layers"]
    assert layers[0][: len(base) + 1] == layers[1][: len(base) + 1]


def test_neither_history_nor_settings_hold_what_the_build_was_lent(engine: Engine, image: Image) -> None:
    told = engine.run("history", "--no-trunc", image.name).stdout
    told += json.dumps(json.loads(engine.run("image", "inspect", image.name).stdout)[0]["Config"])
    assert not re.search(r"(?i)secret|password|access_key|token=|PIP_CERT|SSL_CERT|find.links", told)
    assert (
        inside(
            engine, image, "import os; print([n for n in os.environ if n.startswith(('PIP_', 'UV_', 'SSL_', 'AWS_'))])"
        ).strip()
        == "[]"
    )


def test_a_stop_reaches_what_runs_and_nothing_stays_a_zombie(
    engine: Engine, trainer: Image, container: Callable[..., str]
) -> None:
    """PID 1 passes SIGTERM on, gives the exit code back, and reaps what has lost its parent."""
    program = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        "if os.fork() == 0:\n"
        "    if os.fork() == 0: time.sleep(0.2)\n"
        "    os._exit(0)\n"
        "os.wait(); time.sleep(1)\n"
        "stats = [open(f'/proc/{p}/stat').read().rpartition(')')[2].split()[0] for p in os.listdir('/proc') if p.isdigit()]\n"
        "print('zombies', stats.count('Z'), flush=True)\n"
        "time.sleep(600)\n"
    )
    id = container("--entrypoint=tini", trainer.name, "--", "python", "-c", program)
    until(lambda: "zombies" in engine.run("logs", id).stdout)
    assert engine.run("logs", id).stdout.strip() == "zombies 0"
    engine.run("stop", "--time", "30", id)
    state = json.loads(engine.run("inspect", id).stdout)[0]["State"]
    assert (state["ExitCode"], state["OOMKilled"]) == (7, False)


def test_without_a_run_it_says_how_it_is_used(engine: Engine, image: Image) -> None:
    done = engine.run("run", "--rm", "--network=none", image.name, check=False)
    assert done.returncode == 2
    assert "usage: palate-run" in done.stdout


def test_doctor_finds_both(engine: Engine, trainer: Image, server: Image) -> None:
    findings = {item["topic"]: item for item in json.loads(run_palate(engine, "doctor", "--json").stdout)}
    assert findings["containers"]["state"] == "ok"
    assert trainer.name in findings["containers"]["fact"]
    assert server.name in findings["containers"]["fact"]

"""`palate run SCRIPT`: the script meets what `python SCRIPT` gives it, and `pai` besides. Real processes, no training."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PLAIN_SCRIPTS = {
    "what a script sees": (
        "import os, sys\n"
        "print(sys.argv, __name__, __file__, __spec__, __doc__, sys.path[0], sys.flags, sys.executable)\n"
        "print([entry for entry in sys.path], os.environ.get('PYTHONPATH'), os.getcwd(), sorted(globals()))\n"
        "print(sys.modules['__main__'].__file__, input(), sys.stdin.read())\n"
    ),
    "an error": (
        "def inner():\n    return {}['gone']\n\n\n"
        "try:\n    inner()\nexcept KeyError as error:\n    raise ValueError('no') from error\n"
    ),
    "a syntax error": "print('never')\nif True\n    pass\n",
    "an exit code": "import sys\nprint('out')\nsys.exit(7)\n",
    "an exit message": "import sys\nsys.exit('a last word')\n",
    "a signal": "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n",
    "an interrupt": "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n",
}

PAI_SCRIPT = """
from pai.common.utils import random_str
from pai.job import TrainingJob
from pai.model import ModelTrainingRecipe, RegisteredModel
from pai.predictor import Predictor
from pai.session import Session, get_default_session, setup_default_session

sess = get_default_session()
recipe = ModelTrainingRecipe(model_name="qwen2-0.5b-instruct", model_provider="pai", method="LoRA_LLM",
                             hyperparameters={"training_strategy": "dpo"})
print(sess.region_id, recipe.model_name, recipe.hyperparameters["training_strategy"], len(random_str(6)))
print(TrainingJob.list(), isinstance(sess, Session), ModelTrainingRecipe.__module__)
"""


def python(
    *arguments: str, stdin: str = "", cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, input=stdin, env=environment, cwd=cwd, timeout=120
    )


def run(
    *arguments: str, stdin: str = "", cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    return python("-m", "palate.cli", "run", *arguments, stdin=stdin, cwd=cwd, **variables)


@pytest.mark.parametrize("what", PLAIN_SCRIPTS)
def test_a_script_meets_what_python_gives_it(home: Path, tmp_path: Path, what: str) -> None:
    script = tmp_path / "plain script.py"
    script.write_text(PLAIN_SCRIPTS[what])
    arguments = [str(script), "one", "--help", "-x", "--", "two words", ""]
    plain, ours = python(*arguments, stdin="line\nrest"), run(*arguments, stdin="line\nrest")
    assert (ours.returncode, ours.stdout, ours.stderr) == (plain.returncode, plain.stdout, plain.stderr)


def test_a_script_from_stdin_and_a_folder(home: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "__main__.py").write_text("import pai.session, sys; print(sys.argv[1:])")
    assert run("-", "one", stdin="import pai.session, sys; print(sys.argv)").stdout == "['-', 'one']\n"
    assert run("folder", "-x", cwd=tmp_path).stdout == "['-x']\n"


def test_a_script_of_pais_runs_without_an_edit(home: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PAI_SCRIPT)
    done = run(str(script))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["cn-hangzhou qwen2-0.5b-instruct dpo 6", "[] True palate.model"]


def test_an_installed_pai_is_neither_used_nor_changed(home: Path, tmp_path: Path) -> None:
    package = tmp_path / "site" / "pai"
    (package / "session").mkdir(parents=True)
    (package / "__init__.py").write_text("print('PAI itself')\n")
    (package / "session" / "__init__.py").write_text("OWN = True\n")
    before = {path: path.read_bytes() for path in package.rglob("*.py")}
    script = tmp_path / "script.py"
    script.write_text(
        "import pai.session; print(hasattr(pai.session, 'OWN'), hasattr(pai.session, 'get_default_session'))"
    )
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    assert run(str(script), PYTHONPATH=path).stdout == "False True\n"
    assert python(str(script), PYTHONPATH=path).stdout == "PAI itself\nTrue False\n"
    assert {path: path.read_bytes() for path in package.rglob("*.py")} == before


def test_processes_that_the_script_starts_get_nothing_of_it(home: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import pai, subprocess, sys\n"
        'code = \'import importlib.util, sys; print(importlib.util.find_spec("pai"), "palate.pai" in sys.modules)\'\n'
        "subprocess.run([sys.executable, '-c', code], check=True)\n"
    )
    assert run(str(script)).stdout == "None False\n"


def test_a_sitecustomize_of_the_users_runs_as_before(home: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "sitecustomize.py").write_text("import builtins; builtins.mine = 'ran'\n")
    script = tmp_path / "script.py"
    script.write_text("import os, pai, sitecustomize; print(mine, sitecustomize.__file__, os.environ['PYTHONPATH'])")
    path = os.pathsep.join([str(tmp_path / "mine"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    assert run(str(script), PYTHONPATH=path).stdout == f"ran {tmp_path / 'mine' / 'sitecustomize.py'} {path}\n"


def test_a_script_never_meets_pai_itself(home: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "pai.py").write_text("")
    (tmp_path / "mine" / "sitecustomize.py").write_text("import pai\n")
    script = tmp_path / "script.py"
    script.write_text("import pai; print('ran')")
    path = os.pathsep.join([str(tmp_path / "mine"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = run(str(script), PYTHONPATH=path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: pai cannot be provided to this script: PAI's own SDK is already imported")


def test_a_traceback_shows_the_scripts_own_lines_and_the_remedy(home: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os\n\nfrom pai.estimator import Estimator\n")
    done = run(str(script))
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[1:3] == [f'  File "{script}", line 3, in <module>', "    from pai.estimator import Estimator"]
    assert lines[-1].endswith(
        "pai.estimator.Estimator exists in PAI's SDK but not in Palate: train with pai.model.ModelTrainingRecipe, "
        "which runs Palate's own training program"
    )


@pytest.mark.parametrize(
    ("script", "words"), [("/nowhere.py", "does not exist"), ("cells.ipynb", "%load_ext palate.pai")]
)
def test_what_cannot_be_run_is_one_message(home: Path, script: str, words: str) -> None:
    done = run(script)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert "Traceback" not in done.stderr

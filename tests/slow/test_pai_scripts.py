"""PAI's tutorials and a script in their manner, run as they are printed: trained, deployed and asked, against a local S3 server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from palate import Predictor, TrainingJob
from palate.session import Session, setup_default_session
from palate.weights import SETTING
from tests.slow.conftest import processes_of, until
from tests.support.rows import preference_rows
from tests.support.seaweed import SeaweedServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

REGION = "cn-hangzhou"
BUCKET = f"pai-quickstart-{REGION}"
KEY = "huggingface/datasets/safe_rlhf/sampled_train.json"

OWN_SCRIPT = """
import sys

from pai.common.utils import random_str
from pai.job import TrainingJob
from pai.model import RegisteredModel
from pai.predictor import Predictor
from pai.session import get_default_session

sess = get_default_session()
model = RegisteredModel(model_name="qwen2-0.5b-instruct", model_provider="pai")
recipe = model.training_recipe(method="LoRA_LLM", hyperparameters={"training_strategy": "dpo", "max_steps": "2"})
uri = f"oss://pai-quickstart-{sess.region_id}/huggingface/datasets/safe_rlhf/sampled_train.json"
job = recipe.train(inputs={"train": uri}, job_name=f"own_{random_str(4)}")
assert TrainingJob.get(job.id).is_succeeded()
assert recipe.model_data() == job.output_path()

with recipe.deploy(service_name=f"own_{random_str(6)}", options={"engine": "transformers"}) as predictor:
    again = Predictor(predictor.service_name)
    again.wait_for_ready()
    client = again.openai()
    assert "default" in [entry.id for entry in client.models.list()]
    answer = client.chat.completions.create(
        model="default", max_tokens=4, messages=[{"role": "user", "content": sys.argv[1]}]
    )
    print("answered", answer.choices[0].message.role)
sys.exit(3)
"""


@pytest.fixture
def tutorial_data(seaweed: SeaweedServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The bucket and key that PAI's tutorials name, on a local server that this process and its children find."""
    for name in [name for name in os.environ if name.startswith("OSS_")]:
        monkeypatch.delenv(name)
    settings = {
        **seaweed.environment(),
        "PALATE_REGION": REGION,  # the one whose bucket the scripts ask for
        "PALATE_S3_ADDRESSING_STYLE": "path",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return BUCKET


def put_rows(seaweed: SeaweedServer) -> None:
    import boto3
    from botocore.config import Config

    client = boto3.client(
        "s3",
        endpoint_url=seaweed.endpoint,
        aws_access_key_id=seaweed.access_key,
        aws_secret_access_key=seaweed.secret_key,
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}),
    )
    if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
        client.create_bucket(Bucket=BUCKET)
    client.put_object(Bucket=BUCKET, Key=KEY, Body=json.dumps(preference_rows()).encode())


def palate_run(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "palate.cli", "run", str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, stdin=subprocess.DEVNULL)


def tutorial(number: str) -> bytes:
    """Returns the script that a tutorial prints, byte for byte; skips where the tutorials are not."""
    folders = [folder / "shared" / "seeds" for folder in Path(__file__).parents]
    found = [path for folder in folders if folder.is_dir() for path in folder.glob(f"{number}_*.txt")]
    if not found:
        pytest.skip("PAI's tutorials are not beside this repository (shared/seeds)")
    text = found[0].read_bytes()
    begin = text.index(b"from pai.session import")
    last = b"predictor.delete_service()"
    assert (text.count(b"from pai.session import"), text.count(last)) == (1, 1)
    return text[begin : text.index(last) + len(last)] + b"\n"


@pytest.mark.skipif(
    os.environ.get("PALATE_TEST_TUTORIALS") != "1",
    reason="PAI's own notebooks ask for answers of any length, minutes on a processor; PALATE_TEST_TUTORIALS=1 runs them",
)
@pytest.mark.parametrize("number", ["000", "001"])
def test_a_tutorial_of_pais_runs_byte_for_byte(
    number: str,
    seaweed: SeaweedServer,
    bucket: str,
    tutorial_data: str,
    home: Path,
    base_model: Path,  # the scripts leave the engine to Palate, and vLLM serves no model as small as `tiny`
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    printed = tutorial(number)
    put_rows(seaweed)
    monkeypatch.setenv(SETTING, f"qwen2-0.5b-instruct={base_model}")
    if number == "001":  # jobs and services in the object store as well
        monkeypatch.setenv("PALATE_STORE", f"s3://{bucket}/tutorial-{tmp_path.name}")
    script = tmp_path / "tutorial.py"
    script.write_bytes(printed)

    done = palate_run(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "the answer of the trained model"
    assert f"STAND-IN: {base_model} replaces qwen2-0.5b-instruct" in done.stderr
    assert script.read_bytes() == printed

    (job,) = TrainingJob.list(session=setup_default_session())
    assert job.is_succeeded()
    assert job.manifest.labels == {"stand_in_for": "qwen2-0.5b-instruct"}
    assert job.manifest.body.hyperparameters.training_strategy == "dpo"
    assert job.manifest.body.inputs["train"].uri == f"oss://{tutorial_data}/{KEY}"
    assert job.manifest.body.inputs["train"].rows == len(preference_rows())
    assert Predictor.list() == []
    until(lambda: processes_of(home) == [], timeout_s=30)


def test_a_script_in_pais_manner_trains_deploys_and_asks(
    seaweed: SeaweedServer, tutorial_data: str, home: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_rows(seaweed)
    monkeypatch.setenv(SETTING, f"Qwen/Qwen2-0.5B-Instruct={tiny}")
    script = tmp_path / "own.py"
    script.write_text(OWN_SCRIPT)
    done = palate_run(script, "Hi?")
    assert (done.returncode, done.stdout) == (3, "answered assistant\n"), done.stderr
    (job,) = TrainingJob.list(session=setup_default_session())
    assert re.fullmatch(r"own_[a-z0-9]{4}", job.id)
    assert Predictor.list() == []
    until(lambda: processes_of(home) == [], timeout_s=30)


def test_data_that_is_not_there_ends_the_script_at_its_own_line(
    seaweed: SeaweedServer,
    tutorial_data: str,
    home: Path,
    session: Session,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(SETTING, "qwen2-0.5b-instruct=smollm2-135m-instruct")
    script = tmp_path / "own.py"
    script.write_text(OWN_SCRIPT.replace(BUCKET.partition("-cn")[0], "no-such-bucket"))
    done = palate_run(script, "Hi?")
    assert done.returncode == 1
    assert f'File "{script}", line 14, in <module>' in done.stderr
    assert "no-such-bucket-cn-hangzhou" in done.stderr.splitlines()[-1]
    assert TrainingJob.list(session=session) == []


@pytest.mark.thorough
def test_a_stand_in_is_served_as_what_it_is(
    home: Path, session: Session, tiny: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from palate import RegisteredModel

    monkeypatch.setenv(SETTING, f"qwen2-0.5b-instruct={tiny}")
    with RegisteredModel("qwen2-0.5b-instruct").deploy("plain", options={"engine": "transformers"}) as predictor:
        assert predictor.labels == {"stand_in_for": "qwen2-0.5b-instruct"}
        assert predictor.describe_service()["Model"] != "qwen2-0.5b-instruct"
        assert "STAND-IN" in capfd.readouterr().err
    until(lambda: processes_of(home) == [], timeout_s=30)

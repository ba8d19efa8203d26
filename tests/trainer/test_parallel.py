"""Two processes on the processor, started as they are on GPUs: their numbers against one process, their ends, their failures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from palate_recipes.specs.train import COMPLETE_MARK, ERROR_FILE, EXIT_FAILED, EXIT_STOPPED, TrainTask
from palate_trainer.distributed import Rounds
from tests.slow.conftest import until
from tests.trainer.support import NEAR, NORM_NEAR, losses, spec, train

CLOCKS = ("seconds", "first_step", "_left", "_per_s", "per_second", "_runtime", "_gb", "epoch")
"""Ends of names that two runs need not share; an epoch is a share of the rounds, and a stand-in fills a round."""

BY_TOKENS = ("entropy", "logits/", "mean_token_accuracy")

FAULT = """
import os, sys, threading, time

def fail(self, *args, **kwargs):
    raise OSError(28, "No space left on device")

def wait():
    while not hasattr(sys.modules.get("palate_trainer.trainers"), "build_trainer"):
        time.sleep(0.01)
    sys.modules["palate_trainer.trainers"].PalateDPOTrainer.training_step = fail

if os.environ.get("RANK") == "1":
    threading.Thread(target=wait, daemon=True).start()
"""
"""Breaks the first step of the second process: Python runs a `sitecustomize` of the path at its start."""


def start(wanted: TrainTask, **environment: str) -> subprocess.Popen[str]:
    """Starts the program on `wanted`, as the runner does."""
    path = Path(wanted.files.output_dir).parent / "spec.json"
    wanted.write(path)
    log = path.with_name("program.log").open("w")
    return subprocess.Popen(
        [sys.executable, "-m", "palate_trainer", str(path)],
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        text=True,
    )


def log_of(wanted: TrainTask) -> str:
    return (Path(wanted.files.output_dir).parent / "program.log").read_text()


def together(wanted: TrainTask, processes: int = 2) -> list[dict[str, Any]]:
    """Runs `wanted` in so many processes and returns its metrics."""
    wanted = wanted.changed(processes=processes)
    code = start(wanted).wait(timeout=240)
    assert code == 0, log_of(wanted)[-3000:]
    return [json.loads(line) for line in (Path(wanted.files.output_dir) / "metrics.jsonl").read_text().splitlines()]


def workers_of(wanted: TrainTask) -> list[psutil.Process]:
    """All live processes of a run, by the spec that their command names."""
    name = str(Path(wanted.files.output_dir).parent / "spec.json")
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and name in process.cmdline():
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def training(wanted: TrainTask) -> bool:
    metrics = Path(wanted.files.output_dir) / "metrics.jsonl"
    return metrics.exists() and '"kind": "train"' in metrics.read_text()


@pytest.mark.parametrize(
    ("batches", "processes", "accumulation"), [(8, 2, 2), (7, 2, 1), (7, 2, 2), (5, 4, 1), (1, 3, 4), (9, 2, 8)]
)
def test_batches_are_dealt_once_and_weigh_the_same_in_their_step(
    batches: int, processes: int, accumulation: int
) -> None:
    data = [[2 * index, 2 * index + 1] for index in range(batches)]
    rounds = Rounds(data, processes, accumulation)
    dealt = list(rounds)
    assert len(dealt) == len(rounds) == rounds.rounds * processes
    assert dealt[:batches] == data
    counted = 0
    for step in range(rounds.steps):
        first = step * accumulation
        micros = min(accumulation, rounds.rounds - first)
        weights = [rounds.weight(step, micro, process) for micro in range(micros) for process in range(processes)]
        real = [weight for weight in weights if weight]
        assert len(set(real)) == 1
        assert sum(weights) == pytest.approx(micros * processes)  # a mean over all slots is one over the batches there
        counted += len(real)
    assert counted == batches


@pytest.mark.slow
@pytest.mark.parametrize("rows", [pytest.param(16, marks=pytest.mark.thorough), 13])
def test_two_processes_are_one_with_twice_the_accumulation(
    small: Path, tmp_path: Path, rows: int, precision: str
) -> None:
    """13 rows are 7 batches of 2: the last round lacks one, and the last batch is short."""
    settings = {"rows": rows, "num_train_epochs": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 2}
    alone = train(spec(small, tmp_path / "alone", gradient_accumulation_steps=2, validate=True, **settings))
    both = together(spec(small, tmp_path / "both", gradient_accumulation_steps=1, validate=True, **settings))
    assert len(losses(alone)) == 2 * -(-rows // 4)
    for one, two in zip(alone, both, strict=True):
        assert one["kind"] == two["kind"]
        for name in [name for name, value in one.items() if isinstance(value, float) and not name.endswith(CLOCKS)]:
            if name == "rewards/accuracies" and one["step"] == 1:
                continue  # before the first update margins are 0 but for rounding
            # TRL takes a mean over tokens batch by batch: which rows share a batch enters it, and the program joins small ones.
            near = 0.05 if name.startswith(BY_TOKENS) else NEAR[precision]
            assert two[name] == pytest.approx(one[name], abs=near, rel=near), name
        assert one.get("num_tokens") == two.get("num_tokens")
    assert both[0]["processes"] == 2
    assert any("2 processes" in note for note in both[0]["notes"])
    assert both[-1]["pairs_per_s"] > 0
    said = log_of(spec(small, tmp_path / "both")).splitlines()
    assert len([line for line in said if line.startswith("step 1/")]) == 1  # one speaks for all
    probes = [json.loads((tmp_path / name / "out/model/probe.json").read_text()) for name in ("alone", "both")]
    for one, two in zip(probes[0]["rows"], probes[1]["rows"], strict=True):
        assert two["logps"] == pytest.approx(one["logps"], abs=max(1e-4, NEAR[precision]))


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("fields", [{"training_strategy": "sft"}, {"method": "Standard_LLM"}], ids=["sft", "full"])
def test_other_trainings_agree_as_well(small: Path, tmp_path: Path, fields: dict[str, str], precision: str) -> None:
    settings = {"rows": 11, "num_train_epochs": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 2, **fields}
    alone = train(spec(small, tmp_path / "alone", gradient_accumulation_steps=4, validate=True, **settings))
    both = together(spec(small, tmp_path / "both", gradient_accumulation_steps=2, validate=True, **settings))
    assert losses(both) == pytest.approx(losses(alone), abs=NEAR[precision])
    evaluations = [[entry["eval_loss"] for entry in run if entry["kind"] == "eval"] for run in (alone, both)]
    assert evaluations[1] == pytest.approx(evaluations[0], abs=NEAR[precision])


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {},
        pytest.param({"max_steps": 1, "rows": 40}, marks=pytest.mark.thorough),
        {"method": "Standard_LLM"},
        pytest.param({"training_strategy": "sft", "method": "Standard_LLM"}, marks=pytest.mark.thorough),
    ],
    ids=["lora", "lora-reference-in-step", "full", "full-sft"],
)
def test_sharded_weights_train_as_whole_ones_do(
    small: Path, tmp_path: Path, fields: dict[str, Any], precision: str
) -> None:
    settings = {"rows": 11, "num_train_epochs": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 2, **fields}
    alone = train(spec(small, tmp_path / "alone", gradient_accumulation_steps=4, validate=True, **settings))
    shards = spec(small, tmp_path / "both", gradient_accumulation_steps=2, validate=True, fsdp="full_shard", **settings)
    both = together(shards)
    assert losses(both) == pytest.approx(losses(alone), abs=NEAR[precision])
    norms = [[entry["grad_norm"] for entry in run if entry["kind"] == "train"] for run in (alone, both)]
    assert norms[1] == pytest.approx(norms[0], rel=NORM_NEAR[precision])
    assert both[0]["trainable_parameters"] == alone[0]["trainable_parameters"]
    from safetensors.torch import load_file

    (weights,) = (path.name for path in (tmp_path / "alone/out/model").glob("*.safetensors"))
    one, two = (load_file(tmp_path / name / "out/model" / weights) for name in ("alone", "both"))
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype
        assert two[name].shape == one[name].shape
        apart = (two[name] - one[name]).abs()
        # Adam's first steps go by a gradient's sign, and 16 bits may turn the sign of one that is nearly 0, which moves a weight by
        # twice the learning rate: in a norm of 64 weights, three of them are 1e-4 of the mean.
        mean = 1e-4 if one[name].numel() > 1000 else 5e-4
        assert (apart.max() < 1e-3) if precision == "float32" else (apart.mean() < mean), (name, apart.mean())


@pytest.mark.usefixtures("precision")
@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [pytest.param("off", marks=pytest.mark.thorough), "full_shard"])
def test_a_resumed_pair_equals_the_uninterrupted_one(small: Path, tmp_path: Path, fsdp: str) -> None:
    settings: dict[str, Any] = {
        "max_steps": 6,
        "learning_rate": 1e-3,
        "save_steps": 3,
        "lora_dropout": 0.1,
        "fsdp": fsdp,
    }
    settings |= {"per_device_train_batch_size": 2, "rows": 13}
    whole = losses(together(spec(small, tmp_path / "whole", **settings)))
    checkpoint = tmp_path / "whole/out/checkpoints/checkpoint-3"
    assert (checkpoint / COMPLETE_MARK).exists()
    assert {path.name for path in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    from safetensors.torch import load_file

    # What is served of a checkpoint is what a finished model has.
    folders = (tmp_path / "whole/out/checkpoints/checkpoint-6", tmp_path / "whole/out/model")
    last, model = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert last.keys() == model.keys()
    assert all(last[name].equal(model[name]) for name in model)
    resumed = losses(together(spec(small, tmp_path / "resumed", resume_from=str(checkpoint), **settings)))
    assert resumed == pytest.approx(whole[3:], abs=1e-5)


@pytest.mark.slow
def test_sigterm_stops_all_processes_with_one_whole_checkpoint(small: Path, tmp_path: Path) -> None:
    """And nothing has listened to other machines: torch's TCP stores unpickle what is written there."""
    wanted = spec(small, tmp_path, num_train_epochs=1000).changed(processes=2)
    program = start(wanted)
    seen: set[str] = set()
    until(lambda: seen.update(listeners(program.pid)) or training(wanted) or program.poll() is not None, timeout_s=240)
    seen.update(listeners(program.pid))
    assert seen <= {"127.0.0.1", "::1"}
    assert len(workers_of(wanted)) == 3, log_of(wanted)[-3000:]
    program.send_signal(signal.SIGTERM)
    assert program.wait(timeout=60) == EXIT_STOPPED, log_of(wanted)[-3000:]
    (mark,) = (tmp_path / "out" / "checkpoints").glob(f"checkpoint-*/{COMPLETE_MARK}")
    names = {path.name for path in mark.parent.iterdir()}
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state_1.pth"} <= names
    assert not (tmp_path / "out" / ERROR_FILE).exists()
    assert not (tmp_path / "out" / "model").exists()
    assert not workers_of(wanted)
    assert not list((tmp_path / "out").glob(".meeting-*"))


@pytest.mark.slow
def test_sigterm_before_the_first_step_stops_all_processes(small: Path, tmp_path: Path) -> None:
    wanted = spec(small, tmp_path).changed(processes=2)
    program = start(wanted)
    until(lambda: len(workers_of(wanted)) == 3)
    program.send_signal(signal.SIGTERM)
    assert program.wait(timeout=60) == EXIT_STOPPED, log_of(wanted)[-3000:]
    assert not (tmp_path / "out" / ERROR_FILE).exists()
    assert not workers_of(wanted)


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_is_named(small: Path, tmp_path: Path) -> None:
    wanted = spec(small, tmp_path, num_train_epochs=1000).changed(processes=2)
    program = start(wanted)
    until(lambda: training(wanted) or program.poll() is not None, timeout_s=240)
    (second,) = (worker for worker in workers_of(wanted) if worker.environ().get("RANK") == "1")
    second.kill()
    assert program.wait(timeout=60) == EXIT_FAILED, log_of(wanted)[-3000:]
    assert "Process 2 of 2 was killed by SIGKILL" in (tmp_path / "out" / ERROR_FILE).read_text()
    assert not workers_of(wanted)


@pytest.mark.slow
def test_the_message_of_the_process_that_failed_is_kept(small: Path, tmp_path: Path) -> None:
    """One process alone fails: the other's loss of it is not the cause."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(FAULT)
    wanted = spec(small, tmp_path, num_train_epochs=1000).changed(processes=2)
    paths = [str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]
    program = start(wanted, PYTHONPATH=os.pathsep.join(filter(None, paths)))
    assert program.wait(timeout=240) == EXIT_FAILED, log_of(wanted)[-3000:]
    message = (tmp_path / "out" / ERROR_FILE).read_text()
    assert message.startswith("The disk is full"), message
    assert not workers_of(wanted)


@pytest.mark.slow
def test_no_worker_outlives_a_killed_launcher(small: Path, tmp_path: Path) -> None:
    wanted = spec(small, tmp_path, num_train_epochs=1000).changed(processes=2)
    program = start(wanted)
    until(lambda: training(wanted) or program.poll() is not None, timeout_s=240)
    program.kill()
    program.wait(timeout=10)
    until(lambda: not workers_of(wanted), timeout_s=10)


BROKEN = """
import os, sys, threading, time

def fail(ctx, *gradients):
    raise RuntimeError("a kernel that does not compile")

def wait():
    while not hasattr(sys.modules.get("palate_trainer.fast.lora"), "fuse_lora"):
        time.sleep(0.01)
    sys.modules["palate_trainer.fast.lora"]._AddLowRank.backward = staticmethod(fail)

if os.environ.get("RANK"):
    threading.Thread(target=wait, daemon=True).start()
"""
"""Breaks the fast path where dropout is drawn, which is in training alone."""


@pytest.mark.usefixtures("precision")
@pytest.mark.slow
def test_two_processes_begin_anew_without_a_fast_path_that_fails(small: Path, tmp_path: Path) -> None:
    settings = {"lora_dropout": 0.1, "rows": 12, "max_steps": 2}
    expected = together(spec(small, tmp_path / "plain", fast=False, **settings))
    (tmp_path / "fault").mkdir()
    (tmp_path / "fault" / "sitecustomize.py").write_text(BROKEN)
    wanted = spec(small, tmp_path / "fallen", **settings).changed(processes=2)
    assert start(wanted, PYTHONPATH=str(tmp_path / "fault")).wait(timeout=240) == 0, log_of(wanted)[-3000:]
    assert "WARNING: the fast path failed in the first step" in log_of(wanted)
    output = Path(wanted.files.output_dir)
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert losses(found) == losses(expected)
    assert not (output / ERROR_FILE).exists()
    assert not [path for path in output.iterdir() if path.name.startswith(".")]


def listeners(pid: int) -> set[str]:
    """Addresses at which a process or one of its children listens."""
    found = set()
    try:
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return found
    for process in tree:
        try:
            found |= {c.laddr.ip for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
        except psutil.NoSuchProcess:
            continue
    return found

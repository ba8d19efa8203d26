"""How records are read: what is refused with which words, and what a newer writer said is left out, or kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from palate_recipes.specs import codec
from palate_recipes.specs.access import GatewayAccess, TokenName
from palate_recipes.specs.fleet import AdapterName, VersionName
from palate_recipes.specs.merge import Merged
from palate_recipes.specs.run import Attempt, Lease, Renewal, ServeManifest, Status, TrainManifest
from palate_recipes.specs.schemas import schemas
from palate_recipes.specs.train import TrainSpec
from tests.support.manifests import serve_manifest, train_manifest


def changed(data: bytes, path: str, value: object) -> bytes:
    """The record with another value at a path like `body.model.name`; the value `...` takes the field away."""
    values: Any = json.loads(data)
    *way, last = path.split(".")
    place = values
    for name in way:
        place = place[name]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return json.dumps(values).encode()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it is not JSON: "),
        (b'{"state": NaN}', "it is not JSON: "),
        (b'{"state": "Failed", "details": {"x": 1e999}}', "it is not JSON: "),
        (b'{"state": "\\ud800"}', "it is not JSON: "),
        (b'{"state": "\xff"}', "it is not UTF-8"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b'{"a":' * 100_000, "it is nested too deeply"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "it is not JSON|it has no state"),
        (b"[]", "it is list, not an object"),
        (b"{}", "it has no state"),
        (b'{"state": 7}', "state is 7: "),
        (b'{"state": "x - at `$.q"}', "state is 'x - at `\\$.q': invalid enum value$"),
        (b'{"state": "it\'s - at `$.q`"}', "state is .*: invalid enum value$"),
        (b'{"state": "' + b"x" * 1_000_000 + b'"}', "state is 'xxx"),
        (b'{"state": "Done"}', "state is 'Done': "),
        (b'{"state": "Failed", "attempt": 0}', "attempt is 0: expected int >= 1"),
        (b'{"state": "Failed", "attempt": true}', "attempt is True: expected int, got bool"),
        (b'{"state": "Failed", "exit_code": 9223372036854775808}', "exit_code is 9223372036854775808: "),
        (b'{"state": "Failed", "log_tail": ["a", 7]}', r"log_tail\[1\] is 7: expected str, got int"),
        (b'{"state": "Failed", "attempts": [7]}', r"attempts\[0\] is 7: expected object, got int"),
        (b'{"state": "Failed", "attempts": [{"reason": "x"}]}', r"attempts\[0\] has no attempt"),
    ],
)
def test_what_is_no_status_is_refused_in_one_line(data: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        Status.decode(data)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("kind", "serve", "kind is 'serve': "),
        ("body", 7, "body is 7: expected object, got int"),
        ("body.model", None, "body.model is None: expected object, got null"),
        ("body.model.name", ..., "body.model has no name"),
        ("body.model.source.kind", "../x", "body.model.source.kind is '../x': "),
        ("body.method", "Other", "body.method is 'Other': "),
        ("body.hyperparameters.lora_dim", 513, "body.hyperparameters.lora_dim is 513: expected int <= 512"),
        ("body.inputs", {"train": {"uri": 1}}, "body.inputs is {'train': {'uri': 1}}: expected str, got int"),
        ("body.max_run_time_s", 0, "body.max_run_time_s is 0: "),
        ("labels", {"a": 1}, "labels is {'a': 1}: expected str, got int"),
    ],
)
def test_a_field_of_a_manifest_is_named_with_its_value(path: str, value: object, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("{", r"\{").replace("[", r"\[")):
        TrainManifest.decode(changed(train_manifest().encode(), path, value))


def test_every_missing_field_of_a_record_is_named() -> None:
    with pytest.raises(ValueError, match="it has no name and no backend and no body"):
        TrainManifest.decode(b'{"kind": "train"}')
    with pytest.raises(ValueError, match="it has no holder and no attempt and no beat"):
        codec.decode(b"{}", Lease)


def test_a_record_of_any_size_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "_LARGEST", 10)
    with pytest.raises(ValueError, match="it has 18 bytes, more than 10"):
        Status.decode(b'{"state": "Ended"}')


def test_what_a_newer_writer_says_is_read_over() -> None:
    manifest = train_manifest()
    data = manifest.encode()
    for path in ("new", "body.new", "body.model.new", "body.model.source.new", "body.hyperparameters.new"):
        data = changed(data, path, {"a": 1})
    assert TrainManifest.decode(data) == manifest


def test_what_a_newer_writer_says_of_attempts_and_services_is_kept() -> None:
    status = Status(state="Failed", finished_at=1.0, attempts=(Attempt(attempt=1, reason="x"),))
    values = json.loads(status.encode())
    values["attempts"][0]["machine"] = "far"
    read = replace(Status.decode(json.dumps(values).encode()), reason="changed")
    assert json.loads(read.encode())["attempts"] == [{**values["attempts"][0]}]
    data = changed(serve_manifest().encode(), "body.replicas", 2)
    before = ServeManifest.decode(data)
    after = replace(before, body=replace(before.body, tuned_uri="file:///x"))
    assert json.loads(after.encode())["body"]["replicas"] == 2


def test_a_training_of_an_earlier_version_has_the_defaults_of_what_it_did_not_know() -> None:
    manifest = train_manifest()
    data = changed(manifest.encode(), "body.hyperparameters.ld_alpha", ...)
    assert TrainManifest.decode(data) == manifest
    assert isinstance(TrainManifest.decode(data).body, TrainSpec)


FIRST_USE = """
import sys, threading
from palate_recipes.specs.run import Status, TrainManifest
sys.setswitchinterval(1e-6)
gate, done = threading.Barrier(16), []
def read():
    gate.wait()
    done.append((TrainManifest.decode(sys.argv[1].encode()).name, Status.decode(b'{"state": "Failed", "attempts": []}').state))
threads = [threading.Thread(target=read) for _ in range(16)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert done == [("one", "Failed")] * 16
"""


def test_the_first_use_of_a_type_may_be_that_of_several_threads() -> None:
    """msgspec alone crashes there, more often than not; a list of runs is read by sixteen threads."""
    for _ in range(5):
        command = [sys.executable, "-c", FIRST_USE, train_manifest().encode().decode()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr


def test_what_passes_can_be_written_from_a_deeper_stack() -> None:
    """A heartbeat reads and rewrites a status some frames below where it was read."""

    def rewritten(status: Status, frames: int) -> bytes:
        return rewritten(status, frames - 1) if frames else status.encode()

    taken = 0
    for depth in range(500, 1100):
        try:
            status = Status.decode(b'{"state": "Failed", "details": {"x": ' + b"[" * depth + b"]" * depth + b"}}")
        except ValueError as error:
            assert str(error) == "it is nested too deeply"  # noqa: PT017
            continue
        taken += 1
        rewritten(status, 30)
    assert 0 < taken < 600


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (codec.Sha256, "0" * 64),
        (TokenName, "alice"),
        (AdapterName, "support"),
        (VersionName, "v1"),
    ],
)
def test_a_name_does_not_end_in_a_newline(kind: Any, text: str) -> None:
    """Python's `$` would accept it, and the name becomes a file's or a header's."""
    assert msgspec.convert(text, kind) == text
    for refused in (f"{text}\n", f"{text}\n\n", f"\n{text}", ""):
        with pytest.raises(msgspec.ValidationError, match="matching regex"):
            msgspec.convert(refused, kind)


def test_neither_does_a_value_within_a_record() -> None:
    for kind, values in (
        (Renewal, {"id": "0" * 16, "time_to_live_s": None}),
        (GatewayAccess, {"owner": "a-token"}),
    ):
        name, text = next(iter(values.items()))
        assert codec.typed({**values}, kind)
        with pytest.raises(ValueError, match=f"{name} is "):
            codec.typed({**values, name: f"{text}\n"}, kind)


def test_every_pattern_of_a_record_is_one_of_whole_texts() -> None:
    def patterns(schema: object) -> list[str]:
        if isinstance(schema, list):
            return [found for one in schema for found in patterns(one)]
        if not isinstance(schema, dict):
            return []
        own = [schema["pattern"]] if isinstance(schema.get("pattern"), str) else []
        return own + [found for one in schema.values() for found in patterns(one)]

    found = patterns([*schemas().values()])
    assert len(found) >= 4
    assert [pattern for pattern in found if not pattern.endswith(r"(?!\n)$")] == []


def test_a_file_is_replaced_whole_and_a_secret_one_is_the_users_own(tmp_path: Path) -> None:
    path = tmp_path / "access.json"
    (tmp_path / "access.tmp").write_text("the draft of a process that was killed")
    for owner in ("first", "second"):
        GatewayAccess(owner=owner).write(path)
        assert GatewayAccess.read(path) == GatewayAccess(owner=owner)
        assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["access.json"]
    before = os.umask(0o022)
    try:
        Merged(dtype="float32", kept=1.0, seconds=1.0).write(tmp_path / "merged.json")
    finally:
        os.umask(before)
    assert (tmp_path / "merged.json").stat().st_mode & 0o777 == 0o644

"""What a service of a really trained adapter must show in the comparison with its training, on any engine."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec.structs import replace as changed

from palate_recipes.specs.probe import Probe, Turn
from palate_recipes.specs.serve import Parity
from palate_server.parity import Check, OwnScores, VllmScores, compare, read_probe
from tests.serve.conftest import Server


def check_agrees(parity: Parity | None) -> None:
    assert parity is not None
    assert parity.verdict == "same", parity
    assert parity.effect == pytest.approx(1, abs=0.02)
    assert parity.drift < 2e-3
    assert parity.base_drift is not None
    assert parity.base_drift < 2e-3
    assert parity.generated_drift < 2e-3
    assert parity.rows >= 4
    print(f"compared {parity.tokens} tokens in {parity.seconds} s")


def check_every_damage_is_told_apart(server: Server, adapter: Path, *, tuned: str = "default") -> None:
    """Compares over the engine's own scores; `tuned` is the engine's name of the trained adapter."""
    of = read_probe(adapter)
    assert of is not None
    check = Check(probe=of, service_name="smol_example", has_base=True, dtype="float32", token_budget=512)

    def text(probe: Probe = of, **sent_to: str) -> str:
        names = {"default": tuned, "smol_example": tuned, **sent_to}
        parity = compare(scores_of(server, names), Check(**{**vars(check), "probe": probe}))
        assert (parity.verdict == "same") == (probe is of and not sent_to)
        return parity.text

    text()
    assert "'default' answers as 'base' does: the adapter is not applied" in text(default="base", smol_example="base")
    assert "does not answer as 'default': its alias is wrong" in text(smol_example="base")
    messages = (Turn(role="system", content="Be brief."), Turn(role="user", content="Why?"))
    assert "the chat template or tokenizer differs" in text(replace_rows(of, messages=messages))


def replace_rows(of: Probe, **fields: Any) -> Probe:
    return changed(of, rows=tuple(changed(row, **fields) for row in of.rows))


def scores_of(server: Server, sent_to: dict[str, str]) -> VllmScores | OwnScores:
    """How its engine scores; requests for the models that `sent_to` names go to others, as with a wrong alias."""

    def ask(path: str, request: dict[str, Any]) -> Any:
        request = {**request, "model": sent_to.get(request["model"], request["model"])}
        transport = httpx.HTTPTransport(uds=engine_socket(server))  # scores and rendering are not for users
        with httpx.Client(transport=transport, base_url="http://engine", timeout=60) as engine:
            answer = engine.post(path, json=request)
        assert answer.status_code == 200, answer.text
        return answer.json()

    return VllmScores(ask) if server.ready and "vllm" in server.ready.engine else OwnScores(ask)


def engine_socket(server: Server) -> str:
    """Returns the socket of one of its engines."""
    for process in server.family():
        for option, value in itertools.pairwise(process.cmdline()):
            if option == "--uds":
                return value
            if value.startswith("--uds="):
                return value.removeprefix("--uds=")
    raise AssertionError("it has no engine")

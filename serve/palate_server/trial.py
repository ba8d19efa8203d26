"""The comparison of a version with its trained model, through the service's own endpoint, before it answers for others."""

from __future__ import annotations

import json
import logging
import re
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any

from palate_recipes.errors import ServerError
from palate_recipes.specs.serve import VERSION_HEADER, Parity, ServeSpec
from palate_server.parity import Check, OwnScores, VllmScores, compare, read_probe, refusal
from palate_server.plan import EnginePlan

logger = logging.getLogger(__name__)

_PARITY_TOKENS_ON_CPU = 384
"""Tokens to score per model: a processor takes about a second for them."""


class Asking:
    """Queries the service as a client does. The endpoint is this program's own socket, so no other process gets the token."""

    def __init__(self, endpoint: str, token: str) -> None:
        self._endpoint = endpoint
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def json(self, path: str, request: dict[str, Any], *, version: str, timeout_s: float) -> Any:
        """Posts a request and returns the answer's JSON. Raises ServerError."""
        try:
            return json.loads(self._post(path, json.dumps(request).encode(), version, timeout_s))
        except urllib.error.HTTPError as error:
            text = error.read(2000).decode(errors="replace")
            raise ServerError(f"it answered {path} with {error.code} {text}".rstrip()) from error
        except (OSError, ValueError) as error:
            raise ServerError(f"it did not answer {path} ({error})") from error

    def _post(self, path: str, body: bytes, version: str, timeout_s: float) -> bytes:
        headers = {**self._headers, VERSION_HEADER: version}
        request = urllib.request.Request(f"{self._endpoint}{path}", data=body, headers=headers)
        try:
            with self._opener.open(request, timeout=timeout_s) as response:
                content: bytes = response.read()
                return content
        except HTTPException as error:
            raise ConnectionError(f"{type(error).__name__}: {error}") from error


def compared(asking: Asking, spec: ServeSpec, plan: EnginePlan, *, version: str = "") -> Parity | None:
    """Returns the comparison of a version with its trained model; None if it is off.

    Args:
        asking: Asks the service as a client does, so that names and aliases are compared too.
        spec: What the version serves.
        plan: How.
        version: The version's name.

    Raises:
        ParityFailed: They differ, and `verify` is `error`.
        ServerError: The service does not answer the comparison's requests.
    """
    if spec.verify == "off":
        return None

    def ask(path: str, request: dict[str, Any]) -> Any:
        try:
            return asking.json(path, request, version=version, timeout_s=spec.start_timeout_s)
        except ServerError as error:
            raise ServerError(
                f"{error}. This was asked to compare it with the trained model: verify=False omits it"
            ) from error

    try:
        if re.search(r"--logprobs[-_]mode[ =]\S*logits", " ".join(spec.engine_args)):
            raise ServerError(
                "with logprobs-mode it returns logits, which cannot be compared with the trainer's log-probs: omit it, or set "
                "verify=False"
            )
        probe = read_probe(Path(spec.model_dir))
        if probe is None:
            return Parity(verdict="not verified", text="the model's folder has no probe.json")
        check = Check(
            probe=probe,
            service_name=spec.service_name,
            has_base=spec.base_model_dir is not None,
            dtype=plan.computes_in,
            quantised=any(re.match("--(quantization|kv[-_]cache[-_]dtype)|-q", one) for one in spec.engine_args),
            prompt_scores=plan.prompt_scores,
            max_model_len=spec.max_model_len,
            token_budget=_PARITY_TOKENS_ON_CPU if plan.on_cpu else Check.token_budget,
        )
        kind = VllmScores if plan.engine.name == "vllm" else OwnScores
        try:
            parity = compare(kind(ask), check)
        except ServerError:
            raise
        except Exception as error:  # an answer of another form
            raise ServerError(
                f"its comparison with the trained model failed ({type(error).__name__}: {error}); verify=False omits it"
            ) from error
    except ServerError as error:
        if spec.verify == "error":
            raise
        parity = Parity(verdict="not verified", text=str(error))
    logger.info("compared with the trained model: %s: %s", parity.verdict, parity.text)
    if parity.verdict == "different" and spec.verify == "error":
        raise refusal(parity)
    return parity

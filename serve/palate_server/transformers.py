"""The fallback engine: the app of `transformers serve` with the tuned and the base model. The only module that imports torch.

The server runs it as a program and never imports it. In float32 an adapter is first merged into its base. In 16 bits it is applied
beside the base, as in training: 16-bit weights round off most of an adapter that is small beside them (of a training of 12 steps
at 1e-4, they keep 45 % of the effect). The app loads models by name from the current folder, which has only the links `default` and
`base`. So responses carry these names, and no request can load another model. Differences to vLLM that a plain client would notice
are removed: max_completion_tokens, sampling by default, the context limit, ids, `[DONE]` at the end of a stream, the error format.
Remaining differences: parameters that transformers ignores are rejected (see transformers_parameters), and a model answers one
request at a time.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import AsyncIterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, NonNegativeInt

from palate_recipes.specs.serve import ACTIVITY_PATH, BASE_MODEL, TUNED_MODEL, ServeSpec
from palate_server.gateway import error_body, error_kind
from palate_server.parity import RENDER_PATH, SCORE_PATH

_CLOSE_S = 3
"""Time for open requests to finish after SIGTERM."""
_SCORED_AT_ONCE = 256
"""Tokens whose log-probs are computed at once, to limit memory."""


def merge(base_dir: str, adapter_dir: str, merged_dir: str) -> None:
    """Merges the adapter into the base model and writes the result in float32. A quantised base is dequantised first."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    quantised = getattr(base, "hf_quantizer", None) is not None
    if quantised:
        base = base.dequantize()
    merged = PeftModel.from_pretrained(base, adapter_dir).merge_and_unload(safe_merge=True)
    merged.save_pretrained(merged_dir, save_original_format=not quantised)


def begin_merge(spec: ServeSpec, merged_dir: Path) -> BaseProcess:
    """Starts the merge of the adapter. A separate process, so that its memory is free before serving begins."""
    assert spec.base_model_dir is not None
    shutil.rmtree(merged_dir, ignore_errors=True)
    paths = (spec.base_model_dir, spec.model_dir, str(merged_dir))
    merging = multiprocessing.get_context("spawn").Process(target=merge, args=paths)
    merging.start()
    return merging


def link_models(spec: ServeSpec, merged_dir: Path | None, links: Path) -> None:
    """Creates a folder with one link per model, by model name, to its full weights; none for an adapter beside its base."""
    shutil.rmtree(links, ignore_errors=True)
    links.mkdir()
    if spec.base_model_dir is None:
        (links / TUNED_MODEL).symlink_to(spec.model_dir)
    else:
        if merged_dir is not None:
            (links / TUNED_MODEL).symlink_to(merged_dir)
        (links / BASE_MODEL).symlink_to(spec.base_model_dir)


def build_app(spec: ServeSpec, *, dtype: str, tokenizer_dir: str, merged: bool) -> FastAPI:
    """Returns transformers' serving app, restricted to the links in the current folder. Loads no model yet."""
    from peft import PeftModel
    from transformers import AutoTokenizer
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.transcription import TranscriptionHandler
    from transformers.cli.serving.utils import GenerationState

    names = [TUNED_MODEL, *([BASE_MODEL] if spec.base_model_dir else [])]
    progress = Progress()

    class LinkedModels(ModelManager):  # type: ignore[misc]
        """Loads only the linked models, with the tuned model's tokenizer."""

        def process_model_name(self, model_id: str) -> str:
            if model_id not in names:
                raise HTTPException(404, f"The model `{model_id}` does not exist.")
            return model_id

        def _load_model(self, name: str, *args: Any, **options: Any) -> Any:
            beside = name == TUNED_MODEL and spec.base_model_dir is not None and not merged
            model = super()._load_model(f"{BASE_MODEL if beside else name}@main", *args, **options)
            if beside:
                model = PeftModel.from_pretrained(model, spec.model_dir).eval()
            model.register_forward_hook(progress.moved)
            return model

        def _load_processor(self, name: str, gguf_file: str | None = None) -> Any:
            return AutoTokenizer.from_pretrained(tokenizer_dir)

    class LikeVllm:
        """Mixin for transformers' handlers that makes them behave like vLLM."""

        _id_prefix = ""
        _inputs_at = 4
        """Position of a generation's inputs among the arguments; its configuration follows them."""
        _ends_with_done = True

        def _build_generation_config(self, body: dict[str, Any], *args: Any, **options: Any) -> Any:
            body = dict(body)
            if body.get("max_tokens") is None and body.get("max_completion_tokens") is not None:
                body["max_tokens"] = body["max_completion_tokens"]
            # generate() takes floats alone, and no empty biases.
            if (biases := body.pop("logit_bias", None)) is not None and biases:
                body["logit_bias"] = {token: float(bias) for token, bias in biases.items()}
            config = super()._build_generation_config(body, *args, **options)  # type: ignore[misc]
            config.do_sample = body.get("temperature") != 0
            if config.top_k is None:
                config.top_k = 0  # generate() defaults to 50
            return config

        async def _non_streaming(self, request_id: str, *args: Any, **options: Any) -> Any:
            self._limit(request_id, *args)
            return await super()._non_streaming(self._id_prefix + request_id, *args, **options)  # type: ignore[misc]

        def _streaming(self, request_id: str, *args: Any, **options: Any) -> Any:
            self._limit(request_id, *args)
            response = super()._streaming(self._id_prefix + request_id, *args, **options)  # type: ignore[misc]
            if self._ends_with_done:
                response.body_iterator = _then_done(response.body_iterator)
            return response

        def _limit(self, *args: Any) -> None:
            _limit(args[self._inputs_at], args[self._inputs_at + 1], spec.max_model_len)

    class Chat(LikeVllm, ChatCompletionHandler):  # type: ignore[misc]
        _id_prefix = "chatcmpl-"

    class Completion(LikeVllm, CompletionHandler):  # type: ignore[misc]
        _id_prefix = "cmpl-"

    class Responses(LikeVllm, ResponseHandler):  # type: ignore[misc]
        _inputs_at = 5  # the body comes before them; the handler adds the prefix of its ids
        _ends_with_done = False

    models = LinkedModels(dtype=dtype, model_timeout=-1)
    state = GenerationState()
    app: FastAPI = build_server(
        models,
        Chat(models, state),
        completion_handler=Completion(models, state),
        response_handler=Responses(models, state),
        transcription_handler=TranscriptionHandler(models, state),
        generation_state=state,
    )
    # Transcriptions would be answered with 500, since the models know text only. The others unload or load models for everybody.
    left_out = ("/v1/audio/transcriptions", "/reset", "/load_model")
    app.router.routes = [one for one in app.router.routes if getattr(one, "path", "") not in left_out]

    app.add_exception_handler(RequestValidationError, _not_an_object)
    add_scoring(app, models, spec.max_model_len)

    @app.get(ACTIVITY_PATH, include_in_schema=False)
    def activity() -> dict[str, float]:
        return {"still_s": time.monotonic() - progress.moved_at}

    return app


class Progress:
    """When a model computed last, at any token of an answer.

    Attributes:
        moved_at: Monotonic time.
    """

    def __init__(self) -> None:
        self.moved_at = time.monotonic()

    def moved(self, *_: object) -> None:
        self.moved_at = time.monotonic()


class ScoreRequest(BaseModel):
    """Tokens to score with a model."""

    model: str
    prompt_ids: list[NonNegativeInt] = Field(min_length=1)
    completion_ids: list[NonNegativeInt] = Field(min_length=1)


class RenderRequest(BaseModel):
    """A conversation or a text to turn into a model's tokens."""

    model: str
    messages: list[dict[str, str]] = []
    prompt: str = ""


def add_scoring(app: FastAPI, models: Any, max_model_len: int | None) -> None:
    """Adds what the comparison with the trained model needs and transformers' app lacks: log-probs and rendered tokens."""
    import torch
    from jinja2 import TemplateError

    one_at_a_time = threading.Lock()  # each request holds log-probs of a whole vocabulary per token

    @app.post(SCORE_PATH, include_in_schema=False)
    def score(request: ScoreRequest) -> dict[str, Any]:
        model, _ = models.load_model_and_processor(request.model)
        prompt, answer = request.prompt_ids, request.completion_ids
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        config = plain.config.get_text_config()
        room = max_model_len or getattr(config, "max_position_embeddings", None)
        if room and len(prompt) + len(answer) > room:
            raise HTTPException(
                400, f"Prompt and answer have {len(prompt) + len(answer)} tokens, but the context is {room} tokens."
            )
        # On a GPU, an unknown token would end the whole process.
        if max(*prompt, *answer) >= config.vocab_size:
            raise HTTPException(400, f"A token is outside of the model's vocabulary of {config.vocab_size} tokens.")
        keep = {"logits_to_keep": len(answer) + 1} if plain._supports_logits_to_keep() else {}
        logps: list[float] = []
        with one_at_a_time, torch.inference_mode():
            ids = torch.tensor([[*prompt, *answer]], device=model.device)  # (1, tokens)
            logits = model(input_ids=ids, use_cache=False, **keep).logits[0, -len(answer) - 1 : -1]
            answered = torch.split(ids[0, len(prompt) :], _SCORED_AT_ONCE)
            for part, wanted in zip(torch.split(logits, _SCORED_AT_ONCE), answered, strict=True):
                logps += part.float().log_softmax(-1).gather(1, wanted.unsqueeze(1)).squeeze(1).tolist()
        return {"logps": [value if math.isfinite(value) else None for value in logps]}

    @app.post(RENDER_PATH, include_in_schema=False)
    def render(request: RenderRequest) -> dict[str, Any]:
        _, tokenizer = models.load_model_and_processor(request.model)
        if not request.messages:
            return {"tokens": tokenizer(request.prompt)["input_ids"]}
        try:
            text = tokenizer.apply_chat_template(request.messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, ValueError) as error:
            raise HTTPException(400, f"The chat template rejects the conversation: {error}") from error
        return {"tokens": tokenizer(text, add_special_tokens=False)["input_ids"]}


async def _not_an_object(_request: Request, error: Exception) -> JSONResponse:
    """Answers a body that is no JSON object with 400, as vLLM and OpenAI do. FastAPI would say 422."""
    assert isinstance(error, RequestValidationError)
    said = "; ".join(str(one.get("msg", one)) for one in error.errors())
    message = f"The request's body is not a JSON object: {said}."
    return JSONResponse(error_body(message, kind=error_kind(400), param=None, code=400), 400)


def _limit(inputs: Any, config: Any, max_model_len: int | None) -> None:
    """Limits prompt and answer to the context, as vLLM does: rejects a longer prompt, truncates a longer answer."""
    if max_model_len is None:
        return
    prompt = inputs["input_ids"].shape[-1]  # (1, tokens)
    if prompt >= max_model_len:
        raise HTTPException(
            400,
            f"The prompt has {prompt} tokens, but the service's context is {max_model_len} tokens. Shorten the prompt.",
        )
    config.max_new_tokens = min(config.max_new_tokens, max_model_len - prompt)


async def _then_done(events: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for event in events:
        yield event
    yield "data: [DONE]\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m palate_server.transformers", description=__doc__)
    parser.add_argument("spec_file", type=Path)
    parser.add_argument("--uds", required=True, help="path of the Unix socket to listen on")
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--tokenizer", required=True, help="folder of the tokenizer for all models")
    parser.add_argument("--merge", action="store_true", help="merge the adapter, in float32")
    options = parser.parse_args()
    spec = ServeSpec.read(options.spec_file)
    own = options.spec_file.with_suffix("")  # a service may have several engines
    merged_dir, links = own / "merged", own / "models"
    own.mkdir(exist_ok=True)
    merging = begin_merge(spec, merged_dir) if options.merge else None
    # The imports take seconds, so do them while the merge runs.
    app = build_app(spec, dtype=options.dtype, tokenizer_dir=options.tokenizer, merged=options.merge)
    if merging is not None:
        merging.join()
        if merging.exitcode != 0:
            sys.exit(f"error: merging {spec.model_dir} into {spec.base_model_dir} failed, see the lines above")
    link_models(spec, merged_dir if options.merge else None, links)
    os.chdir(links)
    config = uvicorn.Config(app, uds=options.uds, access_log=False, timeout_graceful_shutdown=_CLOSE_S)
    uvicorn.Server(config).run()


if __name__ == "__main__":
    main()

"""Checks that the service answers as the model that was trained, by the log-probs in probe.json. Knows HTTP paths, no engine code.

An engine can serve something else without an error: the base model because an adapter was not loaded, an adapter in part, another
chat template, weights in a dtype that loses too much. So before the service counts as ready, the rows of probe.json are scored
through its own endpoint, and the log-probs are compared with the trainer's.

Three numbers decide. *Drift* is the mean absolute difference to the trainer's log-probs per token. *Effect* is the part of the
training's change that the service shows: 1 as trained, 0 as the base. It is taken against `base` of the same service, so rounding
that both share cancels out. The *generated* drift is the drift of tokens scored as generation would: prompts' log-probs omit an
adapter on the output head (vLLM issue 51594).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from palate_recipes.errors import ParityFailed, ServerError
from palate_recipes.specs.probe import Probe, ProbeRow
from palate_recipes.specs.serve import BASE_MODEL, TUNED_MODEL, Parity

DRIFT_LIMITS = {"float32": 0.01, "float16": 0.03, "bfloat16": 0.15}
"""Largest mean |Δ log-prob| per token that rounding explains, by the coarser dtype of training and service, in nats.
See docs/deployment.md for the measurements."""
QUANTISED_LIMIT = 1.0
"""The same if training or service rounds the weights to 8 or 4 bits. The tuned model may then drift little more than the base."""
_AS_BASE = (1.25, 0.05)
"""The drift that the base's own explains: a factor and nats per token."""

EFFECT_RANGE = (0.7, 1.3)
_CLEAR = 4.0
"""Training's change must be this many times larger than the base's drift, or noise would decide about the effect."""
_FEW_TOKENS = 16
"""With fewer, the base's drift is not known well, and the effect has a larger error: the square root decides."""
_FEWEST_TOKENS = 4
"""With fewer, a small change may come out as none by chance."""
_ABSENT = 0.1
"""Below this part of the training's change, `default` answers as `base`, however small the change is."""
_SMALLEST_CHANGE = 1e-3
"""Nats per token, root mean square. A smaller change is not told from rounding."""

_NOT_FINITE = 1e9
"""Written instead of NaN and infinity."""

_GENERATED_PER_ROW = 2
_GENERATED_ALONE = 12
"""Tokens per row that are scored as generated ones; more if only they count. An engine scores at most 128 at once."""

Ask = Callable[[str, dict[str, Any]], Any]
"""Posts a JSON request to a path of the service and returns the answer's JSON. Raises ServerError."""


class Scores(Protocol):
    """How one engine scores given tokens. Models are named as clients name them."""

    def answers(self, model: str, rows: Sequence[ProbeRow]) -> list[list[float]]:
        """Returns the log-prob of each answer token, by row."""

    def generated(self, model: str, rows: Sequence[ProbeRow], at: Sequence[Sequence[int]]) -> list[list[float]]:
        """Returns, by row, the log-probs of the answer tokens at these positions as the next token to generate."""

    def rendered(self, model: str, row: ProbeRow) -> list[int]:
        """Returns the tokens of the row's conversation or text as the service renders it."""


class VllmScores:
    """vLLM's `/v1/completions` on token ids, and its `/tokenize`."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    def answers(self, model: str, rows: Sequence[ProbeRow]) -> list[list[float]]:
        prompts = [[*row.prompt_ids, *row.completion_ids] for row in rows]
        choices = self._complete(model, prompts, prompt_logprobs=0)
        return [
            [
                _number(place[str(token)]["logprob"])
                for place, token in zip(
                    choice["prompt_logprobs"][len(row.prompt_ids) :], row.completion_ids, strict=True
                )
            ]
            for choice, row in zip(choices, rows, strict=True)
        ]

    def generated(self, model: str, rows: Sequence[ProbeRow], at: Sequence[Sequence[int]]) -> list[list[float]]:
        prompts, tokens = [], []
        for row, places in zip(rows, at, strict=True):
            for place in places:
                prompts.append([*row.prompt_ids, *row.completion_ids[:place]])
                tokens.append(row.completion_ids[place])
        wanted = sorted(set(tokens))
        choices = iter(
            self._complete(model, prompts, logprobs=1, logprob_token_ids=wanted, return_tokens_as_token_ids=True)
        )
        found = iter(tokens)
        return [
            [_number(next(choices)["logprobs"]["top_logprobs"][0][f"token_id:{next(found)}"]) for _ in places]
            for places in at
        ]

    def rendered(self, model: str, row: ProbeRow) -> list[int]:
        return _rendered(self._ask, "/tokenize", model, row)

    def _complete(self, model: str, prompts: list[list[int]], **more: Any) -> list[dict[str, Any]]:
        # The model's generation_config.json sets other defaults, which a processed log-prob would show.
        plain = {
            "max_tokens": 1,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
        answer = self._ask("/v1/completions", {"model": model, "prompt": prompts, **plain, **more})
        return sorted(answer["choices"], key=lambda choice: int(choice["index"]))


class OwnScores:
    """The paths that `palate_server.transformers` adds to its engine."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    def answers(self, model: str, rows: Sequence[ProbeRow]) -> list[list[float]]:
        return [self._score(model, row) for row in rows]

    def generated(self, model: str, rows: Sequence[ProbeRow], at: Sequence[Sequence[int]]) -> list[list[float]]:
        # This engine has full weights and one way to compute, so a prompt's tokens are scored as generated ones are.
        return [
            [scores[place] for place in places] for scores, places in zip(self.answers(model, rows), at, strict=True)
        ]

    def rendered(self, model: str, row: ProbeRow) -> list[int]:
        return _rendered(self._ask, RENDER_PATH, model, row)

    def _score(self, model: str, row: ProbeRow) -> list[float]:
        body = {"model": model, "prompt_ids": row.prompt_ids, "completion_ids": row.completion_ids}
        return [_number(value) for value in self._ask(SCORE_PATH, body)["logps"]]


def _rendered(ask: Ask, path: str, model: str, row: ProbeRow) -> list[int]:
    turns = [{"role": turn.role, "content": turn.content} for turn in row.messages]
    text: dict[str, Any] = {"messages": turns} if turns else {"prompt": row.prompt}
    return [int(token) for token in ask(path, {"model": model, **text})["tokens"]]


def _number(logp: Any) -> float:
    return math.nan if logp is None else float(logp)  # JSON has no NaN


SCORE_PATH = "/palate/score"
RENDER_PATH = "/palate/render"
PRIVATE_PATHS = (SCORE_PATH, RENDER_PATH)
"""For the server program alone."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """What to compare.

    Attributes:
        probe: The trainer's log-probs.
        service_name: The tuned model's further name.
        has_base: Whether the service also has the base model.
        dtype: The service's dtype: float32, bfloat16 or float16.
        quantised: Whether the engine rounds weights or cache further.
        prompt_scores: Whether log-probs of a prompt count; otherwise only those of tokens scored as generated ones.
        max_model_len: Context in tokens; None: the engine's default.
        token_budget: Tokens to score per model. At least one row is scored.
    """

    probe: Probe
    service_name: str
    has_base: bool
    dtype: str
    quantised: bool = False
    prompt_scores: bool = True
    max_model_len: int | None = None
    token_budget: int = 16_384

    @property
    def limit(self) -> float:
        """The largest drift that rounding explains."""
        if self.quantised or self.probe.quantization:
            return QUANTISED_LIMIT
        return max(DRIFT_LIMITS.get(name, DRIFT_LIMITS["bfloat16"]) for name in (self.probe.precision, self.dtype))

    def rows(self) -> list[ProbeRow]:
        """The rows to score, shortest first, within the budget and the context."""
        room = self.max_model_len or math.inf
        taken: list[ProbeRow] = []
        for row in sorted(self.probe.rows, key=lambda row: row.tokens):
            # One more token is generated after the row.
            if row.tokens < room and (not taken or sum(one.tokens for one in [*taken, row]) <= self.token_budget):
                taken.append(row)
        return taken


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """Log-probs by row, of the trainer and of the service; those of the base are empty without one."""

    rows: list[ProbeRow]
    trained: list[list[float]]
    trained_base: list[list[float]]
    tuned: list[list[float]]
    base: list[list[float]]


def compare(scores: Scores, check: Check) -> Parity:
    """Scores the probe's rows through the service and compares them with the trainer's log-probs.

    Raises:
        ServerError: The service does not answer such a request.
    """
    began = time.monotonic()
    rows = check.rows()
    if not rows:
        return Parity(
            verdict="not verified",
            text=f"none of the {len(check.probe.rows)} rows of probe.json fits into the context of {check.max_model_len} tokens",
        )
    at = [
        _spread(len(row.completion_ids), _GENERATED_PER_ROW if check.prompt_scores else _GENERATED_ALONE)
        for row in rows
    ]
    has_base = check.has_base and all(row.base_logps for row in rows)

    def score(model: str, which: Sequence[int]) -> list[list[float]]:
        wanted = [rows[n] for n in which]
        if check.prompt_scores:
            return scores.answers(model, wanted)
        return scores.generated(model, wanted, [at[n] for n in which])

    def trained(values: Sequence[Sequence[float]]) -> list[list[float]]:
        return [list(row) for row in values] if check.prompt_scores else _at(at, values)

    every = range(len(rows))
    # The row in which training changed most tells the models apart.
    telling = max(every, key=lambda n: _rms(_minus(rows[n].logps, rows[n].base_logps))) if has_base else 0
    try:
        problems = _template_problems(scores, rows)
        measured = _Measured(
            rows=rows,
            trained=trained([row.logps for row in rows]),
            trained_base=trained([row.base_logps for row in rows]) if has_base else [],
            tuned=score(TUNED_MODEL, every),
            base=score(BASE_MODEL, every) if has_base else [],
        )
        generated = scores.generated(TUNED_MODEL, rows, at) if check.prompt_scores else measured.tuned
        alias = score(check.service_name, [telling])
    except (LookupError, TypeError, ValueError) as error:
        raise ServerError(
            f"its log-probs cannot be compared with the trainer's ({type(error).__name__}: {error}): omit engine arguments that "
            "change log-probs, or set verify=False"
        ) from error
    drift = _mean_drift(measured.tuned, measured.trained)
    base_drift = _mean_drift(measured.base, measured.trained_base) if has_base else None
    effect, is_clear = _effect(measured, check.limit) if has_base else (None, False)
    generated_drift = _mean_drift(generated, _at(at, [row.logps for row in rows]))
    problems += _problems(check, drift, base_drift, effect, is_clear, measured)
    if not problems and generated_drift > 2 * check.limit:
        problems.append(
            f"tokens are generated with other log-probs than the trainer's (mean difference {generated_drift:.3f}), while the same "
            "tokens in a prompt agree: the engine leaves a part of the model out when it generates"
        )
    if not problems and _mean_drift(alias, [measured.tuned[telling]]) > check.limit:
        problems.append(f"the model name '{check.service_name}' does not answer as '{TUNED_MODEL}': its alias is wrong")
    text = (
        "; ".join(problems)
        if problems
        else f"mean difference {drift:.4f} nats per token (limit {check.limit:g})"
        + (f", effect {effect:.2f} of the trained" if effect is not None and is_clear else "")
    )
    return Parity(
        verdict="different" if problems else "same",
        text=text,
        table=_table(measured) if problems else "",
        rows=len(rows),
        tokens=sum(len(one) for one in measured.tuned),
        drift=_writable(drift),
        base_drift=None if base_drift is None else _writable(base_drift),
        effect=None if effect is None else _writable(effect),
        generated_drift=_writable(generated_drift),
        limit=check.limit,
        seconds=round(time.monotonic() - began, 2),
    )


def _writable(value: float) -> float:
    """Returns a value that JSON has: a service that is served all the same writes them into ready.json."""
    return round(value, 5) if math.isfinite(value) else _NOT_FINITE


def refusal(parity: Parity) -> ParityFailed:
    """Returns the error that stops a service which does not answer as the trained model."""
    return ParityFailed(
        f"what is served is not what was trained: {parity.text}\n{parity.table}\n"
        "To serve it all the same, deploy with verify='warn'; verify=False omits the comparison."
    )


def _template_problems(scores: Scores, rows: Sequence[ProbeRow]) -> list[str]:
    for row in rows:
        if not row.messages and not row.prompt:
            continue  # a probe of an earlier version
        rendered = scores.rendered(TUNED_MODEL, row)
        if not row.renders_as(rendered):
            same = next(
                (n for n, pair in enumerate(zip(rendered, row.prompt_ids, strict=False)) if pair[0] != pair[1]),
                min(len(rendered), len(row.prompt_ids)),
            )
            return [
                f"the chat template or tokenizer differs from training's: row {row.row} becomes {len(rendered)} tokens instead of "
                f"{len(row.prompt_ids)}, and token {same + 1} is the first that differs"
            ]
    return []


def _problems(
    check: Check,
    drift: float,
    base_drift: float | None,
    effect: float | None,
    is_clear: bool,
    measured: _Measured,
) -> list[str]:
    if not math.isfinite(drift) or (base_drift is not None and not math.isfinite(base_drift)):
        return [f"the service computes log-probs that are not finite: the weights overflow in {check.dtype}"]
    if effect is not None and (trained_change := _change(measured.trained, measured.trained_base)) >= _SMALLEST_CHANGE:
        tells = is_clear or len(_flat(measured.tuned)) >= _FEWEST_TOKENS
        if tells and _change(measured.tuned, measured.base) < _ABSENT * trained_change:
            return [f"'{TUNED_MODEL}' answers as '{BASE_MODEL}' does: the adapter is not applied"]
        low, high = EFFECT_RANGE
        if is_clear and not low <= effect <= high:
            what = (
                "the adapter is not applied, or only in part" if effect < low else "the adapter is applied too strongly"
            )
            return [
                f"the service shows {effect:.2f} of the training's change: {what} (modules, lora_alpha or rank differ)"
            ]
    rounded = check.quantised or bool(check.probe.quantization)
    factor, more = _AS_BASE
    if drift <= check.limit and (not rounded or base_drift is None or drift <= factor * base_drift + more):
        return []
    told = f"log-probs differ by {drift:.3f} nats per token from the trainer's (limit {check.limit:g})"
    if base_drift is not None and base_drift > check.limit:
        return [
            f"{told}, those of '{BASE_MODEL}' too ({base_drift:.3f}): the base weights or their dtype ({check.dtype}; training: "
            f"{check.probe.quantization or check.probe.precision}) are not those of the training"
        ]
    if base_drift is not None:
        return [f"{told}, while '{BASE_MODEL}' agrees ({base_drift:.3f}): the adapter is damaged or another one"]
    return [
        f"{told}: other weights than the trained ones, or a dtype that loses too much ({check.dtype}; training: "
        f"{check.probe.precision})"
    ]


def _effect(measured: _Measured, limit: float) -> tuple[float, bool]:
    """Returns the regression of the served change on the trained one, and whether noise leaves it clear."""
    trained = _minus(_flat(measured.trained), _flat(measured.trained_base))
    served = _minus(_flat(measured.tuned), _flat(measured.base))
    square = sum(value * value for value in trained)
    effect = sum(a * b for a, b in zip(served, trained, strict=True)) / square if square else 0.0
    noise = _rms(_minus(_flat(measured.base), _flat(measured.trained_base)))
    clear = _CLEAR
    if len(trained) < _FEW_TOKENS:
        clear *= math.sqrt(_FEW_TOKENS / len(trained))
        noise = max(noise, limit / 5)
    return effect, _rms(trained) >= max(clear * noise, _SMALLEST_CHANGE)


def _change(tuned: list[list[float]], base: list[list[float]]) -> float:
    return _rms(_minus(_flat(tuned), _flat(base)))


def _mean_drift(served: list[list[float]], trained: list[list[float]]) -> float:
    drifts = [abs(value) for value in _minus(_flat(served), _flat(trained))]
    return sum(drifts) / len(drifts)


def _table(measured: _Measured) -> str:
    lines = [f"  {'row':>6} {'tokens':>6} {'trained':>10} {'served':>10} {'base':>10} {'mean |Δ|':>9}"]
    for number, row in enumerate(measured.rows):
        trained, served = measured.trained[number], measured.tuned[number]
        base = f"{sum(measured.base[number]):.2f}" if measured.base else "-"
        lines.append(
            f"  {row.row:>6} {len(served):>6} {sum(trained):>10.2f} {sum(served):>10.2f} {base:>10} "
            f"{_mean_drift([served], [trained]):>9.3f}"
        )
    return "\n".join(lines)


def _spread(length: int, count: int) -> list[int]:
    """Returns up to `count` positions, the first and the others at equal distances."""
    return sorted({length * n // count for n in range(count)})


def _at(places: Sequence[Sequence[int]], rows: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[row[place] for place in wanted] for wanted, row in zip(places, rows, strict=True)]


def _flat(rows: Sequence[Sequence[float]]) -> list[float]:
    return [value for row in rows for value in row]


def _minus(values: Sequence[float], others: Sequence[float]) -> list[float]:
    return [value - other for value, other in zip(values, others, strict=True)]


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values)) if values else 0.0


def read_probe(model_dir: Path) -> Probe | None:
    """Returns the probe of a model folder; None if it has none. Raises ParityFailed if it is damaged."""
    try:
        return Probe.read(model_dir)
    except (OSError, ValueError) as error:
        raise ParityFailed(f"{error}. Train again or restore the file; verify=False omits the comparison") from error

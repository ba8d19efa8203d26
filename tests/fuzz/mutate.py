"""Damages valid inputs: bytes, texts and JSON values. Knows what breaks readers, nothing of Palate."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

TEXTS = [
    "", " ", "\0", "\ufeff", "\ud83d", "\udc80", "\U0001f600", "\x1b[2J", "\r", "\u2028", "é", "'", '"', "`", "\\", "%s", "{x}", "{",
    "..", "../x", "/", "//", "~", "~nosuchuser/x", "*", "**/", "[", "[]", "]", "?", "#", "&", "@", "://", "file://",
    "s3://b/k", "oss://", "hf://datasets/a/b", "gsheet://x/y", "null", "NaN", "-0", "1e999", "9" * 5000, "0x" + "f" * 5000, "true",
    "None", "[[" * 700, '{"a":' * 700, "[" * 100_000, "a" * 100_000, "nul\0l", "1_000", "１", "2024-02-30", "12:61:61", "\n", "\n---\n",
    "<<: *a", "&a", "*a", "!!python/object/apply:os.system ['true']", "!!int x", "!!bool x", "!!timestamp x", "<|im_end|>",
    "\n\nHuman: ", "a" * 300,
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**63, 2**64, -(2**70), 10**400, 0.5, 1e308, float("nan"), float("inf"), [], {}, [[]], [None], [1],
    ["a"], {"": ""}, {"role": "user"}, {"content": None}, {"role": "assistant", "content": [{"type": "text"}]}, [[[[[[]]]]]],
]  # fmt: skip


def deep(depth: int) -> Any:
    """Returns lists in lists."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def text(rng: Random, valid: str) -> str:
    """Returns a text that was damaged in one to four places."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(valid))
        end = min(len(valid), at + rng.choice((0, 1, 1, 2, 8, 40)))
        part = rng.choice((rng.choice(TEXTS), rng.choice(TEXTS), "", valid[at:end] * 2, chr(rng.randint(0, 0x10FFFF))))
        valid = valid[:at] + part + valid[end:]
    return valid


def data(rng: Random, valid: bytes) -> bytes:
    """Returns bytes that were damaged in one to six places."""
    for _ in range(rng.randint(1, 6)):
        at = rng.randint(0, len(valid))
        end = min(len(valid), at + rng.choice((0, 1, 1, 1, 4, 30)))
        part = rng.choice(
            (rng.randbytes(end - at), rng.choice(TEXTS).encode("utf-8", "surrogatepass"), b"", valid[at:end] * 2)
        )
        if rng.random() < 0.05:
            end = len(valid)
        valid = valid[:at] + part + valid[end:]
    return valid


def value(rng: Random, valid: Any) -> Any:
    """Returns a JSON value in which one to three parts were replaced, renamed or removed."""
    root = [copy.deepcopy(valid)]
    for _ in range(rng.randint(1, 3)):
        places = list(_places(root))
        holder, key = rng.choice(places)
        what = rng.random()
        if what < 0.15 and holder is not root:
            del holder[key]
        elif what < 0.3 and isinstance(holder, dict):
            holder[text(rng, key)] = holder.pop(key)
        elif what < 0.5 and isinstance(holder[key], str):
            holder[key] = text(rng, holder[key])
        elif what < 0.52:
            holder[key] = deep(rng.choice((5, 100, 400, 900, 980)))
        else:
            holder[key] = copy.deepcopy(rng.choice([*VALUES, rng.choice(TEXTS)]))
    return root[0]


def _places(holder: Any, depth: int = 0) -> Any:
    for key in range(len(holder)) if isinstance(holder, list) else list(holder):
        yield holder, key
        if isinstance(holder[key], list | dict) and depth < 20:
            yield from _places(holder[key], depth + 1)


def dump(rng: Random, found: Any) -> bytes:
    """Returns the value as JSON, sometimes damaged again."""
    try:
        encoded = json.dumps(found, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    except RecursionError:
        encoded = b"[" * 50_000
    return data(rng, encoded) if rng.random() < 0.2 else encoded

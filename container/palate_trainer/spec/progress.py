"""One metrics object in a few words, for the log and for whoever follows a run. Knows the names of metrics, no trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SHOWN = (
    ("loss", "loss {:.3f}"),
    ("rewards/margins", "margin {:.2f}"),
    ("rewards/accuracies", "accuracy {:.2f}"),
    ("tokens_per_s", "{:.0f} tokens/s"),
)
_SHOWN_WITHOUT_REWARDS = (
    ("loss", "loss {:.3f}"),
    ("mean_token_accuracy", "token accuracy {:.2f}"),
    ("tokens_per_s", "{:.0f} tokens/s"),
)


def progress_line(event: Mapping[str, Any]) -> str:
    """A `train` or `eval` event as the line of the log: `step 30/120 loss 0.412 margin 1.10 … 4 min left`."""
    prefix = "eval_" if event["kind"] == "eval" else ""
    shown = _SHOWN if f"{prefix}rewards/margins" in event else _SHOWN_WITHOUT_REWARDS
    words = [f"{'validation at step' if prefix else 'step'} {event['step']}/{event['total_steps']}"]
    for name, form in shown:
        value = event.get(prefix + name)
        if value is not None:
            words.append(form.format(value))
    left = event.get("seconds_left")
    if left is not None and event["step"] < event["total_steps"]:
        words.append(f"{duration(left)} left")
    return " ".join(words)


def duration(seconds: float) -> str:
    """Seconds in words that fit an estimate: `40 s`, `4 min`, `2 h 10 min`, `3 d 4 h`."""
    if seconds < 90:
        return f"{round(seconds)} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"

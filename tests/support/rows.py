"""A few preference pairs about numbers, for trainings that must run and need not learn."""

from __future__ import annotations

ROWS = 12


def preference_rows(count: int = ROWS) -> list[dict[str, str]]:
    return [
        {
            "prompt": f"Is {number} an even number?",
            "chosen": f"It depends on the last digit; {number} is {'even' if number % 2 == 0 else 'odd'}.",
            "rejected": "Yes, of course, as you say.",
        }
        for number in range(count)
    ]

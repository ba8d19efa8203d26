"""What `python -m palate_server.merge BASE ADAPTER OUT` leaves in OUT for the runner that started it, without engine imports.

It writes `merged.json` (a `Merged`) last, so its existence means done; or `error.txt`, and exits with 1.
"""

from __future__ import annotations

from palate_recipes.specs.codec import File

MERGED_FILE = "merged.json"

MERGE_PACKAGES = ("torch", "transformers", "peft", "accelerate")
"""What the program needs."""

KEPT_AT_LEAST = 0.7
"""Part of the adapter's change that must survive the rounding. The comparison with the trained model has the same limit."""


class Merged(File, frozen=True, kw_only=True):
    """How an adapter was merged.

    Attributes:
        dtype: Type of the merged weights that it was meant for: float32, bfloat16 or float16.
        kept: Part of the adapter's change of the weights that is left after rounding: 1 all, 0 nothing.
        seconds: Duration.
    """

    dtype: str
    kept: float
    seconds: float

    @property
    def text(self) -> str:
        """One line about what rounding has cost."""
        return f"rounded to {self.dtype}, the merged weights keep {self.kept:.0%} of the adapter's change"

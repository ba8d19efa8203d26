"""Votes as files: pairs to train on, and apart from them what says no preference. Knows no page and no service."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from palate_recipes.errors import ConfigurationError
from palate_recipes.preferences.formats import FORMATS, read_row
from palate_recipes.preferences.row import RowFaults
from palate_recipes.text import expand_path, show_path

Vote = Literal["left", "right", "tie", "both_bad"]
VOTES: tuple[Vote, ...] = get_args(Vote)


class Shown(NamedTuple):
    """An answer as the voter saw it.

    Attributes:
        model: Name of the model in the service.
        text: The answer.
        finish: Why it ended: `stop`, or `length` if it was cut at the maximum of tokens.
    """

    model: str
    text: str
    finish: str


class Kept(NamedTuple):
    """Where a vote was written.

    Attributes:
        is_pair: Whether it is a pair to train on.
        why: Why a vote for one answer is not a pair; "" otherwise.
    """

    is_pair: bool
    why: str = ""


class VotesFile:
    """Two files of JSON lines: `votes.jsonl` with pairs, and next to it `votes.ties.jsonl` with what is not trained on.

    Each vote is appended with one write, so several processes may append to the same files.

    Args:
        path: The file of pairs. Both files are created with the first vote, readable only by the user.

    Raises:
        ConfigurationError: The file exists and has other content than JSON lines, or cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            self.path = Path(expand_path(path)).absolute()
        except ValueError as error:
            raise ConfigurationError(f"votes={show_path(path)} {error}") from None
        stem = self.path.name.removesuffix(".jsonl")
        self.ties = self.path.with_name(f"{stem}.ties.jsonl")
        self._lock = threading.Lock()
        self.pairs_count, self.ties_count = (_count(file) for file in (self.path, self.ties))

    def add(self, prompt: list[dict[str, str]], left: Shown, right: Shown, vote: Vote, facts: dict[str, Any]) -> Kept:
        """Appends a vote.

        Args:
            prompt: The messages that both answers follow.
            left: The answer on the left.
            right: The answer on the right.
            vote: Which is better.
            facts: Further fields of the row: voter, sampling settings and so on.

        Raises:
            ConfigurationError: The file cannot be written. The vote is not counted.
        """
        why = ""
        if vote in ("left", "right"):
            better, other = (left, right) if vote == "left" else (right, left)
            row = {
                "prompt": prompt,
                "chosen": [{"role": "assistant", "content": better.text}],
                "rejected": [{"role": "assistant", "content": other.text}],
                "chosen_model": better.model,
                "rejected_model": other.model,
                "chosen_side": vote,
                "chosen_finish": better.finish,
                "rejected_finish": other.finish,
                **facts,
            }
            try:
                # As `palate data check` and the trainer read it: what they refuse is never among the pairs.
                read_row(json.loads(_line(row)), 1, strategy="dpo", format=FORMATS["trl"])
            except RowFaults as error:
                why = str(error)
            else:
                self._append(self.path, row)
                return Kept(is_pair=True)
        # `winner` makes it a tie for every reader of the format `compared`, also if the file is trained on by mistake.
        row = {
            "prompt": prompt,
            "response_a": left.text,
            "response_b": right.text,
            "winner": "tie",
            "vote": vote,
            "response_a_model": left.model,
            "response_b_model": right.model,
            **({"not_a_pair": why} if why else {}),
            **facts,
        }
        self._append(self.ties, row)
        return Kept(is_pair=False, why=why)

    def content(self, *, ties: bool = False) -> bytes:
        """Returns the file of pairs, or that of ties; empty if nobody has voted yet."""
        try:
            return (self.ties if ties else self.path).read_bytes()
        except FileNotFoundError:
            return b""

    def _append(self, file: Path, row: dict[str, Any]) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
        try:
            with self._lock:
                file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                with open(os.open(file, flags, 0o600), "r+b", buffering=0) as opened:
                    end = opened.seek(0, os.SEEK_END)
                    # A line that a full disk has cut is ended first, so that only that line is lost.
                    cut = end > 0 and os.pread(opened.fileno(), 1, end - 1) != b"\n"
                    line = (b"\n" if cut else b"") + _line(row)
                    if opened.write(line) != len(line):
                        raise OSError(None, "the disk is full")
                    os.fsync(opened.fileno())
                if file == self.path:
                    self.pairs_count += 1
                else:
                    self.ties_count += 1
        except OSError as error:
            raise ConfigurationError(
                f"the vote was not saved: {file} cannot be written: {error.strerror or error}. Fix that and vote again"
            ) from None


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode(errors="replace") + b"\n"


def _count(file: Path) -> int:
    try:
        with file.open("rb") as opened:
            first = opened.read(256).lstrip()
            if first and not first.startswith(b"{"):
                raise ConfigurationError(
                    f"votes={file}: expected JSON lines, to which votes are appended; the file has other content. Name another file"
                )
            opened.seek(0)
            return sum(1 for line in opened if line.strip())
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise ConfigurationError(f"votes={file} cannot be read: {error.strerror or error}") from None

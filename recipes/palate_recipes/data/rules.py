"""What preference data is checked for: every finding's code, level, meaning and remedy, as rows. Knows no file."""

from __future__ import annotations

from typing import Literal, NamedTuple

Level = Literal["error", "warning", "info"]


class Rule(NamedTuple):
    """One kind of finding.

    Attributes:
        level: `error` stops a training, `warning` is printed, `info` is worth knowing.
        meaning: What it is, for people.
        remedy: What to do about it.
        fix: What `--fix` does with such a row: `drop` it, `clean` its text, or nothing.
    """

    level: Level
    meaning: str
    remedy: str
    fix: Literal["", "drop", "clean"] = ""


_CORRECT = "Correct or remove the row"

RULES: dict[str, Rule] = {
    # The file.
    "broken-json": Rule("error", "broken JSON", "Repair the place that is named", "drop"),
    "not-utf8": Rule("error", "bytes that are not UTF-8", "Save the file as UTF-8", "drop"),
    "broken-table": Rule(
        "error", "a row whose cells do not fit the header", "Quote cells that hold separators", "drop"
    ),
    "byte-order-mark": Rule("info", "the file begins with a byte-order mark", "Nothing: it is read over", "clean"),
    "no-rows": Rule("error", "a file without rows", "Give it a JSON array of objects, or one JSON object a line"),
    "mixed-formats": Rule("warning", "rows of several formats in one file", "Make them alike: `palate data convert`"),
    # The shape of a row.
    "not-an-object": Rule("error", "a row that is no object", f"{_CORRECT}: each is an object with fields", "drop"),
    "unknown-format": Rule("error", "fields that no known format has", "Rename the fields, or map columns", "drop"),
    "missing-field": Rule("error", "a field is missing", f"{_CORRECT}, or rename the field", "drop"),
    "empty-field": Rule("error", "a field is empty", _CORRECT, "drop"),
    "not-text": Rule("error", "a field that should hold text", _CORRECT, "drop"),
    "bad-text": Rule(
        "error", "text that no tokenizer takes", "Remove the lone surrogate (half of a character)", "drop"
    ),
    "not-text-content": Rule(
        "error", "a turn with an image, audio or a tool call", f"{_CORRECT}: turns hold text", "drop"
    ),
    "bad-role": Rule("error", "a role that is not known", "Use system, user, assistant or tool", "drop"),
    "turn-order": Rule(
        "error", "turns in a wrong order", "At most one system turn, then user and assistant in turn", "drop"
    ),
    "different-prompts": Rule(
        "error", "answers to different conversations", "Give both answers the same turns before them", "drop"
    ),
    "bad-label": Rule("error", "a label that says neither good nor bad", "Use true or false", "drop"),
    "wrong-kind": Rule(
        "error", "a row that the training strategy cannot use", "Use another training_strategy, or another file", "drop"
    ),
    "same-answers": Rule("error", "chosen and rejected are the same", f"{_CORRECT}: it teaches nothing", "drop"),
    # The text of a row.
    "nearly-same-answers": Rule(
        "warning",
        "chosen and rejected differ in case, spaces or punctuation alone",
        "Check that this is what they shall teach",
    ),
    "template-residue": Rule(
        "warning", "a chat template's own marks in the text", "Remove them: the template puts its own", "clean"
    ),
    "damaged-text": Rule(
        "warning", "the replacement character U+FFFD: text was read in a wrong encoding", "Export it anew"
    ),
    "unread-tools": Rule(
        "warning", "tools are given, and not trained on", "Remove them, or keep in mind that they are left out"
    ),
    "unread-weight": Rule(
        "warning",
        "a turn with a weight, which is not read: every answer counts alike",
        "Leave out what shall not be learned",
    ),
    "unread-fields": Rule("info", "fields that are not read", "Nothing"),
    # The file as a whole.
    "duplicate": Rule(
        "warning", "a pair that is there already", "Remove it, or set its weight on purpose by repeating it", "drop"
    ),
    "swapped": Rule(
        "warning",
        "the same prompt with the answers swapped, or an answer called good and bad",
        "Decide which is better: the two rows cancel out",
    ),
    "leakage": Rule(
        "warning", "a validation prompt that is in the training data", "`palate data split` keeps them apart"
    ),
    "near-leakage": Rule(
        "warning", "a validation prompt that is nearly in the training data", "`palate data split` keeps them apart"
    ),
    "length-bias": Rule(
        "warning",
        "length alone tells which answer is chosen",
        "Balance the lengths, or use loss_type with ld_alpha or sft mixed in",
    ),
    "outlier": Rule("info", "a row far longer than the others", "Check that it is no accident"),
    "few-rows": Rule("info", "fewer rows than DPO usually needs", "100 to 100,000 pairs are the usual range"),
    "many-rows": Rule(
        "info", "more rows than DPO usually needs", "100 to 100,000 pairs are the usual range: a good part may do"
    ),
    "personal-data": Rule("info", "what looks like personal data", "Check that it may be trained on"),
    "language": Rule("info", "the languages that the text seems to be in", "Check that the base model speaks them"),
    # With a tokenizer.
    "no-room": Rule(
        "warning", "the prompt alone fills seq_length", "Raise seq_length, or shorten the prompt: the row is left out"
    ),
    "same-after-cut": Rule(
        "warning", "chosen and rejected are the same once cut", "Raise seq_length: the row is left out"
    ),
    "same-tokens": Rule("warning", "chosen and rejected are the same tokens once rendered", "The row is left out"),
    "cut": Rule("warning", "the end of an answer is cut off", "Raise seq_length"),
}
"""Every rule by its code."""

"""Every check of preference data: row by row while files stream by, then the whole. Knows rows and rules, no tokenizer.

Memory is bounded: a row leaves three hashes and three lengths behind (about 50 bytes), nothing else.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from itertools import chain, islice, repeat
from operator import eq
from pathlib import Path
from typing import Any

from palate_recipes.data import hints
from palate_recipes.data.containers import Container, open_container
from palate_recipes.data.formats import KNOWN_FIELDS, Format, detect, read_row
from palate_recipes.data.near import NearIndex
from palate_recipes.data.report import Place, Report
from palate_recipes.data.rows import Row, RowFaults, Strategy
from palate_recipes.data.shapes import OTHER_PROMPTS, listed

FEW_ROWS, MANY_ROWS = 100, 100_000
"""Between them DPO usually works; published guidance of several platforms."""

WRONG_KEPT = 10_000
HISTOGRAM_STEPS = 24

_LENGTH_BIAS, _BIAS_ROWS = 0.7, 50
_OUTLIER, _OUTLIER_CHARACTERS = 20, 4000

_BLOCK_ROWS = 256
_NEARLY = 8
"""Characters by which answers may differ in length that differ in punctuation alone."""

_SAMPLE_ALL, _SAMPLE_EVERY = 500, 1000
"""Guesses are made on the first rows, then on one in so many."""

MARKS = re.compile(
    r"<\|(?:im_start|im_end|im_sep|eot_id|start_header_id|end_header_id|begin_of_text|end_of_text|endoftext|user|assistant|system"
    r"|end|eom_id|END_OF_TURN_TOKEN|START_OF_TURN_TOKEN)\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|</s>\Z"
)
"""What chat templates put between turns (ChatML, Llama 2 and 3, Mistral, Gemma, Phi, Zephyr, Command R)."""


class Linter:
    """Reads files one after the other and gathers what is wrong with them.

    Args:
        strategy: What the rows are for; None takes pairs, unpaired rows and answers alike.
        format: Of the rows; each row's own fields decide when None.
        against: Prompts of the validation data, to find the training rows that repeat them.

    Attributes:
        report: What was found so far.
        prompts: Those of the files that were read with `index_prompts`.
        wrong: File, number and fault of the first WRONG_KEPT rows that cannot be used.
        wrong_rows: How many those are in all.
    """

    def __init__(
        self, strategy: Strategy | None = "dpo", *, format: Format | None = None, against: NearIndex | None = None
    ) -> None:
        self.report = Report([], strategy or "any")
        self.prompts = NearIndex()
        self.wrong: list[tuple[str, int, str]] = []
        self.wrong_rows = 0
        self._strategy, self._format, self._against = strategy, format, against
        self._starts: list[tuple[int, str, str]] = []  # first index of each file, its name, its unit
        self._facts = array("q")  # (rows, 3): number, hash of the pair, hash of the pair with its answers swapped
        self._sizes = array("I")  # (rows, 3): characters of prompt, chosen, rejected
        self._count = 0
        self._keep_fact, self._keep_size = self._facts.append, self._sizes.append
        self._unread: Counter[str] = Counter()
        self._tools = 0
        self._languages: Counter[str] = Counter()

    def read(self, file: str | Path | Container, *, name: str | None = None, index_prompts: bool = False) -> None:
        """Checks every row of a file.

        Args:
            file: Its path, or what is known of it already.
            name: What it is called in places; its path when None.
            index_prompts: Keep its prompts in `prompts`, for a check of other files against them.

        Raises:
            DataError: It cannot be read at all.
        """
        container = file if isinstance(file, Container) else open_container(file)
        name = name or str(container.path)
        report, unit = self.report, container.unit
        self._begin(name, unit)
        if container.byte_order_mark:
            report.add("byte-order-mark", Place(name, 0, unit, "", "begins with a byte-order mark"))
        total = 0
        # Rows of one file mostly have the same fields: they are compared with the last row's, and counted by runs.
        shapes: Counter[tuple[str, ...]] = Counter()
        shape: tuple[str, ...] = ("",)
        run = 0
        plain = self._against is None and not index_prompts and self._format is None and self._strategy in ("dpo", None)
        rows = container.raw_rows()
        while block := list(islice(rows, _BLOCK_ROWS)):
            if plain and (fields := self._take_plain(block, name, unit)):
                total += len(block)
                shapes[fields] += len(block)
                continue
            for number, value in block:
                total += 1
                try:
                    form = self._format or detect(value, self._strategy) if type(value) is dict else None
                    row = read_row(value, number, strategy=self._strategy, format=form)
                except RowFaults as error:
                    self._note_wrong(error, number, name, unit)
                    continue
                fields = (form.name, *value)  # type: ignore[union-attr]
                if fields != shape:
                    shapes[shape] += run
                    shape, run = fields, 0
                run += 1
                if "input" in value or "tools" in value or "functions" in value:
                    self._tools += _gives_tools(value)
                self._look(row, name, unit)
                if index_prompts:
                    self.prompts.add(row, Place(name, number, unit, "", ""))
        if not total and container.span is None:
            report.add("no-rows", Place(name, 0, unit, "", "no row is in it"))
        shapes[shape] += run
        report.rows += total
        report.usable += shapes.total()
        for (form_name, *names), count in shapes.items():
            if count:
                report.formats[form_name] = report.formats.get(form_name, 0) + count
                self._unread.update({field: count for field in names if field not in KNOWN_FIELDS})

    def join(self, part: Linter) -> None:
        """Takes over what another linter found in the next part of a file, or in the next file; hashes must be of one seed."""
        for start, name, unit in part._starts:
            self._begin(name, unit, self._count + start)
        self._facts.extend(part._facts)
        self._sizes.extend(part._sizes)
        self._count += part._count
        self._tools += part._tools
        self._unread.update(part._unread)
        self._languages.update(part._languages)
        self.wrong += part.wrong[: WRONG_KEPT - len(self.wrong)]
        self.wrong_rows += part.wrong_rows
        self.report.take(part.report)

    def _begin(self, name: str, unit: str, start: int | None = None) -> None:
        if not self._starts or self._starts[-1][1] != name:
            self.report.files.append(name)
            self._starts.append((self._count if start is None else start, name, unit))

    def __getstate__(self) -> dict[str, Any]:
        """What goes back from a helper: findings, not the index that it compared with."""
        return self.__dict__ | {"_against": None, "_keep_fact": None, "_keep_size": None}

    def _note_wrong(self, error: RowFaults, number: int, name: str, unit: str) -> None:
        self.wrong_rows += 1
        if len(self.wrong) < WRONG_KEPT:
            self.wrong.append((name, number, f"{unit} {number}: {error}"))
        for fault in error.faults:
            self.report.add(fault.code, Place(name, number, unit, fault.field, fault.what))

    def _take_plain(self, block: list[tuple[int, Any]], name: str, unit: str) -> tuple[str, ...]:
        """Takes a block of rows of three good texts all at once, in a third of the time; returns their fields.

        Empty, with nothing taken, when any row is something else or wrong: then each is looked at by itself, with the same result.
        """
        try:
            prompts, chosen, rejected = (
                [value[field] for _, value in block] for field in ("prompt", "chosen", "rejected")
            )
        except (KeyError, TypeError):
            return ()
        texts = [*prompts, *chosen, *rejected]
        if (
            set(map(type, texts)) != {str}
            or {len(value) for _, value in block} != {3}
            or not all(map(str.strip, texts))
        ):
            return ()
        if any(map(eq, map(str.strip, chosen), map(str.strip, rejected))):
            return ()
        if any(map(str.startswith, prompts, repeat(OTHER_PROMPTS))):
            return ()
        whole = "".join(texts)
        try:
            whole.encode()
        except UnicodeEncodeError:
            return ()
        marked = "<" in whole or "[" in whole or not whole.isascii()
        numbers = [number for number, _ in block]
        pairs, mirrored = (
            map(hash, zip(prompts, chosen, rejected, strict=True)),
            map(hash, zip(prompts, rejected, chosen, strict=True)),
        )
        self._facts.extend(chain.from_iterable(zip(numbers, pairs, mirrored, strict=True)))
        self._sizes.extend(
            chain.from_iterable(zip(map(len, prompts), map(len, chosen), map(len, rejected), strict=True))
        )
        for number, asked, good, bad in zip(numbers, prompts, chosen, rejected, strict=True):
            if marked or abs(len(good) - len(bad)) < _NEARLY:
                self._remark(number, asked, good, bad, name, unit)
            self._count += 1
            if self._count <= _SAMPLE_ALL or not self._count % _SAMPLE_EVERY:
                self._guess(number, asked, good, bad, name, unit)
        return ("pai", *block[0][1])

    def _look(self, row: Row, name: str, unit: str) -> None:
        number, prompt, chosen, rejected = row
        chosen, rejected = chosen or "", rejected or ""
        asked = prompt[0].content if len(prompt) == 1 else "\n".join([turn.content for turn in prompt])
        self._remark(number, asked, chosen, rejected, name, unit)
        keep = self._keep_fact
        keep(number)
        keep(hash((asked, chosen, rejected)))
        keep(hash((asked, rejected, chosen)))
        keep = self._keep_size
        keep(len(asked))
        keep(len(chosen))
        keep(len(rejected))
        self._count += 1
        if self._count <= _SAMPLE_ALL or not self._count % _SAMPLE_EVERY:
            self._guess(number, asked, chosen, rejected, name, unit)
        if self._against is not None:
            self._compare(row, name, unit)

    def _remark(self, number: int, asked: str, chosen: str, rejected: str, name: str, unit: str) -> None:
        whole = asked + chosen + rejected
        if "<" in whole or "[" in whole or not whole.isascii():
            self._look_closely(number, (("prompt", asked), ("chosen", chosen), ("rejected", rejected)), name, unit)
        if abs(len(chosen) - len(rejected)) < _NEARLY and chosen and rejected and same_words(chosen, rejected):
            what = "`chosen` and `rejected` differ in case, spaces or punctuation alone"
            self.report.add("nearly-same-answers", Place(name, number, unit, "rejected", what))

    def _look_closely(self, number: int, texts: tuple[tuple[str, str], ...], name: str, unit: str) -> None:
        for field, text in texts:
            if ("<" in text or "[" in text) and (found := MARKS.search(text)):
                what = f"`{field}` holds {found.group()!r}"
                self.report.add("template-residue", Place(name, number, unit, field, what))
            if "\ufffd" in text:
                self.report.add("damaged-text", Place(name, number, unit, field, f"`{field}` holds U+FFFD"))

    def _guess(self, number: int, asked: str, chosen: str, rejected: str, name: str, unit: str) -> None:
        self._languages[hints.language(f"{asked} {chosen or rejected}")] += 1
        for field, text in (("prompt", asked), ("chosen", chosen), ("rejected", rejected)):
            if text and (found := hints.personal_data(text)):
                place = Place(name, number, unit, field, f"`{field}` seems to hold {found}")
                self.report.add("personal-data", place)

    def _compare(self, row: Row, name: str, unit: str) -> None:
        found = self._against.find(row) if self._against else None
        if found is not None:
            same, place = found
            what = f"the prompt is {'also' if same else 'nearly that'} in {place.file}, {place.unit} {place.row}"
            self.report.add("leakage" if same else "near-leakage", Place(name, row.number, unit, "prompt", what))

    # The whole.

    def finish(self) -> Report:
        """Adds what only all rows together tell, and returns the report."""
        report = self.report
        self._judge_fields()
        if len(report.formats) > 1:
            shapes = ", ".join(f"{count} {name}" for name, count in report.formats.items())
            report.add(
                "mixed-formats", Place(", ".join(report.files), 0, "row", "", f"rows of several formats: {shapes}")
            )
        if not self._count:
            return report
        self._find_repeats()
        self._judge_lengths()
        self._judge_count()
        total = self._languages.total()
        known = {name: count for name, count in self._languages.most_common(5) if name and count * 100 >= total}
        if known:
            shares = ", ".join(f"{name} {count / total:.0%}" for name, count in known.items())
            report.add("language", Place(report.files[0], 0, "row", "", f"seems to be in {shares} (of {total:,} rows)"))
        return report

    def _judge_fields(self) -> None:
        unread = [field for field in self._unread if field not in ("tools", "functions")]
        tools = self._tools
        for code, what in (
            ("unread-tools", f"`tools` in {tools:,} rows" if tools else ""),
            ("unread-fields", f"not read: {listed(unread, most=12)}" if unread else ""),
        ):
            if what:
                self.report.add(code, Place(self.report.files[0], 0, "row", "", what))

    def _find_repeats(self) -> None:
        import numpy as np

        facts = np.frombuffer(self._facts, dtype=np.int64).reshape(-1, 3)
        pairs, swapped = facts[:, 1], facts[:, 2]
        order = np.argsort(pairs, kind="stable")  # rows of one hash stay in file order
        ordered = pairs[order]
        again = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
        repeats = np.sort(order[again])
        self._add(
            "duplicate", repeats, lambda index: f"the same pair as {self._where(self._first(order, ordered, index))}"
        )
        if any(
            self.report.formats.get(name)
            for name in ("unpaired", "chat", "completions", "instructions", "sharegpt-sft")
        ):
            return
        at = np.searchsorted(ordered, swapped)
        at[at == len(ordered)] = 0
        mirrored = np.flatnonzero(ordered[at] == swapped)
        later = mirrored[mirrored > order[at[mirrored]]]
        self._add(
            "swapped", later, lambda index: f"the same as {self._where(int(order[at[index]]))}, the answers swapped"
        )

    def _first(self, order: Any, ordered: Any, index: int) -> int:
        return int(order[ordered.searchsorted(self._facts[3 * index + 1])])

    def _add(self, code: str, indexes: Any, what: Any) -> None:
        for index in indexes[:8].tolist():
            name, unit = self._file(index)
            self.report.add(code, Place(name, self._facts[3 * index], unit, "", what(index)))
        if len(indexes) > 8:
            self.report.findings[code].count += len(indexes) - 8

    def _file(self, index: int) -> tuple[str, str]:
        return next((name, unit) for start, name, unit in reversed(self._starts) if start <= index)

    def _where(self, index: int) -> str:
        name, unit = self._file(index)
        return f"{unit} {self._facts[3 * index]}" + (f" of {name}" if len(self._starts) > 1 else "")

    def _judge_lengths(self) -> None:
        import numpy as np

        prompt, chosen, rejected = np.frombuffer(self._sizes, dtype=np.uint32).reshape(-1, 3).T
        for name, lengths in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
            if lengths.any():
                self.report.lengths[name] = percentiles(lengths)
                self.report.histograms[name] = histogram(lengths)
        paired = (chosen > 0) & (rejected > 0) & (chosen != rejected)
        count = int(paired.sum())
        if count:
            share = float((chosen > rejected)[paired].mean())
            self.report.longer_wins = round(share, 4)
            if count >= _BIAS_ROWS and not 1 - _LENGTH_BIAS < share < _LENGTH_BIAS:
                side = "longer" if share > 0.5 else "shorter"
                what = f"the {side} answer is the chosen one in {max(share, 1 - share):.0%} of {count:,} pairs"
                self.report.add("length-bias", Place(self.report.files[0], 0, "row", "", what))
        total = prompt.astype(np.int64) + np.maximum(chosen, rejected)
        middle = float(np.median(total))
        far = np.flatnonzero(total > max(_OUTLIER * middle, _OUTLIER_CHARACTERS))
        self._add("outlier", far, lambda index: f"{total[index]:,} characters, the median is {middle:,.0f}")

    def _judge_count(self) -> None:
        rows, files = self.report.usable, ", ".join(self.report.files)
        for code, odd in (("few-rows", rows < FEW_ROWS), ("many-rows", rows > MANY_ROWS)):
            if odd:
                self.report.add(code, Place(files, 0, "row", "", f"{rows:,} {'row' if rows == 1 else 'rows'}"))


def _gives_tools(row: dict[str, Any]) -> bool:
    """Whether a row has tools, which many exports write as an empty list; OpenAI's preference format has them in `input`."""
    inner = row.get("input")
    return bool(row.get("tools") or row.get("functions") or (type(inner) is dict and inner.get("tools")))


def same_words(one: str, other: str) -> bool:
    """Whether two texts differ in case, spaces or punctuation alone."""
    return normal(one) == normal(other)


def normal(text: str) -> str:
    """Returns the letters and digits of a text, in lower case, words apart by one space."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def percentiles(lengths: Any) -> dict[str, int]:
    """Returns mean, 50th, 95th and 99th percentile and maximum of an array of lengths."""
    import numpy as np

    p50, p95, p99 = np.percentile(lengths, (50, 95, 99))
    return {
        "mean": round(float(lengths.mean())),
        "p50": round(p50),
        "p95": round(p95),
        "p99": round(p99),
        "max": int(lengths.max()),
    }


def histogram(lengths: Any) -> list[int]:
    """Returns how many lengths are in each of HISTOGRAM_STEPS equal steps from 0 to the 99th percentile."""
    import numpy as np

    top = max(1, int(np.percentile(lengths, 99)))
    return [int(count) for count in np.histogram(lengths, bins=HISTOGRAM_STEPS, range=(0, top))[0]]

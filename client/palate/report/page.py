"""A report as one HTML document. Knows facts and figures, no store.

Everything shown may come from a store or a data file, so every text is escaped, and the policy of the page (CSP) allows two scripts by
their digests and no request. A text that got past the escaping would still not run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
import zlib
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from palate.comparison import figures_of
from palate.report.charts import figures, plotly_js
from palate.report.gather import Answers, ChannelFacts, JobFacts, reproduce
from palate_recipes import __version__
from palate_recipes.hyperparameters import HYPERPARAMETERS, differences, incomparable_losses
from palate_recipes.preferences.report import RULES
from palate_recipes.schema import show
from palate_recipes.specs.events import duration
from palate_recipes.text import html_text, without_secrets

_LENGTHS = {"mean": "mean", "p50": "median", "p95": "95%", "max": "longest"}


def render(title: str, jobs: Sequence[JobFacts], answers: Answers | None) -> str:
    """Returns the document.

    Args:
        title: Its heading.
        jobs: One job, or several to compare.
        answers: Answers that belong to none of them, such as the quickstart's.
    """
    page = _Page(jobs)
    drawn = figures([(page.hidden(job.name), job.events) for job in jobs])
    parts = [page.figures(jobs[0]) if len(jobs) == 1 else page.comparison(jobs)]
    if len(jobs) == 1:
        parts.append(page.reading(jobs[0]))
    parts.append(_chart_section([name for name, _ in drawn]))
    if answers is not None:
        parts += ["<h2>Answers</h2>", page.answers(answers)]
    for at, job in enumerate(jobs):
        if len(jobs) > 1:
            parts += [f'<h2 id="job-{at}">{page.text(job.name)}</h2>', page.figures(job), page.reading(job)]
        parts.append(page.details(job, "h2" if len(jobs) == 1 else "h3"))
    subtitle = f"Palate {__version__}, {time.strftime('%Y-%m-%d %H:%M %Z')}"
    (library, digest), script = _library(), _resource("page.js")
    policy = (
        f"default-src 'none'; script-src {digest} {_digest(script)}; style-src 'unsafe-inline';"
        " img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="referrer" content="no-referrer">',
            f"<title>{page.text(title)}</title>",
            f"<style>{_resource('page.css')}</style></head><body>",
            f"<header><h1>{page.text(title)}</h1><small>{page.text(subtitle)}</small></header>",
            "<main>",
            *parts,
            "</main>",
            # Data, not scripts: a browser runs neither.
            f'<script type="application/json" id="figures">{_json([figure for _, figure in drawn])}</script>',
            f'<script type="text/plain" id="plotly-packed">{library}</script>',
            f"<script>{script}</script>",
            "</body></html>",
            "",
        ]
    )


def _resource(name: str) -> str:
    return (files("palate.report") / name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


@cache
def _library() -> tuple[str, str]:
    """Returns plotly.js compressed, as text (2 MB instead of 5), and its digest. Kept: compressing takes half a second."""
    script = plotly_js()
    return base64.b64encode(zlib.compress(script.encode(), 9)).decode(), _digest(script)


def _json(value: Any) -> str:
    """Returns JSON that cannot end the element it is in."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _chart_section(titles: Sequence[str]) -> str:
    if not titles:
        return "<h2>Curves</h2><p>No step has been logged yet.</p>"
    charts = "".join(
        f'<div class="chart"><h3>{html_text(name)}</h3><div class="plot" id="plot-{at}"></div></div>'
        for at, name in enumerate(titles)
    )
    failed = "The curves need a browser that runs scripts, of 2023 or later."
    return (
        f'<h2>Curves over optimizer steps</h2><noscript><p>{failed}</p></noscript><p id="charts-failed" hidden>{failed}</p>'
        f'<div class="charts">{charts}</div>'
    )


class _Page:
    """Parts of the document. Knows which values must not be in it.

    Args:
        jobs: The jobs of the report.
    """

    def __init__(self, jobs: Iterable[JobFacts]) -> None:
        # Records have no values of variables. A reason or a label can quote one, and this process may know it.
        self._names = {name for job in jobs for name in job.spec.environment_names}

    def hidden(self, value: object) -> str:
        """Returns a value as text without secrets."""
        return without_secrets(str(value), self._names, os.environ)

    def text(self, value: object) -> str:
        """Returns a value as HTML text without secrets."""
        return html_text(self.hidden(value))

    def table(self, rows: Iterable[Sequence[object]], head: Sequence[str] = (), *, wide: bool = False) -> str:
        body = "".join(f"<tr>{''.join(f'<td>{self.text(cell)}</td>' for cell in row)}</tr>" for row in rows)
        titles = f"<thead><tr>{''.join(f'<th>{self.text(name)}</th>' for name in head)}</tr></thead>" if head else ""
        return (
            f'<div class="card{" wide" if wide else ""}"><table>{titles}<tbody>{body}</tbody></table></div>'
            if body
            else ""
        )

    # ── what came out ───────────────────────────────────────────────────────────────────────────────────────────────

    def figures(self, job: JobFacts) -> str:
        state = f"<div><small>state</small><b>{self.text(job.status.state)}</b></div>"
        return f'<div class="figures">{state}{"".join(self._figure(*pair) for pair in _results(job))}</div>'

    def _figure(self, name: str, value: str) -> str:
        return f"<div><small>{self.text(name)}</small><b>{self.text(value)}</b></div>"

    def reading(self, job: JobFacts) -> str:
        reason = f"<p>{self.text(job.status.reason)}</p>" if job.status.reason else ""
        words = f"<b>{self.text(job.reading.verdict)}.</b> {self.text(job.reading.text)}"
        return f'<div class="card verdict">{words}{reason}</div>'

    def comparison(self, jobs: Sequence[JobFacts]) -> str:
        """A table of what came out, and one of the settings and data that differ."""
        results = [dict(_results(job)) for job in jobs]
        names = list(dict.fromkeys(name for found in results for name in found))
        head = "".join(f"<th>{self.text(name)}</th>" for name in ("job", "state", *names, "reading"))
        body = ""
        for at, (job, found) in enumerate(zip(jobs, results, strict=True)):
            cells = (job.status.state, *(found.get(name, "") for name in names), job.reading.verdict)
            row = "".join(f"<td>{self.text(cell)}</td>" for cell in cells)
            body += f'<tr><td><a href="#job-{at}">{self.text(job.name)}</a></td>{row}</tr>'
        columns = [_comparable(job) for job in jobs]
        differing = [
            (name, *(column.get(name, "") for column in columns))
            for name in dict.fromkeys(name for column in columns for name in column)
            if len({column.get(name, "") for column in columns}) > 1
        ]
        losses = incomparable_losses(
            [{name: getattr(job.spec.hyperparameters, name) for name in HYPERPARAMETERS} for job in jobs]
        )
        remark = f'<p class="soft">{self.text(f"The {losses}.")}</p>' if losses else ""
        table = self.table(differing, ("", *(job.name for job in jobs)), wide=True)
        return (
            f'<h2>Results</h2><div class="card wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{remark}'
            f"<h2>What differs</h2>{remark}{table or '<p>Nothing: model, data, settings and precision are the same.</p>'}"
        )

    def answers(self, answers: Answers) -> str:
        rows = []
        for question, texts in answers.rows:
            columns = "".join(
                f'<div><small>{self.text(model)}</small><div class="text">{self.text(text)}</div></div>'
                for model, text in zip(answers.models, texts, strict=True)
            )
            rows.append(
                f'<div class="card"><b class="text">{self.text(question)}</b><div class="models">{columns}</div></div>'
            )
        more = (
            f'<p class="soft">{answers.left_out:,} further questions are in the file.</p>' if answers.left_out else ""
        )
        title, figures = f'<p class="soft">{self.text(answers.title)}</p>', self.table(answers.facts)
        return f'{title}{figures}<div class="answers">{"".join(rows)}</div>{more}'

    # ── what went in ────────────────────────────────────────────────────────────────────────────────────────────────

    def details(self, job: JobFacts, heading: str) -> str:
        """Answers, data, settings, environment, how to reproduce it, notes."""
        sections = [
            ("Evaluations", "".join(self.answers(found) for found in job.answers)),
            ("Data", "".join(self.channel(channel) for channel in job.channels)),
            ("Settings", self.settings(job)),
            ("Environment", self.table(_environment(job))),
            ("How to reproduce it", self.reproduction(job)),
            ("Notes", self.notes(job)),
        ]
        return "".join(
            f"<section><{heading}>{name}</{heading}>{content}</section>" for name, content in sections if content
        )

    def channel(self, channel: ChannelFacts) -> str:
        given, report = channel.given, channel.checked
        rows: list[tuple[str, object]] = [("file", given.origin or given.uri)]
        if given.rows is not None:
            skipped = f", {len(given.skipped_rows):,} skipped" if given.skipped_rows else ""
            rows.append(("rows", f"{given.rows:,}{skipped}"))
        if report is not None:
            rows.append(("formats", ", ".join(f"{name} ({count:,})" for name, count in report.formats.items())))
        if given.bytes is not None:
            rows.append(("size", f"{given.bytes:,} bytes"))
        if given.revision:
            rows.append(("revision", given.revision))
        if given.sha256:
            rows.append(("SHA-256", given.sha256))
        if channel.remark:
            rows.append(("remark", channel.remark))
        parts = [f"<h3>{self.text(channel.name)}</h3>", self.table(rows)]
        if report is not None:
            lengths = [
                (name, *(f"{found.get(key, 0):,}" for key in _LENGTHS)) for name, found in report.lengths.items()
            ]
            parts.append(self.table(lengths, ("characters", *_LENGTHS.values())))
            findings = [
                (found.title, f"{found.count:,}", RULES[found.code].meaning, "\n".join(found.place_lines()))
                for found in report.of("error", "warning", "info")
            ]
            parts.append(self.table(findings, ("finding", "count", "meaning", "places"), wide=True))
        return "".join(parts)

    def settings(self, job: JobFacts) -> str:
        """All hyperparameters, those that differ from the defaults first and in bold."""
        changed = {name for name, _, _ in differences(job.spec.hyperparameters)}
        rows = ""
        for name in sorted(HYPERPARAMETERS, key=lambda name: name not in changed):
            row, value = HYPERPARAMETERS[name], getattr(job.spec.hyperparameters, name)
            cells = (name, show(value), show(row.default) if name in changed else "")
            mark = ' class="changed"' if name in changed else ""
            rows += f"<tr{mark}>{''.join(f'<td>{self.text(cell)}</td>' for cell in cells)}</tr>"
        head = "<tr><th>hyperparameter</th><th>value</th><th>default, if it differs</th></tr>"
        return f'<div class="card"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'

    def reproduction(self, job: JobFacts) -> str:
        code, command = (self.text(text) for text in reproduce(job))
        remark = "A store keeps a job's data until the job is deleted. SHA-256 digests are under Data."
        blocks = [f'<div class="card"><pre>{text}</pre></div>' for text in (code, command)]
        return f'{blocks[0]}<p class="soft">or</p>{blocks[1]}<p class="soft">{remark}</p>'

    def notes(self, job: JobFacts) -> str:
        told = job.last("start").get("notes")
        found = [*job.spec.notes, *(told if isinstance(told, list) else [])]
        return (
            "".join(["<ul>", *(f"<li>{self.text(note)}</li>" for note in dict.fromkeys(map(str, found))), "</ul>"])
            if found
            else ""
        )


def _results(job: JobFacts) -> list[tuple[str, str]]:
    """Returns the figures of a run that readers compare."""
    end, train, held_out = job.last("end"), job.last("train"), figures_of(job.events)
    found = [
        ("training loss", _number(end.get("final_loss", train.get("loss")), ".3f")),
        ("validation loss", _number(held_out.get("eval_loss"), ".3f")),
        ("validation accuracy", _number(held_out.get("eval_rewards/accuracies"), ".0%")),
        ("validation margin", _number(held_out.get("eval_rewards/margins"), ".2f")),
        ("steps", _number(train.get("step"), ",")),
        ("time", duration(end["seconds"]) if _number(end.get("seconds"), "g") else ""),
        ("tokens/s", _number(end.get("tokens_per_s"), ",.0f")),
        ("peak memory", _number(end.get("memory_gb"), ".1f", " GB")),
    ]
    return [(name, value) for name, value in found if value]


def _number(value: Any, form: str, unit: str = "") -> str:
    return f"{value:{form}}{unit}" if isinstance(value, int | float) and not isinstance(value, bool) else ""


def _comparable(job: JobFacts) -> dict[str, str]:
    """Returns what may differ between two jobs, by name."""
    spec = job.spec
    data = {name: given.sha256 or given.uri for name, given in spec.inputs.items()}
    return {
        "base model": spec.model.name,
        "method": spec.method,
        **{name: show(getattr(spec.hyperparameters, name)) for name in HYPERPARAMETERS},
        **{f"{name} data": f"{digest[:12]} ({spec.inputs[name].rows} rows)" for name, digest in data.items()},
        "device": str(job.last("start").get("device", "")),
        **{f"version of {name}": version for name, version in _versions(job).items()},
    }


def _versions(job: JobFacts) -> dict[str, str]:
    told = job.status.details.get("versions")
    return {**job.manifest.versions, **({k: str(v) for k, v in told.items()} if isinstance(told, dict) else {})}


def _environment(job: JobFacts) -> list[tuple[str, object]]:
    manifest, status, spec, start = job.manifest, job.status, job.spec, job.last("start")
    source = spec.model.source
    trained, total = start.get("trainable_parameters"), start.get("total_parameters")
    rows: list[tuple[str, object]] = [
        ("record", job.uri),
        ("base model", f"{spec.model.name}, from {source.kind} {source.location}"),
        ("revision", status.details.get("model_revision") or source.revision),
        ("training", f"{spec.hyperparameters.training_strategy}, {spec.method}, {spec.precision}"),
        ("trained parameters", f"{_number(trained, ',')} of {_number(total, ',')}" if trained and total else ""),
        ("device", start.get("device", "")),
        ("processes", start.get("processes", "")),
        ("backend", manifest.backend),
        ("placement", json.dumps(spec.placement) if spec.placement else ""),
        ("environment variables", ", ".join(spec.environment_names)),
        ("labels", ", ".join(f"{name}={value}" for name, value in sorted(manifest.labels.items()))),
        ("created", _moment(manifest.created_at)),
        ("ended", _moment(status.finished_at)),
        ("attempt", f"{status.attempt} of {status.last_attempt}" if status.last_attempt > 1 else ""),
        ("versions", ", ".join(f"{name} {version}" for name, version in sorted(_versions(job).items()))),
    ]
    return [(name, value) for name, value in rows if value not in ("", None)]


def _moment(seconds: float | None) -> str:
    try:
        return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(seconds))
    except (OverflowError, OSError, ValueError):  # a record may contain any number
        return f"{seconds:g} s since 1970"

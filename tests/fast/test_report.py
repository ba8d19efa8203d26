"""Reports: what they show, that they load nothing, that what a store or a data file says stays text, and that they hold no secret."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from palate import TrainingJob, compare
from palate.errors import ConfigurationError
from palate.evaluation.record import Figure
from palate.report import Report
from palate.report.gather import reproduce
from palate.runs.record import Record
from palate.store import open_store
from palate_recipes.hyperparameters import validate
from palate_recipes.specs.codec import encode
from palate_recipes.specs.train import InputFile
from tests.support.browser import Browser
from tests.support.browser import browser as running_browser
from tests.support.evaluations import compared, evaluation_record
from tests.support.manifests import train_manifest

pytest.importorskip("plotly", reason="NO PLOTLY: reports are not tested (pip install 'palate[report]')")

ATTACK = "</script></style><script>window.attacked=1</script><img src=x onerror=window.attacked=1>\x1b[2J<!--"
BOLD = '<b>x</b><a href="https://evil.example/">y</a>'
SECRET = "hf_a_secret_value"


def events(steps: int = 6, factor: float = 1.0) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"kind": "start", "step": 0, "strategy": "dpo", "total_steps": steps, "device": "CPU"}
    ]
    for step in range(1, steps + 1):
        figures = {
            "loss": 0.7 - 0.05 * step * factor,
            "rewards/margins": 0.1 * step,
            "rewards/chosen": 0.06 * step,
            "rewards/rejected": -0.04 * step,
            "rewards/accuracies": 0.5 + 0.05 * step,
            "learning_rate": 1e-4 * (1 - step / steps),
            "grad_norm": 1.0 / step,
            "tokens_per_s": 100.0 + step,
            "memory_gb": 1.5,
        }
        found.append({"kind": "train", "step": step, "total_steps": steps, **figures})
    found.append({"kind": "eval", "step": steps, "eval_loss": 0.45, "eval_rewards/accuracies": 0.75})
    return found


def make_job(
    home: Path,
    name: str,
    *,
    told: list[dict[str, Any]] | None = None,
    given_file: InputFile | None = None,
    **fields: Any,
) -> TrainingJob:
    """A job as a training leaves it, without its model."""
    record = Record(open_store(str(home / "store")), "jobs", name)
    rows = [{"prompt": f"Ask {n} {ATTACK}", "chosen": f"Yes {n}", "rejected": "No"} for n in range(4)]
    key = record.key("inputs", "train", "prefs.jsonl")
    content = "".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]).encode()
    record.store.put(key, content)
    sha256 = hashlib.sha256(content).hexdigest()
    inputs = {"train": given_file or InputFile(uri=record.store.uri(key), rows=5, sha256=sha256)}
    given = fields.pop("given", {"training_strategy": "dpo"})
    record.create(train_manifest(name, inputs=inputs, given=given, hyperparameters=given, **fields))
    record.advance("Running", expect={"Creating"})
    record.append("metrics", 1, "".join(json.dumps(event) + "\n" for event in told or events()).encode())
    return TrainingJob.get(name)


def put_evaluation(
    record: Record,
    key: str,
    *,
    prompt: Any,
    models: tuple[str, str],
    answers: tuple[str, str],
    result: str = "A",
    created_at: float = 1.0,
    **counts: int,
) -> None:
    """The files of an evaluation with one prompt."""
    figure = Figure(value=0.75, low=0.5, high=0.9)
    comparison = compared(*models, figure, wins=3, losses=1, ties=0, length_controlled=figure, **counts)
    made = evaluation_record(key, *models, comparisons=(comparison,), judge="j")
    record.store.put(record.key(f"evaluations/{key}.json"), encode(replace(made, created_at=created_at)))
    row = {"prompt": prompt, "model_a": models[0], "model_b": models[1], "answer_a": answers[0], "answer_b": answers[1]}
    lines = f'{json.dumps({**row, "result": result})}\n{{"cut off'
    record.store.put(record.key(f"evaluations/{key}.rows.jsonl"), lines.encode())


class _Elements(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def check_page(html: str) -> str:
    """Asserts that a browser would find only the page's own elements, none of which loads or acts. Returns the visible text."""
    found = _Elements(html)
    assert [attributes.get("type") for tag, attributes in found.tags if tag == "script"] == [
        "application/json",
        "text/plain",
        None,
    ]
    for tag, attributes in found.tags:
        assert tag not in ("img", "iframe", "link", "object", "embed", "base", "form", "b-attack")
        assert not any(name.startswith("on") or name in ("src", "srcset", "style") for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")
    assert "\x1b" not in html
    policy = next(a["content"] for tag, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert not re.search(r"unsafe-eval|https?:|\*", policy)
    assert "unsafe-inline" not in policy.partition("style-src")[0]
    return " ".join(found.texts)


def embedded_figures(html: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', html)
    assert found
    return list(json.loads(found[1]))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with running_browser(tmp_path_factory.mktemp("downloads")) as found:
        yield found


@pytest.fixture
def hostile(home: Path, monkeypatch: pytest.MonkeyPatch) -> TrainingJob:
    """A job whose record says hostile things in every place, and quotes a secret in some."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    told = [*events(), {"kind": "end", "step": 6, "seconds": 9.0, "final_loss": 0.4}]
    told[0] |= {"notes": [ATTACK, f"rejected {SECRET}"], "device": ATTACK, "model_name": ATTACK}
    told[1] |= {"loss": 1e308, "learning_rate": None}
    job = make_job(
        home,
        "hostile",
        told=told,
        model=ATTACK,
        labels={"a": ATTACK, "b": BOLD},
        notes=(ATTACK, "see https://user:password1@host.example/x"),
        placement={"image": ATTACK},
        environment_names=("HF_TOKEN", "WANDB_API_KEY"),
        given={"training_strategy": "dpo", "system_prompt": ATTACK},
    )
    record = job._run.record
    record.advance(
        "Failed", expect={"Running"}, reason=f"{ATTACK} token {SECRET}", details={"versions": {"trl": ATTACK}}
    )
    put_evaluation(record, "one", prompt=ATTACK, models=(ATTACK, "base"), answers=(ATTACK, BOLD))
    record.store.put(record.key("evaluations/two.json"), b"not JSON </script>")
    return job


def test_what_a_store_and_data_files_say_stays_text_and_secrets_stay_out(hostile: TrainingJob) -> None:
    report = hostile.report()
    text = check_page(report.html)
    assert text.count("window.attacked=1") > 10  # it is shown, as text
    assert "evaluation one" in text
    assert "warning[duplicate]" in text
    assert "HF_TOKEN" in text
    for secret in (SECRET, "password1"):
        assert secret not in report.html
    assert "https://***@host.example/x" in text
    assert 'sandbox="allow-scripts"' in report._repr_html_()
    assert len(_Elements(report._repr_html_()).tags) == 1


def test_a_browser_runs_nothing_of_it_and_requests_nothing(
    hostile: TrainingJob, tmp_path: Path, browser: Browser
) -> None:
    path = hostile.report().save(tmp_path / "report.html")
    page = browser.open(path.absolute().as_uri(), width=1200, height=900)
    page.wait("document.documentElement.dataset.charts === '8'")
    assert page.run("window.attacked") is None
    assert page.run("document.querySelectorAll('img, iframe, form, a').length") == 0
    assert page.requests() == [path.absolute().as_uri()]
    assert page.complaints() == []
    # A text that got past the escaping would not run either.
    page.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.attacked=1\">')")
    script = "(() => { const s = document.createElement('script'); s.textContent = 'window.attacked=1'; document.body.append(s) })()"
    page.run(script)
    assert page.run("window.attacked") is None


def test_charts_zoom_together_fit_a_phone_and_are_whole_in_print(home: Path, tmp_path: Path, browser: Browser) -> None:
    one, other = make_job(home, "one"), make_job(home, "other", told=events(factor=0.5))
    path = one.report([other]).save(tmp_path / "comparison.html")
    phone = browser.open(path.absolute().as_uri(), width=360, height=740)
    phone.wait("document.documentElement.dataset.charts")
    assert phone.run("document.documentElement.scrollWidth") == 360
    inside = "[...document.querySelectorAll('.plot .main-svg')].every(svg => svg.getBoundingClientRect().right <= {})"
    assert phone.run(inside.format(360))

    page = browser.open(path.absolute().as_uri(), width=1200, height=900)
    page.wait("document.documentElement.dataset.charts")
    page.run("document.getElementById('plot-0').scrollIntoView()")
    box = page.run(
        "(r => [r.x, r.y, r.width, r.height])(document.querySelector('#plot-0 .nsewdrag').getBoundingClientRect())"
    )
    x, y, width, height = box
    page.drag((x + 0.3 * width, y + 0.5 * height), (x + 0.7 * width, y + 0.5 * height))
    ranges = "[0, 1, 2].map(at => document.getElementById(`plot-${at}`)._fullLayout.xaxis.range.map(v => Math.round(v * 100)).join())"
    page.wait(f"new Set({ranges}).size === 1 && {ranges}[0].split(',')[1] - {ranges}[0].split(',')[0] < 300")

    page.print_as_on_paper(width=700)
    page.wait("innerWidth === 700")
    assert page.run(inside.format(700))
    cut = "box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight"
    assert page.run(f"[...document.querySelectorAll('.chart')].filter(box => {cut}).length") == 0
    assert phone.complaints() == page.complaints() == []


def test_one_job_has_a_figure_per_kind_of_metric(home: Path) -> None:
    html = make_job(home, "one").report().html
    charts = embedded_figures(html)
    losses = charts[0]["data"]
    assert [trace["name"] for trace in losses] == ["training", "validation"]
    assert losses[0]["x"] == [1, 2, 3, 4, 5, 6]
    assert losses[0]["y"] == pytest.approx([0.65, 0.6, 0.55, 0.5, 0.45, 0.4])
    assert losses[1]["y"] == [0.45]
    text = check_page(html)
    for words in (
        "Reward margin",
        "Learning rate",
        "Gradient norm",
        "Throughput",
        "Peak memory",
        "validation loss",
        "75%",
    ):
        assert words in text
    assert "warning[duplicate]" in text  # of the data file, which is as it was


def test_the_figures_of_a_report_are_of_the_step_that_the_model_has(home: Path) -> None:
    """As in a comparison; `load_best_model_at_end` chose the first of the two evaluations."""
    better = {"kind": "eval", "step": 3, "eval_loss": 0.321, "eval_rewards/accuracies": 0.88}
    told = [*events()[:4], better, *events()[4:], {"kind": "end", "step": 6, "seconds": 9.0, "best_step": 3}]
    job = make_job(home, "best", told=told)
    figures = compare([job]).jobs[0].figures
    assert (figures["eval_loss"], figures["eval_rewards/accuracies"]) == (0.321, 0.88)
    text = check_page(job.report().html)
    assert re.search(r"validation loss\s+0\.321\s+validation accuracy\s+88%", text)


def test_a_comparison_overlays_the_jobs_and_says_what_differs(home: Path) -> None:
    one = make_job(home, "one", given={"training_strategy": "dpo", "learning_rate": 1e-3})
    other = make_job(home, "other", given={"training_strategy": "dpo", "learning_rate": 1e-4})
    html = one.report([other]).html
    assert {trace["name"] for trace in embedded_figures(html)[0]["data"]} == {
        f"{name}, {kind}" for name in ("one", "other") for kind in ("training", "validation")
    }
    differing = html.partition("<h2>What differs</h2>")[2].partition("<h2")[0]
    assert [text for text in _Elements(differing).texts if text.strip()] == [
        "one",
        "other",
        "learning_rate",
        "0.001",
        "0.0001",
    ]
    weaker = make_job(home, "weaker", given={"training_strategy": "dpo", "dpo_beta": 0.5})
    remark = "The losses do not compare, because dpo_beta differs (0.1; 0.5)."
    assert check_page(one.report([weaker]).html).count(remark) == 2  # under Results and under What differs
    with pytest.raises(ConfigurationError, match="1 to 12 different jobs, got 2"):
        one.report([TrainingJob.get("one")])


def test_a_job_without_steps_or_with_figures_of_any_size_has_a_report(home: Path) -> None:
    check_page(make_job(home, "empty", told=[{"kind": "start", "step": 0}]).report().html)
    odd = [{"kind": "train", "step": 2**60, "loss": 1e308}, {"kind": "train", "step": 2**60 + 1, "loss": None}]
    odd += [{"kind": "end", "step": 1, "seconds": 1e300, "memory_gb": True}]
    check_page(make_job(home, "odd", told=odd).report().html)


def test_a_long_run_has_few_points_and_its_last_one(home: Path) -> None:
    told = [{"kind": "train", "step": step, "loss": 1.0} for step in range(1, 9002)]
    (trace,) = embedded_figures(make_job(home, "long", told=told).report().html)[0]["data"]
    assert len(trace["x"]) <= 2000
    assert trace["x"][-1] == 9001


def test_answers_are_side_by_side(home: Path, tmp_path: Path) -> None:
    job, path = make_job(home, "one"), tmp_path / "answers.json"
    path.write_text(json.dumps([{"question": "Flat?", "base": "Yes & no", "default": "No"}]))
    html = job.report(answers=path).html
    answers = html.partition("<h2>Answers</h2>")[2]
    assert [text for text in _Elements(answers).texts if text.strip()][:6] == [
        "answers.json", "Flat?", "base", "Yes & no", "tuned", "No",
    ]  # fmt: skip
    for content in ("[]", "{}", '[{"question": 1}]', "broken"):
        path.write_text(content)
        with pytest.raises(ConfigurationError, match=r"answers\.json"):
            job.report(answers=path)


def test_an_evaluation_has_its_figures_answers_and_verdicts(home: Path) -> None:
    job = make_job(home, "one")
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Flat?"}]
    put_evaluation(job._run.record, "e1", prompt=prompt, models=("one", "base"), answers=("No", "Yes"))
    text = check_page(job.report().html)
    interval = "75.0% (95% interval 50.0% to 90.0%)"
    assert (
        f"one against base win-rate {interval}, at equal lengths {interval}; 3 won, 1 lost and 0 tied of 4 prompts, 0 flips"
        in text
    )
    assert "system: Be brief.\nuser: Flat? one No base Yes judge one against base: prefers one" in text


def test_only_the_newest_evaluation_has_its_answers(home: Path) -> None:
    job = make_job(home, "one")
    for key, day in (("a", 3), ("c", 6), ("b", 9)):
        put_evaluation(
            job._run.record,
            key,
            prompt=f"Asked on day {day}",
            models=("one", "base"),
            answers=("No", "Yes"),
            created_at=day * 86400.0,
            flips=day,
            unreadable=1,
        )
    text = check_page(job.report().html)
    assert re.findall(r"evaluation (\w), 1970-01-(\d\d)", text) == [("b", "10"), ("c", "07"), ("a", "04")]
    assert re.findall(r"4 prompts, (\d) flips, 1 unreadable verdicts", text) == ["9", "6", "3"]
    assert re.findall(r"Asked on day \d", text) == ["Asked on day 9"]


def test_no_word_of_a_comparison_is_broken_at_a_usual_width(home: Path, tmp_path: Path, browser: Browser) -> None:
    end = {"kind": "end", "step": 6, "seconds": 4000.0, "final_loss": 0.4, "tokens_per_s": 12345.0, "memory_gb": 71.2}
    jobs = [make_job(home, f"qwen2-0.5b-instruct-dpo-2026112918{at}", told=[*events(), end]) for at in (1001, 1002)]
    for job in jobs:
        job._run.record.advance("Succeeded", expect={"Running"})
    page = browser.open(
        jobs[0].report([jobs[1]]).save(tmp_path / "two.html").absolute().as_uri(), width=1200, height=900
    )
    page.wait("document.documentElement.dataset.charts")
    # A word that is in two lines has two rectangles.
    lines = (
        "[...document.querySelectorAll('main > .wide td')].filter(cell => cell.textContent === 'Succeeded').map(cell => {"
        " const range = document.createRange(); range.selectNodeContents(cell); return range.getClientRects().length })"
    )
    assert page.run(lines) == [1, 1]


def test_the_script_of_a_report_gives_the_same_settings(home: Path) -> None:
    given = {
        "training_strategy": "dpo",
        "learning_rate": 3e-4,
        "target_modules": ["q_proj", "v_proj"],
        "gradient_checkpointing": True,
    }
    from palate.report.gather import gather

    job = make_job(home, "one", given={**given, "load_in_4bit": False})
    script, command = reproduce(gather(job))
    made: dict[str, Any] = {}

    class Recipe:
        def __init__(self, **arguments: Any) -> None:
            made.update(arguments)

        def train(self, inputs: dict[str, str]) -> Any:
            made["inputs"] = inputs
            return self

        def deploy(self) -> Any:
            return type("Predictor", (), {"endpoint": ""})

    code = script.replace("from palate import ModelTrainingRecipe", "")
    exec(compile(code, "report", "exec"), {"ModelTrainingRecipe": Recipe})
    assert made["model_uri"] == "/nowhere"
    assert made["inputs"] == {"train": job.manifest.body.inputs["train"].uri}
    wanted = {**given, "load_in_4bit": False, "precision": "float32"}
    assert validate(made["hyperparameters"], method="LoRA_LLM") == wanted
    words = command.split()
    flags = dict(words[at + 1].split("=", 1) for at, word in enumerate(words) if word == "-s")
    assert validate(flags, method="LoRA_LLM") == wanted


def test_it_is_saved_where_it_can_be(tmp_path: Path) -> None:
    report = Report(title="one", html="<p>é</p>")
    assert report.save(tmp_path / "a.html").read_text(encoding="utf-8") == "<p>é</p>"
    with pytest.raises(ConfigurationError, match="is a folder"):
        report.save(tmp_path)
    with pytest.raises(ConfigurationError, match="NUL"):
        report.save("a\0b")


ROWS = b'{"prompt": "q", "chosen": "a", "rejected": "b", "password": "c"}\n' * 2
ROWS_SHA256 = hashlib.sha256(ROWS).hexdigest()
CHANGED = "the file has changed or is another"


def data_section(job: TrainingJob) -> str:
    """What a report says of the data files, without the URI of the manifest."""
    section = job.report().html.partition("<h2>Data</h2>")[2].partition("</section>")[0]
    return section.replace(job.manifest.body.inputs["train"].uri, "URI")


def test_a_report_reads_only_the_data_that_the_manifest_has_the_digest_of(home: Path, tmp_path: Path) -> None:
    private = tmp_path / "private.jsonl"
    private.write_bytes(ROWS)
    uri, absent = private.as_uri(), (tmp_path / "absent.jsonl").as_uri()
    same = data_section(make_job(home, "same", given_file=InputFile(uri=uri, sha256=ROWS_SHA256)))
    assert "[duplicate]" in same
    other = data_section(make_job(home, "other", given_file=InputFile(uri=uri, sha256="0" * 64)))
    assert CHANGED in other
    assert "[duplicate]" not in other
    assert "password" not in other
    # Nor does it say whether there is such a file, or any folder, bucket or file that cannot be read.
    for name, hidden in (
        ("absent", absent),
        ("folder", tmp_path.as_uri()),
        ("inside", f"{uri}/x"),
        ("root", "file:///"),
    ):
        found = data_section(make_job(home, name, given_file=InputFile(uri=hidden, sha256="0" * 64)))
        assert found == other, name
    without = [
        data_section(make_job(home, name, given_file=InputFile(uri=hidden)))
        for name, hidden in (("there", uri), ("not-there", absent))
    ]
    assert without[0] == without[1]
    assert "the manifest has no SHA-256" in without[0]


@pytest.mark.parametrize("name", ["file.jsonl", "folder/private.jsonl", "../../../../private.jsonl"])
def test_a_report_reads_nothing_through_links_and_paths_out_of_the_inputs(home: Path, name: str) -> None:
    private = home / "private.jsonl"
    home.mkdir()
    private.write_bytes(ROWS)
    inputs = home / "store" / "jobs" / "one" / "inputs"
    job = make_job(home, "one", given_file=InputFile(uri=f"file://{inputs}/{name}"))
    os.symlink(private, inputs / "file.jsonl")
    os.symlink(home, inputs / "folder")
    assert (inputs / name).read_bytes() == ROWS
    text = data_section(job)
    assert "[duplicate]" not in text
    assert "the manifest has no SHA-256" in text


def test_own_inputs_without_a_digest_are_read_and_changed_ones_are_not(home: Path) -> None:
    record = Record(open_store(str(home / "store")), "jobs", "own")
    uri = record.store.uri(record.key("inputs", "train", "prefs.jsonl"))
    assert "[duplicate]" in data_section(make_job(home, "own", given_file=InputFile(uri=uri)))
    uri = uri.replace("/own/", "/changed/")
    changed = data_section(make_job(home, "changed", given_file=InputFile(uri=uri, sha256="0" * 64)))
    assert CHANGED in changed
    assert "[duplicate]" not in changed


def test_the_packed_library_is_the_one_that_the_policy_names(home: Path) -> None:
    import zlib

    html = make_job(home, "one").report().html
    found = re.search(r'id="plotly-packed">([^<]*)<', html)
    assert found
    digest = hashlib.sha256(zlib.decompress(base64.b64decode(found[1]))).digest()
    assert f"'sha256-{base64.b64encode(digest).decode()}'" in html

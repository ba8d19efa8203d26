"""HTML for notebooks: it is well formed, holds no address and no script, and shows what a store or a data file says as text."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from palate import Predictor, TrainingJob
from palate.runs.record import TOKEN_KEY, Record, events_in
from palate.store import open_store
from palate.ui import make_display
from palate.ui.notebook import NotebookDisplay, run_html
from palate_recipes.preferences.check import check
from palate_recipes.text import html_table, visible
from tests.support.html import check_html
from tests.support.manifests import serve_manifest, train_manifest

ATTACK = "</pre><script src='http://x'>alert(1)</script>\x1b[2J"


def events(steps: int = 4, validation: bool = True) -> list[dict[str, object]]:
    found: list[dict[str, object]] = [{"kind": "start", "step": 0, "strategy": "dpo", "total_steps": steps}]
    for step in range(1, steps + 1):
        loss = {"loss": 0.7 - 0.1 * step, "rewards/margins": 0.1 * step, "tokens_per_s": 100.0, "seconds_left": 9.0}
        found.append({"kind": "train", "step": step, "total_steps": steps, **loss})
        if validation:
            found.append({"kind": "eval", "step": step, "eval_loss": 0.7 - 0.05 * step})
    return found


def test_a_run_has_a_bar_a_curve_and_its_reading() -> None:
    end = {"kind": "end", "step": 4, "reading": {"verdict": "learning", "text": "It goes <down>."}}
    html = run_html("one", [*events(), end], [("state", "Succeeded")])
    root = check_html(html)
    assert root.find(".//progress").get("value") == "1.0000"  # type: ignore[union-attr]
    training, validation = root.findall(".//polyline")
    points = [tuple(map(float, point.split(","))) for point in (training.get("points") or "").split()]
    assert len(points) == 4
    assert [across for across, _ in points] == sorted(across for across, _ in points)
    assert [down for _, down in points] == sorted(down for _, down in points), "a falling loss goes down on the page"
    assert validation.get("stroke-dasharray")
    text = "".join(root.itertext())
    for words in (
        "step 4 of 4",
        "loss 0.300",
        "margin +0.40",
        "100 tokens/s",
        "learning.",
        "It goes <down>.",
        "Succeeded",
    ):
        assert words in text


def test_a_run_without_events_is_its_name() -> None:
    root = check_html(run_html("one", []))
    assert "".join(root.itertext()) == "one"
    assert root.find(".//svg") is None


def test_a_flat_loss_and_one_point_are_shown() -> None:
    flat = [{**event, **({"loss": 0.5} if event["kind"] == "train" else {})} for event in events(validation=False)]
    assert len(check_html(run_html("one", flat)).findall(".//polyline")) == 1
    assert check_html(run_html("one", events(1, validation=False))).find(".//svg") is None


def test_a_curve_of_any_numbers_is_drawn_inside_its_box() -> None:
    for steps, losses in (
        ((0, 0, 0), (0.7, 0.6, 0.5)),
        ((-5, 1, 2), (0.7, 0.6, 0.5)),
        ((1, 2, 2**63 - 1), (1.7e308, -1.7e308, 0.0)),
    ):
        lines = [
            json.dumps({"kind": "train", "step": step, "loss": loss, "total_steps": -5})
            for step, loss in zip(steps, losses, strict=True)
        ]
        found = list(events_in("\n".join(lines).encode()))
        assert len(found) == 3
        (curve,) = check_html(run_html("one", found)).findall(".//polyline")
        points = [tuple(map(float, point.split(","))) for point in (curve.get("points") or "").split()]
        assert all(0 <= across <= 480 and 0 <= down <= 120 for across, down in points), points


def test_of_a_progress_bar_in_the_log_the_last_state_is_shown() -> None:
    display = NotebookDisplay("one")
    display.log("loading\nfiles:   0%\rfiles:  50%\rfiles: 100%\n")
    (log,) = check_html(display._html()).findall(".//pre")
    assert log.text == "loading\nfiles: 100%"


def test_without_ipython_a_run_is_shown_as_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ({}, {"IPython": None}):  # not imported, and blocked as `sys.modules` can
        for name, value in module.items():
            monkeypatch.setitem(sys.modules, name, value)
        with make_display(True, "one") as display:
            display.log("loading\n")
            display.flush()
        assert capsys.readouterr().err == "loading\n"


def test_text_is_escaped_in_linear_time() -> None:
    long = "a" * 2_000_000
    assert visible(long + "\r") == long + "\\r"
    assert visible("\r" * 200_000) == "\\r" * 200_000
    assert visible(f"{long}\r{long}\r1%\r\r2%\r\n\rnext\r\r\nlast\r") == "2%\nnext\\r\nlast\\r"
    assert html_table([("\ud800", 1)]).count("\\ud800") == 1


def test_a_report_shows_what_the_command_prints(tmp_path: Path) -> None:
    rows = [{"prompt": f"Ask {n}", "chosen": "Yes, it is.", "rejected": "No."} for n in range(8)]
    path = tmp_path / "prefs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *rows, {"prompt": "Ask", "chosen": "Yes"}]))
    report = check([(path, "prefs.jsonl")])
    root = check_html(report._repr_html_())
    summary, files, findings, lengths = root[0]
    assert summary.text == report.lines()[-1]
    assert files.text == "prefs.jsonl"
    assert [row[0].text for row in findings[1:]] == [found.title for found in report.of("error", "warning", "info")]
    (duplicate,) = [row for row in findings if row[0].text == "warning[duplicate]"]
    assert duplicate[1].text == "8"
    places = (duplicate[4].text or "").splitlines()
    assert len(places) == 6
    assert places[0] == "prefs.jsonl, line 9: the same pair as line 1"
    assert places[5] == "and 3 more"
    assert [cell.text for cell in lengths[2]] == ["chosen", "characters", "11", "11", "11", "11", "11"]


def test_what_a_data_file_says_is_text(tmp_path: Path) -> None:
    attack = "<script>alert(1)</script>"
    rows = [
        {"prompt": "Ask", "chosen": "Yes", "rejected": "No", attack: attack},
        {attack: "a", "<b>": "b"},
        {"messages": [{"role": attack, "content": "x"}, {"role": "assistant", "content": "y"}]},
        {"prompt": "Ask", "completion": "Yes", "label": attack},
        {"prompt": "Ask", "chosen": "Yes", "rejected": "No", "$\\href{x}{y}$": 1},
    ]
    path = tmp_path / "prefs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    html = check([(path, f"{ATTACK}.jsonl")], strategy=None)._repr_html_()
    text = "".join(check_html(html).itertext())
    for words in (
        f"it has `<b>`, `{attack}`",
        f"has the role '{attack}'",
        f"`label` is '{attack}'",
        f"not read: `$\\href{{x}}{{y}}$`, `{attack}`",
        f"{visible(ATTACK)}.jsonl, line 2",
    ):
        assert words in text, words
    assert "\x1b" not in html


def test_what_a_store_says_is_text(home: Path) -> None:
    store = open_store(str(home / "store"))
    job = Record(store, "jobs", "one")
    job.create(train_manifest("one", labels={"a": ATTACK}))
    job.advance("Failed", expect={"Creating"}, reason=ATTACK)
    end = {"kind": "end", "step": 4, "reading": {"verdict": ATTACK, "text": ATTACK}}
    job.store.put(job.key("metrics/000001.jsonl"), "\n".join(map(json.dumps, [*events(), end])).encode() + b"\n")
    html = TrainingJob.get("one")._repr_html_()
    root = check_html(html)
    assert "alert(1)" in "".join(root.itertext())
    assert "\x1b" not in html

    service = Record(store, "services", "svc")
    service.create(serve_manifest("svc", model=ATTACK))
    service.store.put(service.key(TOKEN_KEY), b"secret-token", private=True)
    html = Predictor("svc")._repr_html_()
    assert "alert(1)" in "".join(check_html(html).itertext())
    assert "secret-token" not in html


def test_figures_of_any_size_are_shown() -> None:
    for step, losses in ((0, [1.0, 2.0]), (2**62, [-1e308, 1e308]), (-7, [1e308] * 3)):
        check_html(run_html("run", [{"kind": "train", "step": step, "loss": loss} for loss in losses]))

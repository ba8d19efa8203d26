"""HTML for notebooks: it is well formed, holds no address and no script, and shows what a store says as text."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

from palate import Predictor, TrainingJob
from palate.runs.record import Record
from palate.store import open_store
from palate.ui.notebook import run_html
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


def check(html: str) -> ElementTree.Element:
    """Parses it as XML, which is stricter than a browser; asserts that nothing in it acts or loads."""
    root = ElementTree.fromstring(f"<x>{html}</x>")
    for element in root.iter():
        assert element.tag not in ("script", "img", "iframe", "link", "object", "style")
        assert not any(name.startswith("on") or name in ("href", "src") for name in element.attrib)
    return root


def test_a_run_has_a_bar_a_curve_and_its_reading() -> None:
    end = {"kind": "end", "step": 4, "reading": {"verdict": "learning", "text": "It goes <down>."}}
    html = run_html("one", [*events(), end], [("state", "Succeeded")])
    root = check(html)
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
    root = check(run_html("one", []))
    assert "".join(root.itertext()) == "one"
    assert root.find(".//svg") is None


def test_a_flat_loss_and_one_point_are_shown() -> None:
    flat = [{**event, **({"loss": 0.5} if event["kind"] == "train" else {})} for event in events(validation=False)]
    assert len(check(run_html("one", flat)).findall(".//polyline")) == 1
    assert check(run_html("one", events(1, validation=False))).find(".//svg") is None


def test_what_a_store_says_is_text(home: Path) -> None:
    store = open_store(str(home / "store"))
    job = Record(store, "jobs", "one")
    job.create(train_manifest("one", labels={"a": ATTACK}))
    job.advance("Failed", expect={"Creating"}, reason=ATTACK)
    end = {"kind": "end", "step": 4, "reading": {"verdict": ATTACK, "text": ATTACK}}
    job.store.put(job.key("metrics/000001.jsonl"), "\n".join(map(json.dumps, [*events(), end])).encode() + b"\n")
    html = TrainingJob.get("one")._repr_html_()
    root = check(html)
    assert "alert(1)" in "".join(root.itertext())
    assert "\x1b" not in html

    service = Record(store, "services", "svc")
    service.create(serve_manifest("svc", model=ATTACK))
    service.store.put(service.key("token"), b"secret-token", private=True)
    html = Predictor("svc")._repr_html_()
    assert "alert(1)" in "".join(check(html).itertext())
    assert "secret-token" not in html


def test_figures_of_any_size_are_shown() -> None:
    for step, losses in ((0, [1.0, 2.0]), (2**62, [-1e308, 1e308]), (-7, [1e308] * 3)):
        check(run_html("run", [{"kind": "train", "step": step, "loss": loss} for loss in losses]))

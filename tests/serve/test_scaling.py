"""How many engines the open requests need, over time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from palate_recipes.specs.run import Autoscaling
from palate_server.scaling import Scaler

SETTINGS = Autoscaling(max_instances=4, target_requests=2, upscale_delay_s=10, downscale_delay_s=60)


def levels(scaler: Scaler, requests: Sequence[int], *, start: float = 0.0, least: int = 1) -> list[int]:
    """Returns the level after each look; there is one every second."""
    return [
        scaler.follow(open_now, least=least, settings=SETTINGS, target=2, now=start + second)
        for second, open_now in enumerate(requests)
    ]


@pytest.mark.parametrize(("requests", "level"), [(0, 1), (2, 1), (3, 2), (4, 2), (7, 4), (1000, 4)])
def test_steady_requests_get_their_engines(requests: int, level: int) -> None:
    assert levels(Scaler(1), [requests] * 20)[-1] == level


def test_engines_come_for_the_average_within_the_delay() -> None:
    seen = levels(Scaler(1), [8, 3] * 10)  # 5.5 and 2 for each: never 4 engines, as one look alone would want
    assert seen == [1] * 10 + [3] * 10


def test_a_short_peak_starts_no_engine() -> None:
    assert set(levels(Scaler(1), ([6] * 2 + [1] * 18) * 4)) == {1}


def test_a_short_pause_ends_no_engine() -> None:
    scaler = Scaler(4)
    assert set(levels(scaler, ([0] * 50 + [8] * 12) * 4)) == {4}
    seen = levels(scaler, [3] * 90, start=248)
    assert seen[50] == 4
    assert seen[-1] == 2


def test_the_bounds_hold_at_once() -> None:
    scaler = Scaler(1)
    assert levels(scaler, [0], least=3) == [3]
    assert (
        scaler.follow(0, least=1, settings=Autoscaling(max_instances=2), target=2, now=1.0) == 2
    )  # there were 3; the lower bound waits for its delay


def test_looks_that_are_not_needed_any_more_are_forgotten() -> None:
    scaler = Scaler(1)
    levels(scaler, [1] * 1000)
    assert len(scaler._needs) <= 62
    assert len(scaler._requests) <= 12


def test_no_delay_follows_at_once() -> None:
    scaler = Scaler(1)
    settings = Autoscaling(max_instances=4, upscale_delay_s=0, downscale_delay_s=0)
    counts = [scaler.follow(n, least=1, settings=settings, target=1, now=float(n)) for n in (1, 3, 4)]
    assert counts == [1, 3, 4]
    assert scaler.follow(0, least=1, settings=settings, target=1, now=9.0) == 1

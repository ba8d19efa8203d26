"""`python -m tests.fuzz`: damaged inputs for every reader. Each must be taken, or refused by an error of Palate's, in bounded time
and memory.

An input is made from target, seed and number alone. What fails is written to a file and can be run again by its number.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any, NoReturn

DEADLINE_S = 10.0
MEMORY_BYTES = 1 << 30
_MESSAGE = 10_000
"""Characters of an error's message: it must not repeat its input."""
_FAILURES = 20


class Hang(BaseException):
    """An input took longer than its deadline."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--target", action="append", help="only this one; again for more")
    parser.add_argument("--count", type=int, default=100_000, help="inputs in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--first", type=int, default=0, help="number of the first input of each target")
    parser.add_argument("--short", action="store_true", help="leave out the targets that `make test` leaves out")
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"), help="folder (default: %(default)s)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.child:
        return _child(wanted.child, wanted.seed, wanted.first, wanted.count, wanted.failures)
    from tests.fuzz.targets import TARGETS

    names = wanted.target or [name for name, target in TARGETS.items() if target.short or not wanted.short]
    if unknown := set(names) - set(TARGETS):
        parser.error(f"unknown targets {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    shares = sum(TARGETS[name].share for name in names)
    print(f"seed {wanted.seed}, {wanted.count:,} inputs")
    failed = 0
    for name in names:
        count = round(wanted.count * TARGETS[name].share / shares)
        failed += _run(name, wanted.seed, wanted.first, count, wanted.failures)
    return 1 if failed else 0


def _run(name: str, seed: int, first: int, count: int, failures: Path) -> int:
    """Runs a target in children, a new one behind each input that ended one; prints its line, returns the failures."""
    said, refused, seconds = list[str](), Counter[str](), 0.0
    at, end = first, first + count
    while at < end and len(said) < _FAILURES:
        argv = [
            sys.executable,
            "-m",
            "tests.fuzz",
            "--child",
            name,
            "--seed",
            str(seed),
            "--failures",
            str(failures.absolute()),
        ]
        begun = time.monotonic()
        done = subprocess.run([*argv, "--first", str(at), "--count", str(end - at)], capture_output=True, text=True)
        seconds += time.monotonic() - begun
        lines = done.stdout.splitlines() or ["{}"]
        found = json.loads(lines[-1]) if done.returncode == 0 else {}
        refused.update(found.get("refused", {}))
        said += found.get("failed", [])
        if found:
            at = found["next"]
        else:  # killed by a signal, by its watchdog or for memory: the last number that it wrote is the input
            at = int((failures / f"{name}.now").read_text() or at)
            said.append(f"input {at} ended the process ({done.returncode}): {done.stderr[-800:]}")
            at += 1
    tally = ", ".join(f"{kind} {many:,}" for kind, many in refused.most_common())
    print(f"{name:16} {at - first:>7,} inputs  {seconds:6.1f} s  {len(said)} failed  {tally}", flush=True)
    for line in said:
        print(f"  FAILED {line}")
    if said:
        print(
            f"  one again: make fuzz ARGS='--target {name} --seed {seed} --first NUMBER --count 1'; inputs are in {failures}"
        )
    return len(said)


def _child(name: str, seed: int, first: int, count: int, failures: Path) -> int:
    from palate.errors import PalateError
    from tests.fuzz.targets import TARGETS

    target = TARGETS[name]
    resource.setrlimit(resource.RLIMIT_DATA, (4 * MEMORY_BYTES, 4 * MEMORY_BYTES))  # the machine is not to be harmed
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, _late)
    failures.mkdir(parents=True, exist_ok=True)
    refused, failed = Counter[str](), dict[str, str]()
    number = first
    with ExitStack() as stack, (failures / f"{name}.now").open("w") as now:
        world: dict[str, Any] = {
            "folder": Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="palate-fuzz-")))
        }
        target.start(world, stack)
        for number in range(first, first + count):
            given = target.make(Random(f"{name} {seed} {number}"), world)
            now.seek(0)
            now.write(f"{number:<12}")
            now.flush()
            signal.setitimer(signal.ITIMER_REAL, DEADLINE_S)
            faulthandler.dump_traceback_later(2 * DEADLINE_S, exit=True)  # for a hang outside Python's own code
            wrong = ""
            try:
                refused[target.call(given, world) or "accepted"] += 1
                signal.setitimer(signal.ITIMER_REAL, 0)
            except PalateError as error:
                refused[type(error).__name__] += 1
                if len(str(error)) > _MESSAGE:
                    wrong = f"a message of {len(str(error)):,} characters: {str(error)[:200]!r}"
            except (Exception, Hang) as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                wrong = f"{type(error).__name__}: {str(error)[:300]} ({Path(place.filename).name}:{place.lineno})"
                trace = traceback.format_exc(limit=-12)[-6000:]
                (failures / f"{name}-{seed}-{number}.txt").write_text(
                    f"{trace}\n{given!r}\n", errors="backslashreplace"
                )
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            if not wrong and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > MEMORY_BYTES:
                wrong = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB of memory"
                failed[wrong] = f"input {number}: {wrong}"
                break  # what was reached once stays: a new process goes on
            if wrong:
                failed.setdefault(wrong[:12] + wrong.rpartition(" (")[2], f"input {number}: {wrong}")
                if len(failed) >= _FAILURES:
                    break
        faulthandler.cancel_dump_traceback_later()
    print(json.dumps({"refused": refused, "failed": list(failed.values()), "next": number + 1}))
    return 0


def _late(signum: int, frame: object) -> NoReturn:
    raise Hang(f"more than {DEADLINE_S} s")


if __name__ == "__main__":
    sys.exit(main())

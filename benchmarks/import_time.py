"""How long the first lines of a user's script take: bare Python, `import palate`, and the recipe's import, alternating.

python benchmarks/import_time.py [rounds]
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

LINES = {
    "bare python": "pass",
    "import palate": "import palate",
    "from palate import ModelTrainingRecipe": "from palate import ModelTrainingRecipe",
}


def seconds(line: str) -> float:
    """Returns the wall time of a fresh interpreter that runs one line."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", line], check=True)
    return time.perf_counter() - begun


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    times: dict[str, list[float]] = {name: [] for name in LINES}
    for _ in range(rounds):
        for name, line in LINES.items():
            times[name].append(seconds(line))
    bare = statistics.median(times["bare python"])
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:40} {median:.3f} s   {median - bare:+.3f} s over bare   (min {min(values):.3f}, {rounds} rounds)")


if __name__ == "__main__":
    main()

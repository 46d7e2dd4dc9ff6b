"""What an import costs: each in fresh interpreters, less the interpreter's own start.

    python tests/benchmarks/bench_import.py

Wanted: `import preflab` below 0.5 s and 100 MiB.
"""

from __future__ import annotations

import subprocess
import sys
import time
from statistics import median

STATEMENTS = ("pass", "import preflab", "import preflab.envs", "import preflab.cli")
MEMORY = "\nimport resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"


def measured(statement: str, repetitions: int = 7) -> tuple[float, float]:
    """Median seconds, and MiB at the end, of an interpreter that runs `statement`."""
    seconds, mebibytes = [], 0.0
    for _ in range(repetitions):
        begin = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", statement + MEMORY], check=True, capture_output=True, text=True
        )
        seconds.append(time.perf_counter() - begin)
        mebibytes = float(done.stdout)
    return median(seconds), mebibytes


if __name__ == "__main__":
    floor, _ = measured("pass")
    for statement in STATEMENTS:
        seconds, mebibytes = measured(statement)
        print(f"{statement:<22} {1e3 * (seconds - floor):7.1f} ms more than nothing, {mebibytes:6.1f} MiB")

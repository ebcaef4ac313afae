"""How slow this machine is beside the one that the chapters' budgets are set on."""

from __future__ import annotations

import os
import subprocess
import sys
import time

#: CPU seconds of one round of `work` where the budgets are set: a core of an AMD EPYC at
#: 2 GHz, Python 3.11; 0.0471 to 0.0479 in six measurements beside four busy processes.
REFERENCE = 0.0475
ROUNDS = 3


def work() -> None:
    """What a chapter does, in small: the interpreter's loops, and products of matrices."""
    import numpy as np

    total = 0
    for number in range(400_000):
        total += number % 7
    a = np.eye(384, dtype=np.float32)
    for _ in range(30):
        a = a @ a


def seconds() -> float:
    """CPU time of the fastest round, which other processes hardly change."""
    work()  # imports numpy
    rounds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        work()
        rounds.append(time.process_time() - start)
    return min(rounds)


def slowness(settings: dict[str, str]) -> float:
    """What budgets are multiplied by here: 2 on a machine half as fast, never less than 1.

    Measured in a process of its own that sees a kernel's settings, one thread above all.
    """
    env = {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(sys.path)}
    line = [sys.executable, "-m", "handbook_src.publish.speed"]
    said = subprocess.run(line, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout
    return max(1.0, float(said) / REFERENCE)


if __name__ == "__main__":
    print(seconds())

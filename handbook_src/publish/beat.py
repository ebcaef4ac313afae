"""One line a step, which says how far the step is while it runs; standard library only."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

#: Seconds between two lines in a log; in a terminal one line is kept current.
EVERY = 30.0
CLEAR = "\r\x1b[K"


def clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


@contextlib.contextmanager
def step(label: str, far: Callable[[float], str] = lambda elapsed: "") -> Iterator[None]:
    """Say what runs, every 30 s how far it is, and at the end how long it took.

    Args:
        label: what runs.
        far: from the seconds so far: how much is done, and what remains.
    """
    terminal, start = sys.stdout.isatty(), time.monotonic()
    over, beaten = threading.Event(), threading.Event()

    def follow() -> None:
        while not over.wait(1 if terminal else EVERY):
            elapsed = time.monotonic() - start
            said = ", ".join(filter(None, [f"{label} ... {clock(elapsed)}", far(elapsed)]))
            print(f"{CLEAR}{said[:120]}" if terminal else f"\n{said}", end="", flush=True)
            beaten.set()

    print(f"{label} ...", end="", flush=True)
    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    word = "failed"
    try:
        yield
        word = clock(time.monotonic() - start)
    finally:
        over.set()
        thread.join()
        again = (CLEAR if terminal else "\n") + f"{label} ..." if beaten.is_set() else ""
        print(f"{again} {word}", flush=True)

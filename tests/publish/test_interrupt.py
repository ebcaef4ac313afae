"""Ctrl-C in a real run: children end, what was finished stays, the next run goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
from pathlib import Path
from handbook_src.publish import build

if __name__ == "__main__":
    sys.exit(build.book(Path(sys.argv[1]), build.Options(jobs=1), lambda book, strict: 0))
"""
#: Waits for as long as TINY_WAIT says, which is no part of the chapter's key.
WAITS = "import os, time\ntime.sleep(float(os.environ['TINY_WAIT']))"


def start(tiny, wait):
    settings = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1", "TINY_WAIT": str(wait)}
    settings["PYTHONSAFEPATH"] = "1"  # as the command sets it: beside the script lies the tiny book's own package
    script = tiny.write("run.py", SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(script), str(tiny.root)],
        env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )  # fmt: skip


def kernels_below(process):
    return [p for p in psutil.Process(process.pid).children(recursive=True) if "ipykernel" in " ".join(p.cmdline())]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_build_goes_on_where_it_stopped(tiny, number):
    tiny.chapter("quick", "1", budget=60)  # the longer budget is started first
    tiny.chapter("waits", WAITS, budget=50)
    process = start(tiny, 60)
    said = ""
    while "executed  quick" not in said:
        line = process.stdout.readline()
        assert line, f"the build ended early:\n{said}"
        said += line
    deadline = time.monotonic() + 30
    while not (kernels := kernels_below(process)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert kernels, "the second chapter never got a kernel"
    if number == signal.SIGINT:  # a terminal sends it to every process of the group
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    rest, _ = process.communicate(timeout=20)
    assert process.returncode == 130, rest
    assert "1 in " in rest
    assert "goes on from there" in rest
    assert "Traceback" not in rest
    assert psutil.wait_procs(kernels, timeout=5)[1] == []

    second = start(tiny, 0)
    rest, _ = second.communicate(timeout=60)
    assert second.returncode == 0, rest
    assert "2 chapters: 1 to execute" in rest

"""Make the environment stand: ``.venv``, or the active one where it has all already.

Three traps of fresh machines are stepped around: system Pythons that refuse
``pip install`` (we only install into ``.venv``, or with ``--target``), system
Pythons without ensurepip, and an install that was interrupted (a mark stands in
``.venv`` for as long as one runs; whoever finds it starts over).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from handbook_src.errors import HandbookError
from handbook_src.publish import environment
from handbook_src.publish.beat import clock, step

STAMP, MARK = "handbook-stamp", "handbook-installing"
#: Too little for any build of torch: .venv takes 2.9 GB with the CPU one, 5.9 GB with the CUDA one (measured).
DISK_BYTES = 4_000_000_000
NETWORK = re.compile(
    r"name resolution|NewConnectionError|ConnectTimeout|ReadTimeout|Max retries|Network is unreachable"
    r"|ProxyError|Connection refused|from versions: none"
)


class SetupError(HandbookError):
    """The environment could not be made; the message says what to do."""


def ensure(root: Path) -> Path:
    """The interpreter to use; installs what is missing first."""
    if not environment.missing(root):
        return Path(sys.executable)
    venv = root / ".venv"
    python = interpreter(venv)
    wanted = environment.stamp(root)
    stamp, mark = venv / STAMP, venv / MARK
    if not mark.exists():
        if stamp.exists() and stamp.read_text("utf8") == wanted and python.exists():
            return python
        if python.exists() and lacks(python, root) == []:
            stamp.write_text(wanted, "utf8")  # made by hand, or by an editor: it has all, so it is used
            return python
    reusable = python.exists() and not mark.exists() and version_of(python) == sys.version
    fill(root, venv, fresh=not reusable)
    lacking = lacks(python, root)
    if lacking:
        raise SetupError(
            "The environment",
            got=f"without {', '.join(lacking[:5])}",
            want="everything in environment.yml at its pin",
            remedy=f"Delete {venv} and run the command again.",
        )
    stamp.write_text(wanted, "utf8")
    mark.unlink()
    return python


def fill(root: Path, venv: Path, *, fresh: bool) -> None:
    """Make ``.venv`` where needed and install the list into it."""
    room(root)
    python = interpreter(venv)
    log = root / "_build" / "install.log"
    log.parent.mkdir(exist_ok=True)
    log.write_text("", "utf8")
    items = [i for i in environment.pip_items(root) if not i.startswith("-")]
    print("Making the environment in .venv. This happens once; it downloads some gigabytes.", flush=True)
    (venv / STAMP).unlink(missing_ok=True)
    if fresh:
        with step("  1/4 an empty .venv"):
            make_venv(root, venv, log)
    (venv / MARK).touch()
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    with step("  2/4 a current pip"):
        call([*pip, "--upgrade", "pip"], root, log)
    number = len(environment.pins(root))
    with step(f"  3/4 {len(items)} packages and what they need", partial(far, log, log.stat().st_size, number)):
        call([*pip, "-c", "constraints.txt", *items], root, log)
    with step("  4/4 the handbook's own package"):
        call([*pip, "--no-deps", "--no-build-isolation", "-e", "."], root, log)


def make_venv(root: Path, venv: Path, log: Path) -> None:
    """``python -m venv``, or virtualenv where the system's Python lacks ensurepip."""
    base = sys.executable
    if Path(sys.prefix).resolve() == venv.resolve():  # called from inside the .venv that is about to be emptied
        base = getattr(sys, "_base_executable", base)
    empty(venv)
    try:
        call([base, "-m", "venv", str(venv)], root, log)
        return
    except SetupError:
        empty(venv)
    helper = root / "_build" / "virtualenv"
    try:  # --target needs no right to write into the system, which Debian and Ubuntu refuse
        call([base, "-m", "pip", "install", "--target", str(helper), "--upgrade", "virtualenv"], root, log)
        call(
            [base, "-m", "virtualenv", str(venv)],
            root,
            log,
            env=dict(os.environ, PYTHONPATH=str(helper)),
        )
    except SetupError as error:
        if "No module named pip" not in log.read_text("utf8", errors="replace"):
            raise
        raise SetupError(
            f"The Python at {sys.executable}",
            got="neither ensurepip nor pip",
            want="one of the two, to make a virtual environment with",
            remedy="On Debian and Ubuntu: sudo apt install python3-venv. Then run the command again.",
        ) from error


def empty(venv: Path) -> None:
    """A folder with nothing but the mark that an install runs."""
    shutil.rmtree(venv, ignore_errors=True)
    venv.mkdir(parents=True)
    (venv / MARK).touch()


def call(command: Sequence[str], root: Path, log: Path, env: dict[str, str] | None = None) -> None:
    """Run one step with its output in the log; a failure names its likely cause."""
    start = log.stat().st_size if log.exists() else 0
    settings = dict(os.environ if env is None else env)
    settings.pop("PYTHONSAFEPATH", None)
    settings.update(PIP_USER="0", PIP_REQUIRE_VIRTUALENV="0")  # a person's own settings for other places
    with log.open("ab") as sink:
        code = subprocess.call(list(command), cwd=root, env=settings, stdout=sink, stderr=subprocess.STDOUT)
    if code:
        said = log.read_bytes()[start:].decode("utf8", errors="replace")
        raise SetupError(f"Step '{' '.join(command[1:4])} ...'", **explain(said, log))


def explain(said: str, log: Path) -> dict[str, str]:
    """Cause and cure in a sentence each, from what pip said."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"\w*(Error|ERROR|error)\b:", line)]
    tail = " | ".join((telling or lines)[-3:])
    if "No space left on device" in said or "Errno 28" in said:
        return {
            "got": "a full disk",
            "want": f"{DISK_BYTES / 1e9:.0f} GB or more free here and in the folder for temporary files",
            "remedy": "Free some space, or set TMPDIR to a larger disk, and run the command again.",
        }
    if NETWORK.search(said):
        return {
            "got": "no answer from the package index",
            "want": "a connection to it, once",
            "remedy": "Check the network. Behind a proxy set HTTPS_PROXY; with a mirror set PIP_INDEX_URL. "
            f"Then run the command again. All that pip said is in {log}.",
        }
    return {"got": tail or "no output", "want": "exit status 0", "remedy": f"All that pip said is in {log}."}


def room(root: Path) -> None:
    """Refuse early where the disk can't hold the environment."""
    free = shutil.disk_usage(root).free
    if free < DISK_BYTES:
        raise SetupError(
            f"The disk of {root}",
            got=f"{free / 1e9:.1f} GB free",
            want=f"at least {DISK_BYTES / 1e9:.0f} GB for the environment",
            remedy="Free some space and run the command again.",
        )


def far(log: Path, start: int, number: int, elapsed: float) -> str:
    """How far pip is: it chooses every package, brings every wheel here, then installs them all at once."""
    said = log.read_bytes()[start:].decode("utf8", errors="replace")
    if "Installing collected packages" in said:
        return f"all {number} packages are here and being installed"
    wheels = re.findall(r"^ *(?:Downloading|Using cached|Processing) (?:\S*/)?(\S+\.whl)(?= |$)", said, re.M)
    chosen = len(re.findall(r"^(?:Collecting|Processing) ", said, re.M))
    share = min((chosen + len(wheels)) / (2 * number), 1)
    now = f", now {wheels[-1].partition('-')[0]}" if wheels else ""
    left = f", about {clock(elapsed * (1 - share) / share)} left" if share else ""
    return f"{min(chosen, number)} of {number} packages chosen, {len(wheels)} here{now}{left}"


def interpreter(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def lacks(python: Path, root: Path) -> list[str] | None:
    """What another interpreter is missing; ``None`` when it can't even say."""
    said = ask(python, ["-m", "handbook_src.publish.environment", str(root)], root)
    found: list[str] | None = json.loads(said) if said else None
    return found


def version_of(python: Path) -> str | None:
    return ask(python, ["-c", "import sys; print(sys.version, end='')"])


def ask(python: Path, arguments: list[str], root: Path | None = None) -> str | None:
    """What an interpreter prints; ``None`` when it is broken, as after an upgrade of the system's Python."""
    settings = {**os.environ, **({"PYTHONPATH": str(root)} if root else {})}
    try:
        answer = subprocess.run([str(python), *arguments], cwd=root, env=settings, capture_output=True, text=True)
    except OSError:
        return None
    return answer.stdout if answer.returncode == 0 else None

"""Render the staged, executed book into the site; no cell is executed here.

The press stages text pages and executed notebooks and calls :func:`build`. The
address of the repository stands in ``_config.yml`` (``repository.url``) and
nowhere else; :func:`repository` reads it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import yaml

from handbook_src.errors import ConfigError
from handbook_src.publish.book import Book
from handbook_src.publish.chapters import names
from handbook_src.publish.locate import locate

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "_config.yml"
BOOK = Book(ROOT)


class SiteError(RuntimeError):
    """The site did not build; the message holds Sphinx's warnings at their source lines."""


@cache
def repository(config: Path = CONFIG) -> str:
    """The repository's address, from the one place where it stands."""
    return str(yaml.safe_load(config.read_text("utf8"))["repository"]["url"]).rstrip("/")


def site_url() -> str:
    """Where the published site lives, as GitHub Pages derives it from the repository."""
    owner, name = urlsplit(repository()).path.strip("/").split("/")[:2]
    return f"https://{owner}.github.io/{name}"


def content(stage: Path, strict: bool) -> str:
    """A hash of all that the site is made from: a second run with nothing changed renders nothing."""
    digest = hashlib.sha256(f"{sys.version} {strict}".encode())
    staged = sorted(p for p in stage.rglob("*") if p.is_file())
    for path in [*staged, CONFIG, BOOK.toc, ROOT / "constraints.txt"]:
        digest.update(f"{path.name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def command(stage: Path, base: Path, strict: bool) -> list[str]:
    """Jupyter Book's call; its ``python -m`` entry exits 0 and does nothing, hence ``-c``."""
    call = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(stage)]
    call += ["--config", str(CONFIG), "--toc", str(BOOK.toc), "--path-output", str(base)]
    return call + (["-W", "-n", "--keep-going"] if strict else [])


def words(log: Path) -> list[str]:
    """What Sphinx has said so far, without colours."""
    text = log.read_text("utf8", errors="replace") if log.exists() else ""
    return re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()


def far(log: Path) -> str:
    """How far Sphinx is: ``reading sources 45%``."""
    steps = [found for line in words(log) if (found := re.search(r"([a-z ]+)\.\.\. \[ *(\d+%)\]", line))]
    return " ".join(steps[-1].groups()) if steps else "loading"


def complaints(log: Path) -> str:
    """Sphinx's warnings at their source lines; after a crash the end of its output."""
    lines = [line for line in words(log) if line.strip("= \t")]
    shown = [locate(x, BOOK) for x in lines if re.search(r"WARNING|ERROR|CRITICAL", x)]
    if any("Traceback" in line for line in lines) or not shown:
        shown += lines[-40:]
    return "\n".join(dict.fromkeys(shown))


def build(stage: Path, out: Path, *, strict: bool = True) -> bool:
    """Render the pages under ``stage`` into ``out/html``; False where they stand there already.

    Args:
        stage: executed notebooks and text pages, laid out as in the repository.
        out: the build folder, whose name is ``_build`` as Jupyter Book wants it.
        strict: warnings are errors.

    Raises:
        SiteError: Sphinx warned or failed; the message holds its warnings.
    """
    from handbook_src.publish import colab

    stage, out = stage.resolve(), out.resolve()
    front, stamp, log = out / "html" / "index.html", out / "site.key", out / "site.log"
    if out.name != "_build":
        raise ConfigError(
            "build folder", got=str(out), want="a folder named _build", remedy="Pass its parent / _build."
        )
    key = content(stage, strict)
    if front.exists() and stamp.exists() and stamp.read_text() == key:
        return False
    # All pages anew (16 s of 3 chapters): Sphinx warns only about pages that it reads, and
    # a partial build drops search entries and keeps links to what is gone.
    for file in (stamp, log):
        file.unlink(missing_ok=True)
    for folder in (out / ".doctrees", out / "html"):
        shutil.rmtree(folder, ignore_errors=True)
    env = dict(os.environ, PYTHONSAFEPATH="1", PYTHONUNBUFFERED="1")  # keeps ./kernels off sys.path
    with log.open("wb") as sink:
        code = subprocess.call(command(stage, out.parent, strict), cwd=stage, env=env, stdout=sink, stderr=sink)
    labels = out / ".doctrees" / "handbook-labels.json"
    if code or not labels.exists():
        raise SiteError(complaints(log))
    colab.write_all(stage, out / "html", json.loads(labels.read_text("utf8")), names(BOOK))
    stamp.write_text(key)
    return True

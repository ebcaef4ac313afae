"""The one list of what is installed: ``environment.yml``, pinned by ``constraints.txt``.

Read with the standard library, because nothing else is there yet.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tomllib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from handbook_src.errors import ConfigError

PACKAGE = "handbook-src"


@dataclass(frozen=True)
class Requirement:
    """One name of the list, and the platform that it is for (``None``: all)."""

    name: str
    platform: str | None = None

    @property
    def applies(self) -> bool:
        return self.platform in (None, sys.platform)

    def __str__(self) -> str:
        return self.name + (f'; sys_platform == "{self.platform}"' if self.platform else "")


def normal(name: str) -> str:
    """A package's name as the index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pip_items(root: Path) -> list[str]:
    """The lines under ``- pip:`` in environment.yml, in order."""
    items: list[str] = []
    depth: int | None = None
    for line in (root / "environment.yml").read_text("utf8").splitlines():
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        indent = len(line) - len(line.lstrip())
        if text == "- pip:":
            depth = indent
        elif depth is not None:
            if indent <= depth:
                break
            items.append(text.removeprefix("- ").split(" #")[0].strip())
    if not items:
        raise ConfigError(
            "environment.yml", got="no '- pip:' section", want="the list of packages", remedy="Restore the file."
        )
    return items


def requirements(root: Path) -> list[Requirement]:
    """The packages of the list; options such as ``-c`` and ``-e`` are left out."""
    found = []
    for item in pip_items(root):
        if item.startswith("-"):
            continue
        match = re.fullmatch(r'([\w.-]+)(?:\s*;\s*sys_platform\s*==\s*"(\w+)")?', item)
        if not match:
            raise ConfigError(
                "environment.yml",
                got=repr(item),
                want='a bare name, or name; sys_platform == "linux"',
                remedy="Versions belong into constraints.txt.",
            )
        found.append(Requirement(match[1], match[2]))
    return found


def pins(root: Path) -> dict[str, str]:
    """Exact versions by normal name."""
    found = {}
    for line in (root / "constraints.txt").read_text("utf8").splitlines():
        text = line.split("#")[0].strip()
        if text:
            name, equal, wanted = text.partition("==")
            if not equal:
                raise ConfigError("constraints.txt", got=repr(text), want="name==version", remedy="Pin it exactly.")
            found[normal(name)] = wanted.strip()
    return found


def installed(name: str) -> str | None:
    """The version here, without a build's suffix such as ``+cpu``; ``None`` if absent."""
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return None


def missing(root: Path) -> list[str]:
    """What this interpreter lacks of the list, or has in another version than pinned."""
    wanted = pins(root)
    lacking = [str(r) for r in requirements(root) if r.applies and installed(r.name) is None]
    for name, pinned in wanted.items():
        here = installed(name)
        if here is not None and here != pinned:
            lacking.append(f"{name}=={pinned} (here {here})")
    if linked_to() != root.resolve():
        lacking.append(f"{PACKAGE} (editable, from this folder)")
    return lacking


def linked_to() -> Path | None:
    """The folder that an editable install of this package points to."""
    try:
        record = distribution(PACKAGE).read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    found = json.loads(record or "{}")
    if not found.get("dir_info", {}).get("editable"):
        return None
    return Path(url2pathname(unquote(urlsplit(found["url"]).path))).resolve()


def stamp(root: Path) -> str:
    """Changes when what is to be installed changes, or who installs it where."""
    project = tomllib.loads((root / "pyproject.toml").read_text("utf8"))
    named = project.get("project", {})
    facts = [
        pip_items(root),
        sorted(pins(root).items()),
        project.get("build-system"),
        named.get("dependencies"),
        named.get("optional-dependencies"),
        named.get("scripts"),
        sys.version,
        str(root.resolve()),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":  # asked of another interpreter by `install`
    print(json.dumps(missing(Path(sys.argv[1]))))

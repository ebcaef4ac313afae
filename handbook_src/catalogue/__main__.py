"""The catalogue at the command line: ``python -m handbook_src.catalogue --help``."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from handbook_src.catalogue.ledger import find_stage, judged, ledger, staged
from handbook_src.catalogue.table import PARTS, STATUSES, Component, components, fold
from handbook_src.errors import ConfigError, HandbookError


def parser() -> argparse.ArgumentParser:
    """The options of the three commands."""
    top = argparse.ArgumentParser(
        prog="python -m handbook_src.catalogue",
        description="All components of the handbook: what they are, where they are, what proves them.",
    )
    top.add_argument("--json", action="store_true", help="print a list of objects, one a component")
    top.add_argument("--part", help="only this part of the book, such as attention")
    top.add_argument("--status", choices=STATUSES, help="only components with this status")
    commands = top.add_subparsers(dest="command")
    show = commands.add_parser("show", help="print the card of one component")
    show.add_argument("name", nargs="+", help="an id, title or synonym: rms-norm, SwiGLU, atrous convolution")
    ledger_ = commands.add_parser("claims", help="print the claims and their verdicts")
    ledger_.add_argument(
        "--json",
        action="store_true",
        default=argparse.SUPPRESS,  # else it would undo a --json before the command
        help="print a list of objects with id, component, verdict, source, quote, link",
    )
    return top


def chosen(part: str | None, status: str | None) -> list[Component]:
    """The rows of one part and status.

    Raises:
        ConfigError: no part has this name.
    """
    rows = components()
    if part is not None:
        asked = fold(part)
        match = [slug for slug, name in PARTS.items() if asked in (fold(slug), fold(name))]
        match = match or [slug for slug, name in PARTS.items() if asked and asked in fold(name)]
        if not match:
            known = "; ".join(PARTS.values())
            raise ConfigError("--part", got=repr(part), want="a part of the book", remedy=f"One of: {known}.")
        rows = [c for c in rows if c.part in match]
    return [c for c in rows if status in (None, c.status)]


def listing(rows: Sequence[Component]) -> str:
    """The rows by part, and how many of them are published."""
    width = max((len(c.id) for c in rows), default=0)
    lines: list[str] = []
    for part in dict.fromkeys(c.part_name for c in rows):
        members = [c for c in rows if c.part_name == part]
        done = sum(c.status == "published" for c in members)
        lines += [f"{part} ({done} of {len(members)} published)"]
        lines += [f"  {'*' if c.status == 'published' else ' '} {c.id:<{width}}  {c.title}" for c in members] + [""]
    count = Counter(c.status for c in rows)
    lines += [f"{count['published']} published (*), {count['planned']} planned, {len(rows)} in all"]
    return "\n".join(lines)


def missing_runs(stage: Path | None, checked: list[tuple[Path, str]]) -> list[str]:
    """Which verdicts are missing for want of a run."""
    if stage is None:
        return ["No built book here, so all claims read open. Build it: python3 -m handbook_src book"]
    pages = [(notebook.relative_to(stage).with_suffix(""), why) for notebook, why in checked if why]
    return [f"{page}: {why}, so its claims read open: python3 -m handbook_src book" for page, why in pages]


def print_claims(rows: Sequence[Component], as_json: bool) -> None:
    """The ledger of these components; stderr says which verdicts are missing for want of a run."""
    stage = find_stage()
    checked = judged(staged(stage)) if stage else []
    wanted = {c.id for c in rows}
    entries = [e for e in ledger(stage, [notebook for notebook, why in checked if not why]) if e.component in wanted]
    for line in missing_runs(stage, checked):
        print(line, file=sys.stderr)
    if as_json:
        names = ("id", "component", "verdict", "source", "quote", "link")
        print(json.dumps([{name: getattr(e, name) for name in names} for e in entries], indent=1))
        return
    for e in entries:
        print(f"{e.verdict:<12}{e.id:<32}{e.claim}\n{'':<44}{e.origin}")
    count = Counter(e.verdict for e in entries)
    print("\n" + ", ".join(f"{n} {verdict}" for verdict, n in count.most_common()))


def run(argv: Sequence[str] | None = None) -> int:
    """Do what the arguments ask; the exit status is 2 when they name nothing."""
    options = parser().parse_args(argv)
    try:
        if options.command == "show":
            from handbook_src.catalogue.card import card

            print(card(" ".join(options.name)))
        elif options.command == "claims":
            print_claims(chosen(options.part, options.status), options.json)
        else:
            rows = chosen(options.part, options.status)
            if options.json:
                print(json.dumps([c.as_dict() for c in rows], indent=1))
            else:
                print(listing(rows))
        sys.stdout.flush()
    except ConfigError as error:
        print(f"{parser().prog}: {error}", file=sys.stderr)
        return 2
    except HandbookError as error:
        print(f"{parser().prog}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a C locale can't write every title
    sys.exit(run())

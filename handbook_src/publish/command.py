"""What can be typed after ``python3 -m handbook_src``, and the step into the environment."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from handbook_src.errors import ConfigError, HandbookError
from handbook_src.publish import install

#: What makes a folder the repository and not an installed wheel.
LANDMARKS = ("environment.yml", "constraints.txt", "_toc.yml", "book")


def repository() -> Path:
    """The folder that holds the book's text, which a wheel doesn't carry."""
    root = Path(__file__).resolve().parents[2]
    absent = [name for name in LANDMARKS if not (root / name).exists()]
    if absent:
        raise ConfigError(
            "The handbook's repository",
            got=f"{root} without {', '.join(absent)}",
            want="a clone that holds the chapters",
            remedy="The installed package has the layers, not the book: clone the repository with git "
            "and run the command in that folder.",
        )
    return root


def parser() -> argparse.ArgumentParser:
    """All options; both commands share the ones that steer the build."""
    top = argparse.ArgumentParser(
        prog="python3 -m handbook_src",
        description="An executable handbook of neural networks: build it, or prove it.",
        allow_abbrev=False,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="{book,test,record,setup}")
    common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    common.add_argument("--jobs", type=positive, metavar="N", help="processes at a time (default: one a core)")
    common.add_argument(
        "--patience",
        type=float,
        metavar="X",
        help="a chapter fails past X times its time budget (default 3; a slow machine is allowed for)",
    )
    book = commands.add_parser(
        "book", parents=[common], help="execute the chapters and build the site", allow_abbrev=False
    )
    book.add_argument("--only", nargs="+", default=[], metavar="CHAPTER", help="execute these chapters, e.g. norm")
    book.add_argument("--full", action="store_true", help="the larger setting of every chapter (quick=False)")
    book.add_argument("--seed", type=int, metavar="N", help="another seed than the chapters' own")
    book.add_argument("--device", metavar="D", help="where the chapters run, e.g. cuda (default: cpu)")
    commands.add_parser(
        "test",
        parents=[common],
        help="build, then run every test and every notebook again; further arguments go to pytest",
        allow_abbrev=False,
    )
    record = commands.add_parser(
        "record", help="run the full setting of the experiments without a valid record", allow_abbrev=False
    )
    record.add_argument("chapters", nargs="*", metavar="CHAPTER", help="of these chapters (default: all)")
    record.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these experiments")
    record.add_argument("--device", default="cpu", metavar="D", help="where they run, e.g. cuda (default: cpu)")
    record.add_argument("--minutes", type=float, metavar="M", help="start nothing new after M minutes")
    record.add_argument("--jobs", type=positive, metavar="N", help="experiments at a time (default: one a core)")
    record.add_argument("--check", action="store_true", help="only list what is missing or stale; exit 1 if any is")
    record.add_argument("--again", action="store_true", help="run also those whose record is valid")
    commands.add_parser("setup", help="only make the environment", allow_abbrev=False)
    return top


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options, and what ``test`` hands on to pytest."""
    options, rest = parser().parse_known_args(argv)
    if rest and options.command != "test":
        parser().error(f"unrecognized arguments: {' '.join(rest)}")
    return options, rest


def run(argv: list[str]) -> int:
    """Make the environment stand, then go on inside it."""
    options, _ = parse(argv)
    try:
        root = repository()
        python = install.ensure(root)
    except HandbookError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped while making the environment. The same command does it again.", file=sys.stderr)
        return 130
    if options.command == "setup":
        print(f"The environment stands: {python}")
        return 0
    return enter(python, root, argv)


def enter(python: Path, root: Path, argv: list[str]) -> int:
    """Run the press inside the environment, in place of this process where the system can."""
    os.chdir(root)
    command = [str(python), "-m", "handbook_src.publish", *argv]
    # Safe path: the root holds a folder `kernels`, which is also the name of a package.
    settings = dict(os.environ, PYTHONSAFEPATH="1", PYTHONUNBUFFERED="1")
    settings.pop("PYTHONPATH", None)
    if os.name == "posix":  # Ctrl-C then reaches the build itself and nothing between
        sys.stdout.flush()
        os.execve(python, command, settings)
    return subprocess.call(command, env=settings)

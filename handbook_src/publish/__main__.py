"""The commands again, inside the environment that ``python3 -m handbook_src`` has made."""

from __future__ import annotations

import sys
from typing import Any

from handbook_src.errors import HandbookError
from handbook_src.publish.command import parse, repository


def parameters(options: Any) -> dict[str, Any]:
    """Papermill's parameters: only what departs from the chapters' own."""
    asked = {
        "quick": False if getattr(options, "full", False) else None,
        "seed": getattr(options, "seed", None),
        "device": getattr(options, "device", None),
    }
    return {name: value for name, value in asked.items() if value is not None}


def main(argv: list[str]) -> int:
    options, rest = parse(argv)
    from handbook_src.publish import build, proof, record

    try:
        if options.command == "record":
            asked = {k: v for k, v in vars(options).items() if k != "command"}
            return record.record(repository(), record.Options(**asked))
        wanted = build.Options(getattr(options, "only", []), parameters(options), options.jobs, options.patience)
        if options.command == "test":
            return proof.test(repository(), wanted, rest)
        return build.book(repository(), wanted)
    except HandbookError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

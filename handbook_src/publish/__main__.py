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
    from handbook_src.publish import build, proof

    asked = build.Options(getattr(options, "only", []), parameters(options), options.jobs, options.patience)
    try:
        if options.command == "test":
            return proof.test(repository(), asked, rest)
        return build.book(repository(), asked)
    except HandbookError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

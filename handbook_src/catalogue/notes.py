"""What the cards of planned components say: formulas and values from the papers.

The text stands in ``notes_data/planned.toml``, in a folder of its own so that an
edit there does not make the press execute chapters again.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Note:
    """Lines of a card; ``typical`` names the paper that each value is from."""

    what: str = ""
    formula: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    typical: tuple[str, ...] = ()


@cache
def notes() -> dict[str, Note]:
    """The notes by component id."""
    with Path(__file__).with_name("notes_data").joinpath("planned.toml").open("rb") as file:
        entries: dict[str, dict[str, Any]] = tomllib.load(file)
    return {id_: Note(**{key: _frozen(value) for key, value in entry.items()}) for id_, entry in entries.items()}


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value

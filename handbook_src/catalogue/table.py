"""The rows of ``components.tsv`` and ``claims.tsv``, and how a name finds one."""

from __future__ import annotations

import difflib
import re
import unicodedata
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from handbook_src.errors import ConfigError, DataError

HERE = Path(__file__).parent
STATUSES = ("published", "planned")
#: The parts of the book: the folder that each has on every floor, and its name.
PARTS = {
    "foundations": "foundations",
    "activations": "activations",
    "normalisation": "normalisation",
    "pooling": "pooling",
    "convolution": "convolution",
    "cnn": "conv blocks and CNN zoo",
    "recurrent": "recurrent and convolutional sequences",
    "state_space": "state space and linear-time mixers",
    "attention": "attention",
    "positions": "positions",
    "embeddings": "embeddings",
    "transformers": "transformers",
    "reasoning": "reasoning models",
    "optim": "optimisers",
    "losses": "losses",
    "regularisation": "regularisation",
    "graphs": "graphs",
    "spiking": "spiking and brain-inspired",
    "continuous": "continuous-time",
    "algebras": "other algebras and function families",
    "generative": "generative",
    "meta": "meta, few-shot, continual, NAS",
    "perception": "perception",
    "compression": "peft and compression",
    "scale": "scale",
    "practice": "metrics, monitoring, practice",
    "minds": "agents and mind models",
    "safety": "safety",
    "time_series": "time series",
    "robustness": "robustness and privacy",
}

Row = TypeVar("Row", "Component", "Claim")


@dataclass(frozen=True)
class Component:
    """One component: what it is called, where it lives, what proves it.

    ``part`` is a folder of :data:`PARTS`, ``object`` the public import path and ``chapter``
    a page without its suffix; both may be empty while ``status`` is ``planned``.
    """

    id: str
    title: str
    synonyms: tuple[str, ...]
    part: str
    object: str
    chapter: str
    oracle: str
    source: str
    status: str

    def as_dict(self) -> dict[str, Any]:
        """The row with plain lists, as JSON takes it."""
        return {**asdict(self), "synonyms": list(self.synonyms)}

    @property
    def part_name(self) -> str:
        """The part in words."""
        return PARTS[self.part]

    @property
    def names(self) -> tuple[str, ...]:
        """Everything the component answers to: id, title, synonyms."""
        return (self.id, self.title, *self.synonyms)


@dataclass(frozen=True)
class Claim:
    """One statement, where it stands, and how a run can settle it.

    ``source`` names the paper, course or documentation that says so, ``quote`` its words where
    they were seen, ``link`` where to read them. What no public text was found to say is
    ``from the source documents``, the overviews that the handbook set out to check and that
    are no part of it; ``; compare`` then names what the literature says instead.
    """

    id: str
    component: str
    claim: str
    kind: str
    source: str
    quote: str
    link: str
    how: str


def linked(source: str) -> tuple[str, str]:
    """A claim's ``source`` in two: what comes before the text that its link leads to, and that text.

    >>> linked("Vaswani et al. 2017"), linked("from the source documents; compare Dao 2024")
    (('', 'Vaswani et al. 2017'), ('from the source documents; compare ', 'Dao 2024'))
    """
    before, compare, named = source.rpartition("; compare ")
    return before + compare, named


def read_table(path: Path, kind: type[Row]) -> list[Row]:
    """Read a tab-separated file whose header is the fields of ``kind``.

    Raises:
        DataError: the header or the number of columns of a line is off, or an id
            stands twice.
    """
    want = [f.name for f in fields(kind)]
    lines = path.read_text(encoding="utf-8").splitlines()
    if not lines or lines[0].split("\t") != want:
        got = lines[0] if lines else "an empty file"
        raise DataError(f"{path.name} header", got=repr(got), want=repr("\t".join(want)), remedy="Restore line 1.")
    rows: dict[str, Row] = {}
    for number, line in enumerate(lines[1:], start=2):
        cells = line.split("\t")
        if len(cells) != len(want):
            raise DataError(
                f"{path.name} line {number}",
                got=f"{len(cells)} columns",
                want=f"{len(want)}, separated by tabs",
                remedy="Keep empty columns as two tabs in a row.",
            )
        if cells[0] in rows:
            raise DataError(f"{path.name} line {number}", got=cells[0], want="each id once", remedy="Remove one.")
        record: dict[str, Any] = dict(zip(want, cells, strict=True))
        if "synonyms" in record:
            record["synonyms"] = tuple(s.strip() for s in record["synonyms"].split(";") if s.strip())
        rows[cells[0]] = kind(**record)
    return list(rows.values())


@cache
def _components() -> tuple[Component, ...]:
    return tuple(read_table(HERE / "components.tsv", Component))


@cache
def _claims() -> tuple[Claim, ...]:
    return tuple(read_table(HERE / "claims.tsv", Claim))


def components() -> list[Component]:
    """All components, in the order of the book."""
    return list(_components())


def claims() -> list[Claim]:
    """All claims of the ledger, in the order of the book."""
    return list(_claims())


def fold(name: str) -> str:
    """``name`` as it is compared: ASCII letters and digits, lower case.

    >>> fold("Multi-Head Attention"), fold("R²"), fold("Erdős")
    ('multiheadattention', 'r2', 'erdos')
    """
    plain = unicodedata.normalize("NFKD", name)
    return re.sub(r"[^a-z0-9]", "", plain.lower())


@cache
def _index() -> dict[str, list[Component]]:
    """Every folded name with the components that answer to it; an id answers alone."""
    index: dict[str, list[Component]] = {}
    for c in _components():
        for key in {fold(n) for n in c.names}:
            index.setdefault(key, []).append(c)
    return index | {fold(c.id): [c] for c in _components()}


def search(name: str) -> list[Component]:
    """The components that answer to ``name``: an id wins over titles and synonyms."""
    return list(_index().get(fold(name), ()))


def close_matches(name: str, limit: int = 5) -> list[str]:
    """Names that look like ``name``, each with the id it leads to."""
    known = {fold(n): (n, c.id) for c in reversed(_components()) for n in c.names}
    key = fold(name)
    near = difflib.get_close_matches(key, known, n=limit, cutoff=0.7)
    near += [k for k in sorted(known, key=len) if len(key) > 3 and key in k and k not in near]
    seen: dict[str, str] = {}
    for k in near:
        shown, id_ = known[k]
        seen.setdefault(id_, id_ if fold(shown) == fold(id_) else f"{id_} ({shown})")
    return list(seen.values())[:limit]


def component(name: str) -> Component:
    """The component with this id, title or synonym.

    >>> component("SwiGLU").id
    'glu'

    Raises:
        ConfigError: nothing answers to ``name``, or several components do.
    """
    found = search(name)
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(
            "component name",
            got=repr(name),
            want="a name that only one component answers to",
            remedy="It may be any of: " + "; ".join(f"{c.id} ({c.title})" for c in found) + ".",
        )
    near = close_matches(name)
    remedy = f"Did you mean {', '.join(near)}?" if near else "List all with `python -m handbook_src.catalogue`."
    raise ConfigError("component name", got=repr(name), want="an id, title or synonym of the catalogue", remedy=remedy)

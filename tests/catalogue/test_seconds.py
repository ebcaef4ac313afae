"""A component's tests take four seconds of one core: what was recorded, and who takes more."""

from __future__ import annotations

import csv
from pathlib import Path

from handbook_src.catalogue import components

RECORDED = Path(__file__).parents[1] / "seconds.tsv"
BUDGET = 4
#: Components older than the budget, and what they may take until someone cuts them.
OLDER = {
    "flash-attention": 45, "chunked-attention": 20, "layer-norm": 15, "rms-norm": 15, "reformer": 12, "softmax": 10,
    "dilated-attention": 9, "mla": 9, "transposed-conv": 9, "kv-cache": 8, "performer": 8, "axial-attention": 7,
    "bpe": 7, "deformable-conv": 7, "sentence-embedding": 7, "sliding-window-attention": 7, "batch-norm": 6, "gpt": 6,
    "linear-attention": 6, "memorizing-transformer": 6, "random-attention": 6, "conv4d": 5, "glu": 5, "rope": 5,
}  # fmt: skip


def recorded() -> dict[str, float]:
    with RECORDED.open(encoding="utf8", newline="") as file:
        return {row["component"]: float(row["seconds"]) for row in csv.DictReader(file, delimiter="\t")}


def test_every_published_component_is_recorded() -> None:
    missing = {c.id for c in components() if c.status == "published"} - set(recorded())
    assert not missing, "python3 -m pytest tests --record-seconds, with nothing beside it"


def test_no_component_takes_more_than_its_share() -> None:
    over = {name: taken for name, taken in recorded().items() if taken > OLDER.get(name, BUDGET)}
    assert not over


def test_no_allowance_outlives_its_need() -> None:
    assert [name for name in OLDER if recorded().get(name, 0) <= BUDGET] == []

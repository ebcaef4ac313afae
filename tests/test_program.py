"""The program of an experiment: what belongs to it, what changes its hash, what hangs on it."""

import pytest

from handbook_src.errors import ConfigError
from handbook_src.program import cut, experiments, traced
from handbook_src.testing.refusal import refuses

CELLS = [
    "quick = True\nseed = 0",
    "import torch\nfrom torch import nn\nexperiment = experiments('norm', quick)",
    "WIDTH = 8\nunrelated = heavy()\nrow = 3",
    'def step(x):\n    """Words."""\n    row = x + WIDTH\n    return row',
    "%matplotlib inline\n@experiment(quick=dict(seeds=1), full=dict(seeds=10))\ndef race(seeds):\n"
    "    return {'a': [step(s) for s in range(seeds)]}",
    "data = race()\nmean = sum(data['a'])",
    "other = WIDTH + 1\nprint(mean)",
]


def changed(i: int, old: str, new: str) -> list[str]:
    assert old in CELLS[i]
    return [cell.replace(old, new) if k == i else cell for k, cell in enumerate(CELLS)]


def test_a_program_holds_what_its_function_reads_and_nothing_else():
    text = cut(CELLS, "race").text
    assert "WIDTH = 8" in text
    assert "def step" in text
    assert "experiments('norm', quick)" in text
    assert not any(word in text for word in ("unrelated", "row = 3", "import torch", "data ="))


def test_a_program_defines_itself():
    """Cut again from its own text it is the same: a recording can be checked against its chapter."""
    program = cut(CELLS, "race")
    assert cut([program.text], "race").hash == program.hash


@pytest.mark.parametrize(
    ("cell", "old", "new"),
    [(2, "WIDTH = 8", "WIDTH = 9"), (3, "x + WIDTH", "x - WIDTH"), (4, "seeds=10", "seeds=11"), (4, "'a'", "'b'")],
)
def test_what_can_change_the_result_changes_the_hash(cell, old, new):
    assert cut(changed(cell, old, new), "race").hash != cut(CELLS, "race").hash


@pytest.mark.parametrize(
    ("cell", "old", "new"),
    [
        (0, "quick = True", "quick = False"),
        (1, "from torch import nn", "from torch.nn import functional"),
        (2, "row = 3", "row = 4"),
        (3, "Words.", "Other words."),
        (3, "row = x", "y = 1  # a comment\n    row = x".replace("y = 1  ", "  ")),
        (4, "seeds=1)", "seeds=2)"),
        (6, "+ 1", "+ 2"),
    ],
)
def test_words_parameters_and_other_cells_do_not(cell, old, new):
    assert cut(changed(cell, old, new), "race").hash == cut(CELLS, "race").hash


def test_a_helper_that_was_run_again_counts_once_in_its_newest_form():
    again = [*CELLS[:4], CELLS[3].replace("+ WIDTH", "* WIDTH"), *CELLS[4:]]
    only = [*CELLS[:3], CELLS[3].replace("+ WIDTH", "* WIDTH"), *CELLS[4:]]
    assert cut(again, "race").hash == cut(only, "race").hash


@pytest.mark.parametrize("fill", ["table['x'] = 2", "table.x = 2", "for k in range(3):\n    table[k] = k"])
def test_a_value_that_is_filled_later_brings_the_filling(fill):
    cells = ["table = {}", fill, "@experiment(quick={}, full={})\ndef look():\n    return table"]
    assert fill.splitlines()[0] in cut(cells, "look").text


def test_experiments_are_found_by_their_decorator():
    assert experiments(CELLS) == ["race"]


def test_an_unknown_name_is_refused():
    with refuses(ConfigError, "no_such"):
        cut(CELLS, "no_such")


def test_what_a_cell_shows_is_traced_to_the_experiment():
    assert traced(CELLS) == [set(), set(), set(), set(), {"race"}, {"race"}, {"race"}]


def test_a_loop_variable_is_not_what_an_earlier_cell_left_in_its_name():
    loop = "for name in ('a', 'b'):\n    if name:\n        print(name)"
    assert traced([*CELLS[:6], "for name in data:\n    pass", loop])[-2:] == [{"race"}, set()]

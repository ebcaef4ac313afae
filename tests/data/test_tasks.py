"""Toy tasks: the answers are right, the noise comes from the generator alone."""

from __future__ import annotations

import pytest
import torch

from handbook_src.data.tasks import IGNORE, AssociativeRecall, Bits, Copy, MaskedToken, accuracy
from handbook_src.errors import ConfigError
from handbook_src.testing import refuses

TASKS = [Copy(), Copy(reverse=True), AssociativeRecall(), Bits("parity"), Bits("majority"), MaskedToken()]


def draw(task, seed=0):
    return task(torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_a_batch_is_its_generators(task):
    inputs, targets = draw(task)
    torch.manual_seed(99)
    again = draw(task)
    assert torch.equal(inputs, again[0])
    assert torch.equal(targets, again[1])
    assert not torch.equal(inputs, draw(task, seed=1)[0])


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_tokens_are_in_the_vocabulary_and_something_is_asked(task):
    inputs, targets = draw(task)
    assert inputs.shape == targets.shape
    assert inputs.dtype == targets.dtype == torch.long
    assert 0 <= inputs.min() <= inputs.max() < task.vocab_size
    asked = targets != IGNORE
    assert asked.any(dim=1).all()
    assert targets[asked].max() < task.vocab_size


@pytest.mark.parametrize("reverse", [False, True])
def test_copy_asks_for_the_content(reverse):
    inputs, targets = draw(Copy(symbols=5, length=4, batch=3, reverse=reverse))
    content = inputs[:, :4].flip(1) if reverse else inputs[:, :4]
    assert (inputs[:, 4] == 5).all()
    assert torch.equal(targets[:, 4:], content)
    assert torch.equal(inputs[:, 5:], content[:, :-1])
    assert (targets[:, :4] == IGNORE).all()


def test_recall_asks_for_the_value_of_the_key():
    task = AssociativeRecall(pairs=3, keys=5, values=4, batch=50)
    inputs, targets = draw(task)
    for row, target in zip(inputs.tolist(), targets.tolist(), strict=True):
        pairs = dict(zip(row[:-1:2], row[1:-1:2], strict=True))
        assert len(pairs) == 3
        assert target == [IGNORE] * 6 + [pairs[row[-1]]]


def test_parity_and_majority_by_counting():
    for kind, rule in (("parity", lambda b: sum(b) % 2), ("majority", lambda b: int(2 * sum(b) > len(b)))):
        bits, targets = draw(Bits(kind, length=9, batch=20))
        for row, target in zip(bits.tolist(), targets.tolist(), strict=True):
            assert target == [rule(row[: t + 1]) for t in range(9)]


def test_masked_tokens_count_up_and_at_least_one_is_blank():
    task = MaskedToken(symbols=7, length=6, rate=0.01, batch=40)
    inputs, targets = draw(task)
    blank = inputs == 7
    assert blank.any(dim=1).all()
    assert torch.equal(blank, targets != IGNORE)
    whole = torch.where(blank, targets, inputs)
    steps = whole.diff(dim=1) % 7
    assert (steps == steps[:, :1]).all()


def test_accuracy_counts_what_was_asked():
    targets = torch.tensor([[IGNORE, 1, 0]])
    logits = torch.tensor([[[9.0, 0.0], [0.0, 9.0], [0.0, 9.0]]])
    assert accuracy(logits, targets) == 0.5


def test_refusals():
    with refuses(ConfigError, "Copy length", 0):
        Copy(length=0)
    with refuses(ConfigError, "pairs", 9, "keys=8"):
        AssociativeRecall(pairs=9, keys=8)
    with refuses(ConfigError, "Bits", "median"):
        Bits("median")
    with refuses(ConfigError, "rate", 1.0):
        MaskedToken(rate=1.0)

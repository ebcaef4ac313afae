"""The sparse layers: what the mask removes stays removed, and the stored forms compute the same."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import Tensor, nn

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.layers.foundations.linear import Linear
from handbook_src.layers.foundations.sparse_linear import CSRLinear, SemiStructuredLinear, SparseLinear
from handbook_src.testing import assert_parity, refuses

ID = "sparse-linear"


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- parity
@pytest.mark.parity(ID)
@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("lead", [(), (1,), (4,), (2, 3), (0,)])
def test_equals_torchs_linear_with_the_masked_weight(lead, sparsity, bias, backend):
    mine = SparseLinear(10, 7, bias, dtype=torch.float64, sparsity=sparsity, backend=backend)
    theirs = nn.Linear(10, 7, bias, dtype=torch.float64)
    theirs.weight.data = mine.masked_weight.detach().clone()
    if bias:
        theirs.bias.data = mine.bias.detach().clone()
    assert_parity(mine, theirs, [draw(*lead, 10)], parameters=[(mine.bias, theirs.bias)] if bias else [])
    if mine.weight.grad is not None and theirs.weight.grad is not None:
        torch.testing.assert_close(mine.weight.grad, theirs.weight.grad * mine.mask)


@pytest.mark.parity(ID)
@pytest.mark.parametrize("bias", [True, False])
def test_stored_forms_compute_the_same(bias):
    layer = SparseLinear(12, 5, bias, dtype=torch.float64)
    layer.prune_semi_structured()
    assert layer.sparsity == 0.5
    for stored in (layer.to_csr(), layer.to_semi_structured()):
        assert not list(stored.parameters())
        assert_parity(stored, lambda x: layer(x), [draw(2, 3, 12)])
        torch.testing.assert_close(stored.bias, layer.bias.data if bias else None)
    layer.prune(0.8)
    torch.testing.assert_close(layer.to_semi_structured()(draw(3, 12)), layer.to_csr()(draw(3, 12)))


# ---------------------------------------------------------------- laws
@pytest.mark.law(ID)
@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1), lambda p: torch.optim.AdamW(p, lr=0.1)
])  # fmt: skip
def test_what_is_removed_stays_removed_whatever_the_optimiser_does(make):
    layer = SparseLinear(10, 7)
    optimizer = make(layer.parameters())
    for step in range(6):
        if step == 2:
            layer.prune(0.8)  # now momenta of removed weights go on moving them, without effect
        layer.zero_grad()
        layer(draw(4, 10, seed=step).float()).square().sum().backward()
        assert (layer.weight.grad[~layer.mask] == 0).all()
        optimizer.step()
    assert (layer.masked_weight[~layer.mask] == 0).all()
    assert (layer.to_csr().values != 0).all()
    assert len(layer.to_csr().values) == round(0.2 * 70)


@pytest.mark.law(ID)
def test_pruning_goes_up_to_amount_and_never_back():
    layer = SparseLinear(10, 10, sparsity=0.3)
    masks = [layer.mask.clone()]
    reached = 0.3
    for amount in (0.5, 0.5, 0.9, 0.6, 0.0, 1.0, 0.5):
        layer.prune(amount)
        reached = max(reached, amount)
        assert layer.sparsity == pytest.approx(reached)
        assert not (layer.mask & ~masks[-1]).any()
        masks.append(layer.mask.clone())
    layer.reset_parameters()
    assert torch.equal(layer.mask, masks[-1])


@pytest.mark.law(ID)
def test_a_random_mask_removes_exactly_its_share_and_follows_the_seed():
    masks = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        masks.append(SparseLinear(13, 7, sparsity=0.9).mask)
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert all(int((~m).sum()) == round(0.9 * 91) for m in masks)


@pytest.mark.law(ID)
def test_a_given_mask_is_kept_and_copied():
    mask = torch.eye(4, dtype=torch.bool)
    layer = SparseLinear(4, 4, mask=mask)
    mask.fill_(False)
    assert torch.equal(layer.mask, torch.eye(4, dtype=torch.bool))
    x = draw(3, 4).float()
    torch.testing.assert_close(layer(x), x * layer.weight.diagonal() + layer.bias)


# ---------------------------------------------------------------- registration
@pytest.mark.registration(ID)
def test_first_values_and_arguments_are_those_of_linear():
    torch.manual_seed(0)
    mine = SparseLinear(5, 3)
    torch.manual_seed(0)
    theirs = Linear(5, 3)
    assert torch.equal(mine.weight, theirs.weight)
    assert torch.equal(mine.bias, theirs.bias)
    assert list(mine.state_dict()) == ["weight", "bias", "mask"]
    assert list(inspect.signature(SparseLinear).parameters)[:5] == list(inspect.signature(nn.Linear).parameters)
    assert "sparsity=0" in repr(mine)


@pytest.mark.registration(ID)
def test_copies_pickles_moves_saves_and_compiles(unchecked):
    layer, x = SparseLinear(12, 5), draw(3, 12).float()
    layer.prune_semi_structured()
    fresh = SparseLinear(12, 5)
    fresh.prune_semi_structured()
    torch._dynamo.reset()
    for module, blank in (
        (layer, fresh),
        (layer.to_csr(), fresh.to_csr()),
        (layer.to_semi_structured(), fresh.to_semi_structured()),
    ):
        y = module(x)
        blank.load_state_dict(module.state_dict())
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), blank):
            torch.testing.assert_close(other(x), y)
        for dtype in (torch.bfloat16, torch.float16):
            half = copy.deepcopy(module).to(dtype)(x.to(dtype))
            assert half.dtype == dtype
            torch.testing.assert_close(half.float(), y, rtol=0.03, atol=0.03)
        if isinstance(module, CSRLinear):  # torch traces no sparse tensors
            apart = torch.compiler.disable(module)
            compiled = torch.compile(lambda x, f=apart: f(x.sin()).cos(), backend="aot_eager")
            torch.testing.assert_close(compiled(x), module(x.sin()).cos())
        else:
            torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), y)
        assert "in_features=12, out_features=5" in repr(module)


@pytest.mark.registration(ID)
def test_meta_layers_have_shapes():
    layer = SparseLinear(12, 5, device="meta", dtype=torch.bfloat16, sparsity=0.5)
    assert layer.mask.device.type == layer.weight.device.type == "meta"
    assert layer(torch.empty(2, 12, device="meta", dtype=torch.bfloat16)).shape == (2, 5)
    assert "in_features=12" in repr(layer)


# ---------------------------------------------------------------- refusals
@pytest.mark.refusal(ID)
@pytest.mark.parametrize("size", [0, -1, 2.5, True, float("nan"), "3", None])
def test_refuses_sizes(size):
    with refuses(ConfigError, "in_features", repr(size)):
        SparseLinear(size, 3)
    with refuses(ConfigError, "out_features", repr(size)):
        SparseLinear(3, size)


@pytest.mark.refusal(ID)
def test_refuses_settings():
    for share in (-0.1, 1.5, float("nan"), True, "0.5", None):
        with refuses(ConfigError, "sparsity", repr(share)):
            SparseLinear(5, 3, sparsity=share)
        with refuses(ConfigError, "amount", repr(share)):
            SparseLinear(5, 3).prune(share)
    with refuses(ShapeError, "(5, 3)", "(3, 5)"):
        SparseLinear(5, 3, mask=torch.ones(5, 3).bool())
    with refuses(ShapeError, "torch.float32"):
        SparseLinear(5, 3, mask=torch.ones(3, 5))
    with refuses(ConfigError, "mask", "0.5"):
        SparseLinear(5, 3, mask=torch.ones(3, 5).bool(), sparsity=0.5)
    with refuses(ShapeError, "(3, 5)", "multiple of 4"):
        SparseLinear(5, 3).prune_semi_structured()
    with refuses(ShapeError, "more than two"):
        SparseLinear(4, 3).to_semi_structured()


@pytest.mark.refusal(ID)
def test_refuses_inputs():
    layer = SparseLinear(8, 3, mask=torch.tensor([True, False] * 12).view(3, 8))
    for module in (layer, layer.to_csr(), layer.to_semi_structured()):
        for x, values in [
            (torch.ones(2, 4), (4, 8)),
            (torch.ones(2, 8).long(), ("torch.int64",)),
            (torch.ones(2, 8).double(), ("torch.float64", "torch.float32")),
        ]:
            with refuses(ShapeError, *values):
                module(x)
    for stored in (CSRLinear, SemiStructuredLinear):
        with refuses(ShapeError, "(8,)"):
            stored(torch.ones(8))

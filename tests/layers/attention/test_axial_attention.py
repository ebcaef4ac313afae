"""Axial attention as layers."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.mask import along, causal
from handbook_src.layers.attention.attention import MultiHeadAttention
from handbook_src.layers.attention.axial_attention import AxialAttention, RasterAttention
from handbook_src.testing import assert_causal, assert_parity, refuses

ID = "axial-attention"


@pytest.mark.parity(ID)
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_multi_head_attention_under_the_rule(axis: int, is_causal: bool, bias: bool) -> None:
    layer = AxialAttention(8, 2, axis=axis, causal=is_causal, bias=bias).double()
    other = MultiHeadAttention(8, 2, bias=bias).double()
    other.load_state_dict(layer.state_dict())
    rule = along(axis % 2, 3, 4)
    mask = (causal & rule if is_causal else rule).dense(12)
    assert_parity(
        lambda x: (layer(x).flatten(1, 2), layer.weights(x)),
        lambda x: (other(x.flatten(1, 2), mask=mask), other.weights(x.flatten(1, 2), mask=mask)),
        [torch.randn(2, 3, 4, 8)],
        parameters=list(zip(layer.parameters(), other.parameters(), strict=True)),
    )


@pytest.mark.parity(ID)
@pytest.mark.parametrize("shape", [(3, 4), (1, 5), (5, 1)])
def test_raster_attention_is_its_formula(shape: tuple[int, int]) -> None:
    """Rows read whole, columns downwards, one step down, and rows from the left."""
    layer = RasterAttention(8, 2, bias=True).double()
    for p in layer.parameters():
        p.data.normal_(std=0.5)

    def on_lines(part: AxialAttention, x: Tensor, rule: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (2, 4)).transpose(-2, -3) for p in (part.q_proj, part.k_proj, part.v_proj))
        weights = (q @ k.mT / 2).masked_fill(~rule, -torch.inf).softmax(-1)
        return part.out_proj((weights @ v).transpose(-2, -3).flatten(-2))

    def by_hand(x: Tensor) -> Tensor:
        (n, m), past = shape, torch.ones(5, 5, dtype=torch.bool).tril()
        u = on_lines(layer.row, x, torch.ones(m, m, dtype=torch.bool))
        u = on_lines(layer.column, u.transpose(1, 2), past[:n, :n]).transpose(1, 2)
        above = torch.cat([torch.zeros_like(u[:, :1]), u[:, :-1]], 1)
        return on_lines(layer.masked_row, x + above, past[:m, :m])

    assert_parity(layer, by_hand, [torch.randn(2, *shape, 8)])


@pytest.mark.outside(ID)
def test_it_is_torchs_layer_on_each_line() -> None:
    layer, x = AxialAttention(8, 2, axis=0).double(), torch.randn(2, 3, 4, 8).double()
    theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True).double()
    with torch.no_grad():
        projections = (layer.q_proj, layer.k_proj, layer.v_proj)
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        theirs.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
        theirs.out_proj.load_state_dict(layer.out_proj.state_dict())
    for column in range(4):
        line = x[:, :, column]
        torch.testing.assert_close(layer(x)[:, :, column], theirs(line, line, line)[0])


@pytest.mark.law(ID)
@pytest.mark.parametrize("shape", [(3, 4), (1, 5), (5, 1), (2, 2)])
def test_raster_attention_sees_what_was_written_and_nothing_else(shape: tuple[int, int]) -> None:
    layer, n = RasterAttention(4, 2).double(), shape[0] * shape[1]
    assert_causal(lambda x: layer(x.unflatten(1, shape)).flatten(1, 2), torch.randn(1, n, 4).double())
    x = torch.randn(1, *shape, 4, dtype=torch.float64, requires_grad=True)
    y = layer(x).flatten(1, 2)
    for i in range(n):
        (grad,) = torch.autograd.grad(y[0, i].square().sum(), x, retain_graph=True)
        assert (grad.flatten(1, 2)[0].abs().sum(-1) > 0).tolist() == [j <= i for j in range(n)]


@pytest.mark.law(ID)
def test_without_the_shift_a_raster_would_leak() -> None:
    layer, x = RasterAttention(4, 2).double(), torch.randn(1, 6, 4).double()

    def unshifted(x: torch.Tensor) -> torch.Tensor:
        grid = x.unflatten(1, (2, 3))
        return layer.masked_row(grid + layer.column(layer.row(grid))).flatten(1, 2)

    with pytest.raises(AssertionError, match="changed with the input after it"):
        assert_causal(unshifted, x)


@pytest.mark.law(ID)
def test_dropout_acts_in_training_only_and_heads_can_be_pruned() -> None:
    layer, x = AxialAttention(8, 2, axis=1, dropout=0.5), torch.randn(2, 3, 4, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), layer(x), rtol=0, atol=0)
    zeroed = copy.deepcopy(layer)
    with torch.no_grad():
        zeroed.out_proj.weight[:, :4] = 0
    layer.prune_heads([0])
    torch.testing.assert_close(layer(x), zeroed(x))


@pytest.mark.registration(ID)
def test_state_pickle_half_precision_and_repr() -> None:
    x = torch.randn(2, 3, 4, 8)
    for make in (lambda **kw: AxialAttention(8, 2, axis=0, **kw), lambda **kw: RasterAttention(8, 2, **kw)):
        layer, other = make(), make()
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file))
        want = layer(x)
        for again in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            torch.testing.assert_close(again(x), want, rtol=0, atol=0)
        for dtype in (torch.bfloat16, torch.float16):
            low = copy.deepcopy(layer).to(dtype)(x.to(dtype))
            assert low.dtype == dtype
            torch.testing.assert_close(low.float(), want, rtol=0.1, atol=0.1)
        assert make(device="meta")(x.to("meta")).shape == x.shape
        assert "axis=0" in repr(layer)
        for shape in ((0, 3, 4, 8), (2, 0, 4, 8), (2, 3, 0, 8)):
            assert layer(torch.randn(shape)).shape == shape
        before = layer(x)
        layer.reset_parameters()
        assert not torch.equal(layer(x), before)


@pytest.mark.registration(ID)
@pytest.mark.usefixtures("unchecked")
def test_compiles_without_a_graph_break() -> None:
    x = torch.randn(2, 3, 4, 8)
    for layer in (AxialAttention(8, 2, axis=0), RasterAttention(8, 2)):
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.refusal(ID)
def test_refusals() -> None:
    for wrong in (True, 1.0, None):
        with refuses(ConfigError, "axis", wrong):
            AxialAttention(8, 2, axis=wrong)
    with refuses(ConfigError, "grid axis", 2, "-2 to 1"):
        AxialAttention(8, 2, axis=2)(torch.randn(1, 3, 4, 8))
    with refuses(ConfigError, "5 for dim 12", "divisor"):
        AxialAttention(12, 5, axis=0)
    with refuses(ConfigError, "dtype", "torch.int64"):
        AxialAttention(8, 2, axis=0, dtype=torch.int64)
    for shape in ((3, 8), (2, 3, 4, 7)):
        with refuses(ShapeError, "grid of features", shape, 8):
            AxialAttention(8, 2, axis=0)(torch.randn(shape))
    for shape in ((2, 3, 8), (2, 3, 4, 7), (1, 2, 3, 4, 8)):
        with refuses(ShapeError, "grid of features", shape, "height"):
            RasterAttention(8, 2)(torch.randn(shape))


@pytest.mark.refusal("axial-attention")
def test_weights_refuse_an_axis_that_is_not_there() -> None:
    layer = AxialAttention(8, 2, axis=5)
    for call in (layer, layer.weights):
        with refuses(ConfigError, "got 5"):
            call(torch.randn(1, 2, 3, 8))
    with refuses(ShapeError, "int64"):
        AxialAttention(8, 2, axis=0)(torch.ones(1, 2, 3, 8, dtype=torch.int64))

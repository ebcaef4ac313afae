"""Cost against closed forms: what a paper's table would say, and what autograd must keep."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from handbook_src.errors import ConfigError
from handbook_src.metrics.cost import Cost, cost
from handbook_src.testing import refuses


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize(("stride", "positions"), [(1, 5 * 7), (2, 3 * 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_costs_its_closed_form(groups, stride, positions, bias):
    conv = nn.Conv2d(6, 12, 3, stride, 1, groups=groups, bias=bias)
    found = cost(conv, torch.ones(2, 6, 5, 7))
    weights = 12 * (6 // groups) * 9
    assert found == Cost(weights + 12 * bias, 2 * 2 * positions * weights, 4 * 2 * 6 * 5 * 7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_linear_layer_and_its_dtype(dtype):
    found = cost(nn.Linear(5, 3, dtype=dtype), torch.ones(7, 5, dtype=dtype))
    assert found == Cost(18, 2 * 7 * 5 * 3, 7 * 5 * dtype.itemsize)


def test_relu_keeps_its_output_once_for_the_next_layer_too():
    chain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    assert cost(chain, torch.ones(3, 4)).activation_bytes == 4 * 3 * (4 + 8)


def test_shared_parameters_count_once_and_their_work_twice():
    layer = nn.Linear(4, 4)
    assert cost(nn.Sequential(layer, layer), torch.ones(3, 4)) == Cost(20, 2 * 2 * 3 * 16, 4 * 3 * 8)


def test_evaluation_of_batch_norm_keeps_no_statistics():
    norm = nn.BatchNorm2d(3)
    x = torch.randn(2, 3, 4, 4)
    kept = 4 * x.numel()
    assert cost(norm, x).activation_bytes == kept + 2 * 4 * 3  # input, mean and inverse deviation
    assert cost(norm.eval(), x).activation_bytes == kept


def test_attention_is_counted():
    class Attention(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v)

    q, k = torch.ones(2, 3, 5, 8), torch.ones(2, 3, 7, 8)
    assert cost(Attention(), q, k, k).flops == 2 * 2 * 2 * 3 * 5 * 7 * 8


def test_nothing_changes():
    module = nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm1d(4), nn.Dropout(0.5))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    x = torch.randn(6, 4)
    kept, stream = x.clone(), torch.get_rng_state()
    with torch.no_grad():
        first = cost(module, x)
    assert first == cost(module, x)
    torch.testing.assert_close(x, kept, rtol=0, atol=0)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), stream)
    assert not x.requires_grad
    assert all(p.grad is None for p in module.parameters())


def test_the_meta_device_says_the_same():
    def build(device):
        parts = [nn.Conv2d(3, 8, 3, device=device), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10, device=device)]
        return nn.Sequential(*parts)

    assert cost(build("meta"), torch.ones(2, 3, 6, 6, device="meta")) == cost(build("cpu"), torch.ones(2, 3, 6, 6))


def test_a_view_weighs_what_it_holds_and_frozen_weights_need_no_input():
    layer = nn.Linear(4, 2)
    assert cost(layer, torch.ones(100, 4)[:3]).activation_bytes == 4 * 3 * 4
    assert cost(layer.requires_grad_(False), torch.ones(3, 4)) == Cost(10, 48, 0)


def test_an_empty_batch_costs_parameters_only():
    assert cost(nn.Linear(4, 2), torch.ones(0, 4)) == Cost(10, 0, 0)


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, run) -> None:
        super().__init__()
        self.run = run

    def forward(self, *args):
        return self.run(*args)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_products_with_vectors_are_counted(device):
    matrix, vector, left = (torch.ones(*n, device=device) for n in ((3, 5), (5,), (3,)))
    stack, other = torch.ones(2, 3, 4, device=device), torch.ones(2, 4, 5, device=device)
    for run, args, flops in (
        (torch.matmul, (matrix, vector), 30),
        (torch.matmul, (left, matrix), 30),
        (torch.dot, (vector, vector), 10),
        (torch.vdot, (vector, vector), 10),
        (torch.addmv, (left, matrix, vector), 30),
        (torch.addbmm, (matrix, stack, other), 2 * 2 * 3 * 4 * 5),
    ):
        assert cost(Call(run), *args).flops == flops, run


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bilinear_and_recurrent_layers_cost_their_closed_forms(device):
    """An LSTM on CPUs and a recurrent layer on CUDA are one operation each, which torch counts as nothing."""
    pair = torch.ones(2, 3, device=device), torch.ones(2, 4, device=device)
    assert cost(nn.Bilinear(3, 4, 5, device=device), *pair).flops == 2 * 2 * 5 * (3 * 4 + 4)
    x = torch.ones(5, 2, 8, device=device)
    for build, gates in ((nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)):
        found = cost(build(8, 16, 2, bidirectional=True, device=device), x)
        assert found.flops == 2 * 5 * 2 * 2 * gates * 16 * ((8 + 16) + (32 + 16)), build
    one = cost(nn.LSTM(8, 16, batch_first=True, device=device), x)
    assert (one.parameters, one.flops) == (4 * 16 * (8 + 16 + 2), 2 * 5 * 2 * 4 * 16 * (8 + 16))


def test_a_recurrent_layer_of_cudnn_costs_its_closed_form():
    def run(x, *weights):
        h = x.new_zeros(1, 2, 16)
        return torch.ops.aten._cudnn_rnn(x, weights, 4, None, h, h, 2, 16, 0, 1, False, 0.0, True, False, [], None)[0]

    shapes = (5, 2, 8), (64, 8), (64, 16), (64,), (64,)
    assert cost(Call(run), *(torch.ones(n, device="meta") for n in shapes)).flops == 2 * 5 * 2 * 64 * (8 + 16)


def test_a_forward_that_writes_to_its_parameters_changes_a_copy():
    for kind in (nn.Embedding, nn.EmbeddingBag):
        table = kind(10, 4, max_norm=0.1)
        before = table.weight.detach().clone()
        assert cost(table, torch.tensor([[1, 2, 3]])).parameters == 40
        assert torch.equal(table.weight, before)


def test_parameters_made_in_inference_mode_can_be_measured():
    with torch.inference_mode():
        layer = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        inside = cost(layer, torch.ones(2, 4))
    assert inside == cost(layer, torch.ones(2, 4)) == Cost(21, 48, 4 * 2 * (4 + 3) + 4 * 2 * 3)


def test_a_lazy_module_is_refused():
    with refuses(ConfigError, "LazyLinear"):
        cost(nn.LazyLinear(3), torch.ones(2, 4))
    with refuses(ConfigError, "Sequential"):
        cost(nn.Sequential(nn.Linear(4, 4), nn.LazyBatchNorm1d()), torch.ones(2, 4))


def test_integers_pass_through():
    assert cost(nn.Embedding(9, 4), torch.tensor([1, 2, 2])) == Cost(36, 0, 3 * 8)


def test_refuses_what_is_no_module():
    with refuses(ConfigError, "function"):
        cost(lambda x: x, torch.ones(1))

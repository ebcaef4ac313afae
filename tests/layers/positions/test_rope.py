"""The rotary layer: transformers' numbers, cached decoding, scaling, casts; its refusals."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.positions.rope import apply_rope, rope_cos_sin, rope_frequencies
from handbook_src.functional.positions.rope_scaling import RopeScaling
from handbook_src.layers.positions.rope import RotaryEmbedding
from handbook_src.testing import assert_parity, refuses
from handbook_src.testing.checker import unchecked
from handbook_src.testing.oracle import load


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parity("rope")
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("max_positions", [0, 4, 2048])
@pytest.mark.parametrize(("dim", "head"), [(8, 8), (4, 9), (2, 2)])
def test_the_layer_is_its_function(dim, head, max_positions, interleaved):
    layer = RotaryEmbedding(dim, base=500.0, interleaved=interleaved, max_positions=max_positions).double()
    tables = rope_cos_sin(torch.arange(3, 9), rope_frequencies(dim, 500.0, dtype=torch.float64))
    assert_parity(
        lambda q, k: layer(q, k, 3),
        lambda q, k: tuple(apply_rope(x, *tables, interleaved=interleaved) for x in (q, k)),
        [draw(2, 6, 4, head), draw(2, 6, 2, head, seed=1)],  # grouped keys
    )
    positions = torch.tensor([[3, 4, 5, 6, 7, 8], [0, 0, 0, 1, 2, 3]])  # left padding
    q, k = draw(2, 6, 4, head), draw(2, 6, 2, head, seed=1)
    got = layer(q, k, positions=positions)[0]
    torch.testing.assert_close(got[0], layer(q, k, 3)[0][0])
    torch.testing.assert_close(got[1, 2:], layer(q[1:, 2:], k[1:, 2:])[0][0])


@pytest.mark.outside("rope")
@pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "yarn", "llama3"])
def test_the_layer_is_llamas(kind):
    llama = load("transformers.models.llama.modeling_llama")
    t, trained, factor = 100, 64, 4.0
    parameters = {"rope_type": kind, "rope_theta": 10000.0}
    if kind != "default":
        parameters |= {"factor": factor, "original_max_position_embeddings": trained}
    if kind == "llama3":
        parameters |= {"high_freq_factor": 4.0, "low_freq_factor": 1.0}
    reach = int(trained * factor) if kind in ("yarn", "llama3") else trained
    config = llama.LlamaConfig(
        hidden_size=32, num_attention_heads=2, max_position_embeddings=reach, rope_parameters=parameters
    )
    q, k = draw(2, t, 2, 16).float(), draw(2, t, 1, 16, seed=1).float()
    cos, sin = llama.LlamaRotaryEmbedding(config)(q, torch.arange(t)[None])
    want = llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    scaling = None if kind == "default" else RopeScaling(kind, factor, trained)
    for got, expected in zip(RotaryEmbedding(16, scaling=scaling)(q, k), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)  # theirs forms the angle in float32


@pytest.mark.law("rope")
@pytest.mark.parametrize("scaling", [None, RopeScaling("linear", 4), RopeScaling("yarn", 4, 8)])
def test_cached_decoding_gives_what_the_whole_sequence_gives(scaling):
    layer = RotaryEmbedding(8, scaling=scaling, max_positions=5).double()  # the table ends on the way
    q, k = draw(2, 12, 3, 8), draw(2, 12, 3, 8, seed=1)
    whole = layer(q, k)
    steps = [layer(q[:, i : i + 1], k[:, i : i + 1], i) for i in range(12)]
    for i in (0, 1):
        torch.testing.assert_close(torch.cat([s[i] for s in steps], 1), whole[i], rtol=1e-12, atol=1e-12)


@pytest.mark.law("rope")
def test_dynamic_scaling_depends_on_the_length_and_only_beyond_the_trained_one():
    plain, dynamic = RotaryEmbedding(8), RotaryEmbedding(8, scaling=RopeScaling("dynamic", 4, 16))
    for t in (1, 16):
        assert torch.equal(plain.cos_sin(t)[0], dynamic.cos_sin(t)[0])
    longer = dynamic.cos_sin(40)[0]
    assert not torch.equal(longer, plain.cos_sin(40)[0])
    assert torch.equal(dynamic.cos_sin(40, positions=torch.arange(40))[0], longer)
    assert torch.equal(dynamic.cos_sin(1, 39)[0], longer[39:])
    assert torch.equal(dynamic.cos_sin(0, positions=torch.arange(0))[0], plain.cos_sin(0)[0])


@pytest.mark.law("rope")
def test_dynamic_scaling_turns_cached_keys_by_the_length_of_their_own_step():
    layer = RotaryEmbedding(8, scaling=RopeScaling("dynamic", 4, 16))
    q, k = draw(1, 20, 1, 8), draw(1, 20, 1, 8, seed=1)
    for t, differ in ((16, False), (20, True)):
        whole = layer(q[:, :t], k[:, :t])[1]
        steps = [layer(q[:, i : i + 1], k[:, i : i + 1], i)[1] for i in range(t)]
        assert torch.equal(steps[-1], whole[:, -1:])
        assert torch.equal(torch.cat(steps, 1), whole) != differ


@pytest.mark.law("rope")
def test_yarn_scales_the_scores_by_its_temperature():
    layer = RotaryEmbedding(8, scaling=RopeScaling("yarn", 8, 16))
    q = draw(1, 3, 1, 8)
    factor = layer(q, q)[0].norm(dim=-1) / q.norm(dim=-1)
    torch.testing.assert_close(factor, torch.full_like(factor, 0.1 * math.log(8) + 1), rtol=1e-6, atol=0)


@pytest.mark.registration("rope")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_leave_the_angles_alone(dtype):
    layer = RotaryEmbedding(8)
    exact = layer.cos.clone()
    layer.to(dtype)
    assert layer.cos.dtype == torch.float32
    assert torch.equal(layer.cos, exact)
    q = draw(1, 900, 2, 8).to(dtype)
    assert layer(q, q)[0].dtype == dtype
    want = RotaryEmbedding(8).double()(q.double(), q.double())[0]
    torch.testing.assert_close(layer(q, q)[0].double(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-2)
    layer.double()
    assert torch.equal(layer.cos, RotaryEmbedding(8, dtype=torch.float64).cos)


@pytest.mark.registration("rope")
def test_nothing_is_saved_and_copies_work():
    layer = RotaryEmbedding(8, scaling=RopeScaling("yarn", 4, 16))
    assert layer.state_dict() == {}
    assert not list(layer.parameters())
    q = draw(1, 5, 2, 8).float()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(q, q)[0], layer(q, q)[0])
    born = RotaryEmbedding(8, scaling=layer.scaling, device="meta")
    assert born.cos.is_meta
    assert torch.equal(born.to_empty(device="cpu")(q, q)[0], layer(q, q)[0])
    assert "yarn" in repr(layer)


@pytest.mark.registration("rope")
def test_the_layer_compiles_and_runs_under_autocast():
    layer, q = RotaryEmbedding(8), draw(2, 5, 2, 8).float()
    with unchecked():
        got = torch.compile(layer, fullgraph=True, backend="aot_eager")(q, q, 2)
    torch.testing.assert_close(got, layer(q, q, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(q.bfloat16(), q.bfloat16())[0].dtype == torch.bfloat16


@pytest.mark.law("rope")
def test_no_tokens_are_turned_into_no_tokens():
    q = draw(2, 0, 3, 8)
    assert RotaryEmbedding(8)(q, q)[0].shape == q.shape


@pytest.mark.refusal("rope")
def test_the_layer_refuses():
    for dim in (7, 0, -4, 2.5):
        with refuses(ConfigError, "RotaryEmbedding", dim):
            RotaryEmbedding(dim)
    for base in (0.0, -1.0, math.nan):
        with refuses(ConfigError, "base", base):
            RotaryEmbedding(8, base=base)
    with refuses(ConfigError, "max_positions", -1):
        RotaryEmbedding(8, max_positions=-1)
    layer, q = RotaryEmbedding(8), draw(2, 5, 3, 8)
    with refuses(ConfigError, "offset", -1):
        layer(q, q, -1)
    with refuses(ShapeError, "(2, 4, 3, 8)"):
        layer(q, q[:, :4])
    with refuses(ShapeError, "(2, 5, 3, 6)"):
        layer(q[..., :6], q)
    with refuses(ShapeError, "torch.float32"):
        layer(q, q, positions=torch.arange(5.0))  # type: ignore[arg-type]
    with refuses(ShapeError, "(4, 4)"):
        layer(q, q, positions=torch.arange(4))


@pytest.mark.refusal("rope")
def test_a_scaling_of_another_kind_is_refused() -> None:
    for bad in ("linear", {"kind": "linear", "factor": 2.0}):
        with refuses(ConfigError, "scaling", repr(bad)):
            RotaryEmbedding(4, scaling=bad)  # type: ignore[arg-type]

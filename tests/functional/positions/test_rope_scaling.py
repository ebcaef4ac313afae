"""Scaled rotary frequencies against transformers and the papers' formulas; what each leaves alone."""

from __future__ import annotations

import math

import pytest
import torch

from handbook_src.errors import ConfigError
from handbook_src.functional.positions.rope import rope_frequencies
from handbook_src.functional.positions.rope_scaling import RopeScaling, scaled_rope_frequencies
from handbook_src.testing import refuses
from handbook_src.testing.oracle import load

F64 = torch.float64


def transformers_says(dim: int, base: float, scaling: RopeScaling, length: int | None):
    llama = load("transformers.models.llama.modeling_llama")
    trained = scaling.original_length or 64
    parameters = {"rope_type": scaling.kind, "rope_theta": base, "factor": float(scaling.factor)}
    if scaling.kind in ("yarn", "llama3"):
        parameters["original_max_position_embeddings"] = trained
    if scaling.kind == "yarn":
        parameters |= {"beta_fast": scaling.fast, "beta_slow": scaling.slow}
        if scaling.attention_factor is not None:
            parameters["attention_factor"] = scaling.attention_factor
    if scaling.kind == "llama3":
        parameters |= {"high_freq_factor": scaling.fast, "low_freq_factor": scaling.slow}
    reach = trained if scaling.kind == "dynamic" else int(trained * scaling.factor)
    config = llama.LlamaConfig(
        hidden_size=2 * dim, num_attention_heads=2, max_position_embeddings=reach, rope_parameters=parameters
    )
    layer = llama.LlamaRotaryEmbedding(config)
    layer(torch.zeros(1), torch.arange(length or 1)[None])  # dynamic looks at the length here
    return layer.inv_freq, layer.attention_scaling


@pytest.mark.outside("rope")
@pytest.mark.parity("rope")
@pytest.mark.parametrize("dim", [6, 16, 128])
@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize(
    ("scaling", "length"),
    [
        (RopeScaling("linear", 4), None),
        (RopeScaling("linear", 1), None),
        (RopeScaling("dynamic", 2, 64), 200),
        (RopeScaling("dynamic", 1, 64), 65),
        (RopeScaling("dynamic", 8, 64), 3),
        (RopeScaling("yarn", 4, 2048), None),
        (RopeScaling("yarn", 16, 128), None),
        (RopeScaling("yarn", 4, 2048, slow=2, fast=8, attention_factor=1.5), None),
        (RopeScaling("llama3", 8, 8192), None),
        (RopeScaling("llama3", 2.5, 300, slow=2, fast=9), None),
    ],
    ids=lambda v: f"{v.kind}-{v.factor}" if isinstance(v, RopeScaling) else str(v),
)
def test_frequencies_are_transformers(dim, base, scaling, length):
    theirs, magnitude = transformers_says(dim, base, scaling, length)
    ours = scaled_rope_frequencies(dim, base, scaling, length=length)
    torch.testing.assert_close(ours, theirs, rtol=3e-6, atol=0)  # theirs is computed in float32 throughout
    assert scaling.magnitude == pytest.approx(magnitude)


@pytest.mark.outside("rope")
@pytest.mark.parity("rope")
def test_where_every_pair_turns_often_the_ramp_ends_at_the_last_index():
    scaling = RopeScaling("yarn", 4, 64)
    theirs, _ = transformers_says(8, 2.0, scaling, None)
    ours = scaled_rope_frequencies(8, 2.0, scaling)
    torch.testing.assert_close(ours, theirs, rtol=3e-6, atol=0)
    plain = rope_frequencies(8, 2.0)
    torch.testing.assert_close(ours, plain * (1 - 0.75 * torch.arange(4) / 7))  # without a bound by 14, not 7


@pytest.mark.parity("rope")
def test_frequencies_are_the_papers_formulas_in_float64():
    dim, base, s, trained = 12, 10000.0, 4.0, 512
    plain = [base ** (-2 * i / dim) for i in range(dim // 2)]
    want = {
        RopeScaling("linear", s): [f / s for f in plain],
        RopeScaling("ntk", s): [f / s ** (2 * i / (dim - 2)) for i, f in enumerate(plain)],
        RopeScaling("dynamic", s, trained): [f / (s * 2 - s + 1) ** (2 * i / (dim - 2)) for i, f in enumerate(plain)],
    }

    def gamma(f: float) -> float:
        return min(1.0, max(0.0, (f * trained / (2 * math.pi) - 1) / 3))

    want[RopeScaling("llama3", s, trained)] = [(1 - gamma(f)) * f / s + gamma(f) * f for f in plain]
    for scaling, expected in want.items():
        got = scaled_rope_frequencies(dim, base, scaling, length=2 * trained, dtype=F64)
        torch.testing.assert_close(got, torch.tensor(expected, dtype=F64), rtol=1e-12, atol=0)
    assert RopeScaling("yarn", 8, 64).magnitude == pytest.approx(0.1 * math.log(8) + 1)


@pytest.mark.law("rope")
@pytest.mark.parametrize("kind", ["linear", "ntk", "dynamic", "yarn", "llama3"])
def test_factor_one_and_trained_lengths_change_nothing(kind):
    plain = rope_frequencies(16, dtype=F64)
    same = RopeScaling(kind, 1, 128)
    torch.testing.assert_close(scaled_rope_frequencies(16, scaling=same, length=128, dtype=F64), plain)
    torch.testing.assert_close(scaled_rope_frequencies(16, dtype=F64), plain, rtol=0, atol=0)
    assert same.magnitude == 1.0
    dynamic = RopeScaling("dynamic", 8, 128)
    for length in (None, 0, 128):
        torch.testing.assert_close(scaled_rope_frequencies(16, scaling=dynamic, length=length, dtype=F64), plain)


@pytest.mark.law("rope")
@pytest.mark.parametrize("kind", ["ntk", "yarn", "llama3"])
def test_the_fastest_pair_is_kept_and_the_slowest_interpolated(kind):
    plain = rope_frequencies(32, dtype=F64)
    ratio = scaled_rope_frequencies(32, scaling=RopeScaling(kind, 8, 512), dtype=F64) / plain
    assert ratio[0].item() == pytest.approx(1)
    assert ratio[-1].item() == pytest.approx(1 / 8)
    assert (ratio.diff() <= 1e-12).all()


@pytest.mark.law("rope")
def test_a_trained_length_shorter_than_any_wave_interpolates_all_but_the_first():
    ratio = scaled_rope_frequencies(8, scaling=RopeScaling("yarn", 4, 3), dtype=F64) / rope_frequencies(8, dtype=F64)
    torch.testing.assert_close(ratio[1:], torch.full((3,), 0.25, dtype=F64))


@pytest.mark.refusal("rope")
@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ({"kind": "magic"}, "magic"),
        ({"factor": 0.5}, 0.5),
        ({"factor": -2}, -2),
        ({"factor": math.nan}, "nan"),
        ({"factor": math.inf}, "inf"),
        ({"factor": True}, True),
        ({"kind": "yarn", "original_length": None}, None),
        ({"kind": "dynamic", "original_length": None}, None),
        ({"kind": "llama3", "original_length": None}, None),
        ({"original_length": 0}, 0),
        ({"original_length": 12.5}, 12.5),
        ({"slow": 0}, 0),
        ({"slow": 2, "fast": 2}, 2),
        ({"fast": -1}, -1),
        ({"fast": math.nan}, "nan"),
        ({"attention_factor": 0.0}, 0.0),
    ],
)
def test_scalings_that_cannot_be_are_refused(arguments, value):
    with refuses(ConfigError, value):
        RopeScaling(**{"kind": "linear", "factor": 2, "original_length": 64, **arguments})


@pytest.mark.refusal("rope")
def test_dims_and_lengths_that_cannot_be_are_refused():
    for kind in ("ntk", "dynamic"):
        with refuses(ConfigError, kind, "rotary dim", 2):
            scaled_rope_frequencies(2, scaling=RopeScaling(kind, 2, 64))
    with refuses(ConfigError, "rotary dim", 5):
        scaled_rope_frequencies(5, scaling=RopeScaling("linear", 2))
    with refuses(ConfigError, "length", -1):
        scaled_rope_frequencies(8, scaling=RopeScaling("dynamic", 2, 64), length=-1)
    with refuses(ConfigError, "yarn base", 1.0):
        scaled_rope_frequencies(8, 1.0, RopeScaling("yarn", 2, 64))

"""The sampling filters against transformers' processors, their edges and their laws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from handbook_src.errors import ConfigError, DataError
from handbook_src.functional.transformers.sampling import greedy, sample, temperature_logits, top_k_logits, top_p_logits
from handbook_src.testing import oracle, refuses


def logits(b: int = 5, v: int = 17) -> Tensor:
    return torch.randn(b, v, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3


def ties() -> Tensor:
    return torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0, 2.0], [0.0, -1.0, 5.0, 5.0, 5.0]])


def processor(name: str, *args: Any) -> Any:
    return getattr(oracle.load("transformers"), name)(*args)


@pytest.mark.outside("gpt")
@pytest.mark.parity("gpt")
@pytest.mark.parametrize("k", [1, 3, 16, 17, 50])
def test_top_k_equals_transformers(k: int) -> None:
    for z in (logits(), ties(), logits(2, 1)):
        assert torch.equal(top_k_logits(z, k), processor("TopKLogitsWarper", k)(None, z))


@pytest.mark.outside("gpt")
@pytest.mark.parity("gpt")
@pytest.mark.parametrize("p", [1e-12, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_top_p_equals_transformers(p: float) -> None:
    for z in (logits(), ties(), logits(2, 1), top_k_logits(logits(), 4)):
        assert torch.equal(top_p_logits(z, p), processor("TopPLogitsWarper", p)(None, z))


@pytest.mark.outside("gpt")
@pytest.mark.parity("gpt")
@pytest.mark.parametrize("t", [0.01, 0.7, 1.0, 3.0])
def test_temperature_equals_transformers(t: float) -> None:
    assert torch.equal(temperature_logits(logits(), t), processor("TemperatureLogitsWarper", t)(None, logits()))


@pytest.mark.law("gpt")
def test_ties_with_the_kth_stay() -> None:
    assert top_k_logits(ties(), 2).isfinite().sum(-1).tolist() == [3, 5, 3]


@pytest.mark.law("gpt")
@pytest.mark.parametrize("p", [0.05, 0.4, 0.8, 0.99])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p: float) -> None:
    z = logits(50, 13)
    q = z.softmax(-1)
    kept = top_p_logits(z, p).isfinite()
    mass = (q * kept).sum(-1)
    least = q.masked_fill(~kept, 2.0).amin(-1)
    assert (mass >= p - 1e-12).all()
    assert (mass - least < p).all()  # one token less would not do
    assert (q.masked_fill(kept, -1.0).amax(-1) <= least).all()


@pytest.mark.law("gpt")
def test_draws_follow_the_filtered_distribution() -> None:
    z = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(40_000, 4)
    drawn = sample(z, temperature=2.0, top_k=3, generator=torch.Generator().manual_seed(0))
    want = torch.tensor([1.0, 0.5, 0.0]).softmax(-1)
    share = torch.bincount(drawn, minlength=4) / len(z)
    assert share[3] == 0
    torch.testing.assert_close(share[:3], want, rtol=0, atol=0.01)


@pytest.mark.law("gpt")
def test_any_leading_axes_and_half_precision() -> None:
    z = logits(6, 17).view(2, 3, 17)
    assert greedy(z).shape == (2, 3)
    assert torch.equal(greedy(z), z.argmax(-1))
    assert sample(z, generator=torch.Generator().manual_seed(0)).shape == (2, 3)
    assert sample(z[0, 0], top_k=1) == z[0, 0].argmax()
    assert sample(z.bfloat16(), top_p=0.9).dtype == torch.long
    assert torch.equal(top_p_logits(z, 0.9).view(6, 17), top_p_logits(z.view(6, 17), 0.9))
    assert greedy(torch.tensor([[1.0, 1.0]])).item() == 0


@pytest.mark.refusal("gpt")
@pytest.mark.parametrize("t", [0.0, -1.0, float("inf"), float("nan"), True, "warm", None])
def test_refuses_a_temperature_that_is_no_temperature(t: float) -> None:
    with refuses(ConfigError, "temperature", repr(t), "greedy"):
        sample(logits(), temperature=t)


@pytest.mark.law("gpt")
@pytest.mark.parametrize("t", [1e-3, 1e-38, 1e-45])
def test_the_colder_the_nearer_to_greedy(t: float) -> None:
    for z in (logits(), 100 * logits().float(), logits().half()):
        assert torch.equal(sample(z, temperature=t, top_k=4, top_p=0.9), greedy(z))


@pytest.mark.refusal("gpt")
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_refuses_scores_that_choose_nothing(broken: float) -> None:
    z = logits().clone()
    z[1] = broken
    for choose in (greedy, sample):
        with refuses(DataError, "logits", "finite"):
            choose(z)
    z[1, 0] = 0.0
    if broken == float("-inf"):  # what is hidden may be minus infinity
        assert sample(z)[1] == greedy(z)[1] == 0


@pytest.mark.refusal("gpt")
def test_refuses_empty_choices() -> None:
    for k in (0, True, 2.5):
        with refuses(ConfigError, "top_k", repr(k)):
            sample(logits(), top_k=k)
    for p in (0.0, 1.1, -0.1, True, "most"):
        with refuses(ConfigError, "top_p", repr(p)):
            sample(logits(), top_p=p)


@pytest.mark.parity("gpt")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_top_p_of_two_bytes_keeps_what_float32_keeps(dtype: torch.dtype) -> None:
    z = logits(3, 5000).to(dtype)
    kept = top_p_logits(z, 0.9)
    assert kept.dtype == dtype
    assert torch.equal(kept.isfinite(), top_p_logits(z.float(), 0.9).isfinite())

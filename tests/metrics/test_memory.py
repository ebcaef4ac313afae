"""Peak memory: what is held at the same time counts, what was freed does not."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from handbook_src.errors import ConfigError
from handbook_src.metrics.memory import peak_bytes
from handbook_src.testing import refuses

MB = 2**20


def block() -> torch.Tensor:
    return torch.empty(MB // 4)


def test_what_is_freed_before_does_not_add() -> None:
    def one_after_the_other() -> None:
        for _ in range(3):
            block()

    def together() -> list[torch.Tensor]:
        return [block() for _ in range(3)]

    assert peak_bytes(one_after_the_other) == MB
    assert peak_bytes(together) == 3 * MB


def test_inputs_do_not_count_and_results_do() -> None:
    x = block()
    assert peak_bytes(lambda: x.view(2, -1)) == 0
    assert peak_bytes(lambda: x.neg()) == MB


def test_what_autograd_saves_counts() -> None:
    x = block().requires_grad_()
    assert peak_bytes(lambda: x.exp().exp()) == 2 * MB
    with torch.no_grad():
        assert peak_bytes(lambda: x.exp()) == MB


def test_a_fused_operation_holds_no_score_matrix() -> None:
    q = torch.randn(1, 1, 1024, 32)
    with torch.no_grad():
        fused = peak_bytes(lambda: F.scaled_dot_product_attention(q, q, q))
        plain = peak_bytes(lambda: (q @ q.mT).softmax(-1) @ q)
    assert plain >= 8 * MB
    assert fused < plain / 4


def test_a_number_is_no_call() -> None:
    with refuses(ConfigError, "int"):
        peak_bytes(3)  # type: ignore[arg-type]


def test_a_device_that_is_none() -> None:
    with refuses(ConfigError, "banana"):
        peak_bytes(lambda: None, device="banana")

"""Characters to words: a loop written out, the padding law, highways, bytes, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from handbook_src.errors import ConfigError, DataError, ShapeError
from handbook_src.functional.embeddings.char_cnn import char_cnn, highway, word_bytes
from handbook_src.testing import assert_parity, refuses

BACKENDS = ["auto", "torch", "reference"]
WIDTHS = [(1, 3), (2, 1), (5, 4)]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def parameters(d: int = 3) -> list[Tensor]:
    return [draw(9, d), *(draw(n, d, w) for w, n in WIDTHS), *(draw(n) for _, n in WIDTHS)]


def words(*rows: list[int], width: int = 8) -> Tensor:
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def written_out(chars, activation, table, *rest):
    """Word by word, filter by filter, window by window, on the unpadded word."""
    weights, biases = rest[: len(WIDTHS)], rest[len(WIDTHS) :]
    phi = {"tanh": torch.tanh, "relu": lambda x: x * (x > 0)}[activation]
    out = []
    for word in chars.view(-1, chars.shape[-1]).tolist():
        while word and word[-1] == 0:
            word = word[:-1]
        for weight, bias in zip(weights, biases, strict=True):
            for k in range(len(weight)):
                answers = []
                for i in range(max(1, len(word) - weight.shape[2] + 1)):
                    total = bias[k]
                    for j in range(weight.shape[2]):
                        if i + j < len(word) and word[i + j] != 0:
                            total = total + (weight[k, :, j] * table[word[i + j]]).sum()
                    answers.append(phi(total))
                out.append(torch.stack(answers).max())
    return torch.stack(out).view(*chars.shape[:-1], -1)


@pytest.mark.parity("char-cnn-embedding")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("chars", [
    words([1, 2, 3, 4, 5, 6, 7, 8], [3], [4, 4], [], [1, 2, 3, 4, 5]),
    words([7], width=1),
    words([1, 0, 2, 5, 6, 7], [1, 2, 3], width=6).view(2, 1, 6),
    words([5, 3, 8]).int(),
])  # fmt: skip
def test_every_window_of_every_word(backend, activation, chars) -> None:
    assert_parity(
        lambda c, t, *p: char_cnn(c, t, p[:3], p[3:], activation=activation, backend=backend),
        lambda c, *p: written_out(c, activation, *p),
        [chars, *parameters()],
    )


@pytest.mark.parity("char-cnn-embedding")
def test_an_unpadded_word_is_torchs_convolution_and_maximum() -> None:
    table, *p = parameters()
    chars = torch.randint(1, 9, (4, 7))
    x = F.embedding(chars, table).transpose(1, 2)
    want = torch.cat([torch.tanh(F.conv1d(x, w, b)).amax(-1) for w, b in zip(p[:3], p[3:], strict=True)], -1)
    torch.testing.assert_close(char_cnn(chars, table, p[:3], p[3:]), want)


@pytest.mark.law("char-cnn-embedding")
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_never_enters(backend) -> None:
    table, *p = parameters()
    table.requires_grad_()
    chars = words([1, 2, 3], [8], [2, 2, 2, 2, 2, 2, 2], width=7)
    y = char_cnn(chars, table, p[:3], p[3:], backend=backend)
    for more in (1, 4, 30):
        longer = F.pad(chars, (0, more))
        torch.testing.assert_close(char_cnn(longer, table, p[:3], p[3:], backend=backend), y)
    y.sum().backward()
    assert (table.grad[0] == 0).all()
    with torch.no_grad():
        table[0] = 1e3
    torch.testing.assert_close(char_cnn(chars, table, p[:3], p[3:], backend=backend), y)
    alone = char_cnn(chars[1:2, :1], table, p[:3], p[3:], backend=backend)
    torch.testing.assert_close(alone, y[1:2])
    with torch.no_grad():
        table[0] = torch.nan
    torch.testing.assert_close(char_cnn(chars, table, p[:3], p[3:], backend=backend), y)
    torch.testing.assert_close(char_cnn(chars[0], table, p[:3], p[3:], backend=backend), y[0])
    negative = char_cnn((chars - 1) % 9, table.roll(-1, 0), p[:3], p[3:], padding_idx=-1, backend=backend)
    torch.testing.assert_close(negative, y)


@pytest.mark.law("char-cnn-embedding")
def test_the_maximum_forgets_where_but_not_which() -> None:
    table, *p = parameters()
    single = ([p[0]], [p[3]])  # filters of width 1 see letters alone
    a, b = char_cnn(words([1, 2, 3], [3, 1, 2]), table, *single)
    torch.testing.assert_close(a, b)
    a, b = char_cnn(words([1, 2, 3], [3, 1, 2]), table, p[:3], p[3:])
    assert not torch.allclose(a, b)


@pytest.mark.parity("char-cnn-embedding")
def test_highway_is_the_papers_equation() -> None:
    def oracle(y, w, b, wt, bt):
        t = 1 / (1 + torch.exp(-(y @ wt.T + bt)))
        return t * (y @ w.T + b).clamp_min(0) + (1 - t) * y

    given = [draw(2, 3, 5), draw(5, 5), draw(5), draw(5, 5), draw(5)]
    assert_parity(highway, oracle, given)
    shut = highway(given[0], *given[1:4], torch.full((5,), -800.0, dtype=torch.float64))
    assert torch.equal(shut, given[0])


@pytest.mark.law("char-cnn-embedding")
def test_words_become_bytes_between_marks() -> None:
    assert word_bytes(["ab", ""]).tolist() == [[257, 98, 99, 258], [257, 258, 0, 0]]
    assert word_bytes(["é"], 6).tolist() == [[257, 0xC3 + 1, 0xA9 + 1, 258, 0, 0]]
    assert word_bytes(["abcdef"], 4).tolist() == [[257, 98, 99, 258]]
    assert word_bytes([]).shape == (0, 2)
    assert torch.equal(word_bytes(map(str.lower, ["A", "BC"])), word_bytes(["a", "bc"]))


@pytest.mark.registration("char-cnn-embedding")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_and_compile(dtype, unchecked) -> None:
    table, *p = (t.to(dtype) for t in parameters())
    chars = words([1, 2, 3], [8])
    got = char_cnn(chars, table, p[:3], p[3:], backend="reference")
    exact = char_cnn(chars, table.double(), [w.double() for w in p[:3]], [b.double() for b in p[3:]])
    assert got.dtype == dtype
    assert (got - exact).abs().max() < 2 * torch.finfo(dtype).eps
    table, p = table.double(), [t.double() for t in p]
    compiled = torch.compile(lambda c, t: char_cnn(c, t, p[:3], p[3:]), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(chars, table), exact)
    assert char_cnn(chars[:0], table, p[:3], p[3:]).shape == (0, 8)


@pytest.mark.refusal("char-cnn-embedding")
def test_bad_input_is_refused() -> None:
    table, *p = parameters()
    weights, biases = p[:3], p[3:]
    with refuses(ShapeError, "token 9", 8):
        char_cnn(words([9]), table, weights, biases)
    for bad in (torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)):
        with refuses(ShapeError, bad.dtype):
            char_cnn(bad, table, weights, biases)
    for shape in ((2, 0), ()):
        with refuses(ShapeError, shape, "one character"):
            char_cnn(torch.zeros(shape, dtype=torch.long), table, weights, biases)
    with refuses(ConfigError, "'gelu'", "tanh"):
        char_cnn(words([1]), table, weights, biases, activation="gelu")
    with refuses(ConfigError, "3 weights, 2 biases"):
        char_cnn(words([1]), table, weights, biases[:2])
    with refuses(ConfigError, "0 weights"):
        char_cnn(words([1]), table, [], [])
    with refuses(ShapeError, (3, 4, 1), 3):
        char_cnn(words([1]), table, [draw(3, 4, 1)], [draw(3)])
    with refuses(ShapeError, "bias", (2,)):
        char_cnn(words([1]), table, [draw(3, 3, 1)], [draw(2)])
    with refuses(ShapeError, (2, 4), 5):
        highway(draw(2, 4), draw(5, 5), draw(5), draw(5, 5), draw(5))
    for bad_padding in (9, -10, None, 0.5, True, "0"):
        with refuses(ConfigError, "padding_idx", bad_padding):
            char_cnn(words([1]), table, weights, biases, padding_idx=bad_padding)  # type: ignore[arg-type]
    with refuses(ConfigError, ["tanh"]):
        char_cnn(words([1]), table, weights, biases, activation=["tanh"])  # type: ignore[arg-type]
    for backend in BACKENDS:
        with refuses(ShapeError, torch.float32, torch.float64):
            char_cnn(words([1]), table, [w.float() for w in weights], biases, backend=backend)
        for empty in ((3, 3, 0), (0, 3, 2)):
            with refuses(ShapeError, "weight", empty):
                char_cnn(words([1]), table, [draw(*empty)], [draw(empty[0])], backend=backend)


@pytest.mark.refusal("char-cnn-embedding")
def test_bad_highways_and_words_are_refused() -> None:
    for name, shape in (("weight", (4, 5)), ("bias", (1,)), ("gate_weight", (1, 5)), ("gate_bias", (4,))):
        parts = {"weight": draw(5, 5), "bias": draw(5), "gate_weight": draw(5, 5), "gate_bias": draw(5)}
        with refuses(ShapeError, f"highway {name}", shape):
            highway(draw(2, 5), **{**parts, name: draw(*shape)})
        with refuses(ShapeError, torch.float32):
            highway(draw(2, 5), **{**parts, name: parts[name].float()})
    for length in (2, 0, True, 4.0):
        with refuses(ConfigError, "length", repr(length)):
            word_bytes(["a"], length)  # type: ignore[arg-type]
    for bad_words in ("abc", None, 5, [1], ["a", None], ["\ud800"]):
        with refuses(DataError, "word_bytes"):
            word_bytes(bad_words)  # type: ignore[arg-type]

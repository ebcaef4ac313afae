"""Mask rules: each against a loop over its definition, their algebra, and their three forms."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.mask import (
    Mask,
    along,
    anticausal,
    block,
    causal,
    dilated,
    documents,
    fixed,
    full,
    global_tokens,
    left_padding,
    padding,
    per_head,
    prefix,
    prefix_lm,
    random,
    sinks,
    strided,
    window,
)
from handbook_src.testing import refuses

IDS = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [5, 5, 5, 5, 5, 5, 9]])
LAYOUT = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
LENGTHS = torch.tensor([3, 0])

#: rule, and what its definition says of sample b, head h, query at t, key at s
DEFINITIONS: list[tuple[Mask, Callable[[int, int, int, int], bool]]] = [
    (full, lambda b, h, t, s: True),
    (causal, lambda b, h, t, s: s <= t),
    (anticausal, lambda b, h, t, s: s >= t),
    (window(1), lambda b, h, t, s: t == s),
    (window(3), lambda b, h, t, s: abs(t - s) < 3),
    (sinks(0), lambda b, h, t, s: False),
    (sinks(2), lambda b, h, t, s: s < 2),
    (prefix(4), lambda b, h, t, s: s < 4),
    (prefix(LENGTHS), lambda b, h, t, s: s < LENGTHS[b]),
    (prefix_lm(3), lambda b, h, t, s: s <= t or s < 3),
    (prefix_lm(LENGTHS), lambda b, h, t, s: s <= t or s < LENGTHS[b]),
    (padding(LENGTHS), lambda b, h, t, s: s < LENGTHS[b]),
    (left_padding(LENGTHS), lambda b, h, t, s: s >= LENGTHS[b]),
    (dilated(1), lambda b, h, t, s: True),
    (dilated(3), lambda b, h, t, s: (t - s) % 3 == 0),
    (global_tokens(0), lambda b, h, t, s: t == 0 or s == 0),
    (global_tokens(1, 5), lambda b, h, t, s: t in (1, 5) or s in (1, 5)),
    (block(3), lambda b, h, t, s: t // 3 == s // 3),
    (block(3, LAYOUT), lambda b, h, t, s: bool(LAYOUT[t // 3, s // 3])),
    (block(3, torch.stack([LAYOUT, ~LAYOUT])), lambda b, h, t, s: bool(LAYOUT[t // 3, s // 3]) != (h == 1)),
    (strided(1), lambda b, h, t, s: s <= t),
    (strided(3), lambda b, h, t, s: s in range(max(0, t - 3), t + 1) or s in range(t, -1, -3)),
    (fixed(3), lambda b, h, t, s: s <= t and (s // 3 == t // 3 or s % 3 == 2)),
    (fixed(4, 2), lambda b, h, t, s: s <= t and (s // 4 == t // 4 or s % 4 in (2, 3))),
    (along(0, 3, 3), lambda b, h, t, s: t % 3 == s % 3),
    (along(1, 2, 4), lambda b, h, t, s: t // 4 == s // 4),
    (along(1, 2, 2, 2), lambda b, h, t, s: t % 2 == s % 2 and t // 4 == s // 4),
    (documents(IDS), lambda b, h, t, s: bool(IDS[b, t] == IDS[b, s])),
    (per_head(causal, window(2)), lambda b, h, t, s: s <= t if h == 0 else abs(t - s) < 2),
    (causal & (window(3) | sinks(1)), lambda b, h, t, s: s <= t and (abs(t - s) < 3 or s < 1)),
    (~(causal & padding(LENGTHS)), lambda b, h, t, s: not (s <= t and s < LENGTHS[b])),
    (per_head(full, ~causal) & documents(IDS), lambda b, h, t, s: bool(IDS[b, t] == IDS[b, s]) and (h == 0 or s > t)),
]
RULES = [m for m, _ in DEFINITIONS] + [random(0.3, seed=1)]


def four(rule: Mask, t: int, s: int, **kw: int) -> torch.Tensor:
    return rule.dense(t, s, **kw).expand(2, 2, t, s)


@pytest.mark.parity("attention-masks", "causal-attention", "bidirectional-attention", "prefix-lm")
@pytest.mark.parametrize(("rule", "means"), DEFINITIONS, ids=[str(m) for m, _ in DEFINITIONS])
@pytest.mark.parametrize(("t", "s"), [(7, 7), (2, 7), (1, 6), (1, 1), (0, 3)])
def test_a_rule_is_its_definition(rule: Mask, means: Callable[..., bool], t: int, s: int) -> None:
    got = four(rule, t, s)
    assert got.dtype == torch.bool
    for b, h, i, j in itertools.product(range(2), range(2), range(t), range(s)):
        assert got[b, h, i, j].item() == means(b, h, i + s - t, j), (b, h, i, j)


@pytest.mark.parity("attention-masks")
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_an_offset_places_the_first_query(rule: Mask) -> None:
    whole = four(rule, 7, 7)
    for start in range(5):
        torch.testing.assert_close(four(rule, 2, 7, offset=start), whole[:, :, start : start + 2])


@pytest.mark.law("attention-masks")
@pytest.mark.parametrize(("a", "b"), list(itertools.pairwise(RULES)), ids=str)
def test_rules_form_a_boolean_algebra(a: Mask, b: Mask) -> None:
    def same(x: Mask, y: Mask) -> None:
        torch.testing.assert_close(four(x, 6, 6), four(y, 6, 6))

    same(~(a & b), ~a | ~b)
    same(~(a | b), ~a & ~b)
    same(~~a, a)
    same(a & b, b & a)
    same(a & (a | b), a)
    same(a & full, a)
    same(a | ~a, full)
    torch.testing.assert_close(four(a & b, 6, 6), four(a, 6, 6) & four(b, 6, 6))
    torch.testing.assert_close(four(a | b, 6, 6), four(a, 6, 6) | four(b, 6, 6))


@pytest.mark.parity("attention-masks")
@pytest.mark.outside("attention-masks")
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_flexattention_reads_the_same_matrix(rule: Mask) -> None:
    from torch.nn.attention.flex_attention import create_mask

    for t, s in ((7, 7), (3, 7)):
        got = create_mask(rule.flex(offset=s - t), 2, 2, t, s, device="cpu")
        torch.testing.assert_close(got, four(rule, t, s))


@pytest.mark.parity("attention-masks")
@pytest.mark.outside("attention-masks", "causal-attention", "bidirectional-attention", "prefix-lm")
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "rule",
    [full, causal & (window(3) | sinks(1)), prefix_lm(LENGTHS), documents(IDS) & per_head(full, causal), random(0.3)],
    ids=str,
)
def test_dense_sdpa_and_flex_give_the_same_attention(rule: Mask) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    for t, s in ((7, 7), (3, 7)):
        q, k, v = (torch.randn(2, 2, n, 8) for n in (t, s, s))
        dense = F.scaled_dot_product_attention(q, k, v, attn_mask=four(rule, t, s))
        with warnings.catch_warnings(), torch.no_grad():
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
            flex = flex_attention(q, k, v, block_mask=rule.block_mask(t, s))
        torch.testing.assert_close(flex, dense, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, attn_mask=rule.sdpa(t, s)), dense)


@pytest.mark.parity("attention-masks")
def test_flex_alone_evaluates_index_by_index() -> None:
    rule = causal & (window(3) | sinks(1)) & padding(LENGTHS)
    mod, want = rule.flex(offset=2), rule.dense(5, 7)
    for b, i, j in itertools.product(range(2), range(5), range(7)):
        at = [torch.tensor(x) for x in (b, 0, i, j)]
        assert mod(*at).item() == want[b, 0, i, j].item()


@pytest.mark.law("attention-masks")
def test_random_is_a_function_of_its_indices_and_keeps_its_share() -> None:
    rule = random(0.3, seed=4)
    big = rule.dense(400)
    torch.testing.assert_close(rule.dense(400), big)
    torch.testing.assert_close(rule.dense(50, 400), big[-50:])
    torch.testing.assert_close(rule.dense(90), big[:90, :90])
    # 160,000 draws: four standard deviations are 0.0046; rows and columns are drawn apart
    assert abs(big.float().mean().item() - 0.3) < 0.005
    assert (big.float().mean(0) - 0.3).abs().max() < 0.13
    assert (big.float().mean(1) - 0.3).abs().max() < 0.13
    assert not torch.equal(big, big.T)
    assert not torch.equal(random(0.3, seed=5).dense(400), big)
    assert not random(0.0).dense(9).any()
    assert random(1.0).dense(9).all()


@pytest.mark.law("prefix-lm")
def test_prefix_lm_is_full_in_the_prefix_and_causal_after_it() -> None:
    m = prefix_lm(3).dense(8)
    assert m[:3, :3].all()
    assert m[3:, :3].all()
    assert not m[:3, 3:].any()
    torch.testing.assert_close(m[3:, 3:], causal.dense(5))
    torch.testing.assert_close(prefix_lm(0).dense(8), causal.dense(8))
    torch.testing.assert_close(prefix_lm(8).dense(8), full.dense(8))


@pytest.mark.law("attention-masks")
def test_a_sliding_window_sees_n_keys_and_sinks_stay() -> None:
    m = (causal & (window(3) | sinks(2))).dense(9)
    assert m.sum(-1).tolist() == [1, 2, 3, 4, 5, 5, 5, 5, 5]
    assert (causal & window(3)).dense(9).sum(-1).tolist() == [1, 2, 3, 3, 3, 3, 3, 3, 3]


@pytest.mark.law("attention-masks")
def test_not_causal_is_not_backward() -> None:
    assert not (~causal).dense(4).diagonal().any(), "a query must be able to see itself"
    assert anticausal.dense(4).diagonal().all()
    torch.testing.assert_close(anticausal.dense(5), causal.dense(5).T)


@pytest.mark.law("attention-masks")
@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (causal & (window(256) | sinks(4)), "causal & (window(256) | sinks(4))"),
        (~(causal & window(2)), "~(causal & window(2))"),
        (~causal | full & sinks(1), "~causal | full & sinks(1)"),
        ((causal | prefix(2)) & padding(torch.tensor([1, 2])), "(causal | prefix(2)) & padding(int64[2])"),
        (per_head(causal | full, window(2)) & dilated(2), "per_head(causal | full, window(2)) & dilated(2)"),
        (padding(torch.arange(9)), "padding(int64[9])"),
        (random(0.25, seed=3) | global_tokens(0, 2), "random(0.25, seed=3) | global_tokens(0, 2)"),
        (block(2, LAYOUT), "block(2, layout=bool[3, 3])"),
    ],
)
def test_a_rule_prints_as_it_is_written(rule: Mask, text: str) -> None:
    assert repr(rule) == text


@pytest.mark.registration("attention-masks")
def test_a_rule_of_ones_own() -> None:
    even = Mask("even", lambda b, h, t, s: s % 2 == 0, positional=False)
    assert (even & causal).dense(4).int().tolist() == [[1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0], [1, 0, 1, 0]]
    assert even.dense(3, 2).shape == (3, 2), "a rule that does not compare positions may have more queries than keys"


@pytest.mark.law("attention-masks")
@pytest.mark.parametrize("rule", [full, sinks(1), prefix(2), padding(LENGTHS), left_padding(LENGTHS)], ids=str)
def test_rules_of_keys_alone_may_have_more_queries_than_keys(rule: Mask) -> None:
    assert not rule.positional
    torch.testing.assert_close(four(rule, 5, 3), four(rule, 1, 3).expand(-1, -1, 5, -1))
    assert (rule & causal).positional


@pytest.mark.registration("attention-masks")
def test_lengths_may_be_int32() -> None:
    torch.testing.assert_close(padding(LENGTHS.int()).dense(4), padding(LENGTHS).dense(4))
    torch.testing.assert_close(documents(IDS.int()).dense(7), documents(IDS).dense(7))


@pytest.mark.refusal("attention-masks", "prefix-lm", "causal-attention", "bidirectional-attention")
def test_refusals() -> None:
    for wrong in (0, -1, 2.5, True):
        with refuses(ConfigError, "window size", wrong):
            window(wrong)  # type: ignore[arg-type]
    for make, what in ((sinks, "sinks"), (prefix, "prefix length"), (prefix_lm, "prefix length")):
        with refuses(ConfigError, what, -1):
            make(-1)
    for make, what in ((dilated, "dilation step"), (block, "block size")):
        with refuses(ConfigError, what, 0):
            make(0)
    with refuses(ConfigError, "global tokens", "none"):
        global_tokens()
    with refuses(ConfigError, "global token", -2):
        global_tokens(-2)
    with refuses(ConfigError, "per_head", "none"):
        per_head()
    for share in (-0.1, 1.5):
        with refuses(ConfigError, "random share", share):
            random(share)
    with refuses(ConfigError, "random seed", -1):
        random(0.5, seed=-1)
    with refuses(ShapeError, "t=5", "s=3", "offset"):
        causal.dense(5, 3)
    with refuses(ShapeError, "t=5", "s=3", "causal & window(2)"):
        (causal & window(2)).block_mask(5, 3)
    with refuses(ShapeError, "block", 7, 6):
        block(2, LAYOUT).dense(7)
    with refuses(ShapeError, "documents", 9, 7):
        documents(IDS).dense(2, 9)
    with refuses(ConfigError, "truth", "causal", "&, | or ~"):
        causal and window(2)
    with refuses(ShapeError, "batch", [2, 3]):
        padding(LENGTHS) & padding(torch.tensor([1, 2, 3]))
    with refuses(ShapeError, "heads", [2, 3]):
        per_head(full, full) & per_head(full, full, full)


@pytest.mark.refusal("attention-masks")
@pytest.mark.parametrize("form", ["dense", "sdpa", "block_mask"])
def test_sizes_of_a_mask_are_whole_numbers(form: str) -> None:
    write = getattr(causal | window(2), form)
    for wrong in (-1, 2.5, True, "x", float("nan"), [1]):
        with refuses(ConfigError, "queries", wrong):
            write(wrong, 4)
        with refuses(ConfigError, "keys", wrong):
            write(4, wrong)
    for wrong in (2.5, True, "x", [1]):
        with refuses(ConfigError, "offset", wrong):
            write(4, 4, offset=wrong)
    if form == "block_mask":
        with refuses(ConfigError, "queries", 0, "at least 1"):
            write(0, 4)


@pytest.mark.refusal("attention-masks", "chunked-attention", "axial-attention")
def test_refusals_of_the_sparse_patterns() -> None:
    for wrong in (0, -1, True, 2.0, None):
        with refuses(ConfigError, "stride", wrong):
            strided(wrong)
        with refuses(ConfigError, "stride", wrong):
            fixed(wrong)
        with refuses(ConfigError, "summary keys", wrong):
            fixed(4, wrong)
        with refuses(ConfigError, "axis of a grid", wrong):
            along(0, 3, wrong)
    with refuses(ConfigError, "summary keys", 5, 4):
        fixed(4, 5)
    for axis in (2, -1, True, 0.0):
        with refuses(ConfigError, "axis of a grid", axis, "0 to 1"):
            along(axis, 3, 3)
    with refuses(ConfigError, "axis of a grid", "one axis or more"):
        along(0)
    with refuses(ShapeError, "along(0, 3, 3)", 10, 9):
        along(0, 3, 3).dense(10)
    with refuses(ShapeError, "block layout", (2, 2, 3)):
        block(3, torch.ones(2, 2, 3).bool())


@pytest.mark.law("chunked-attention", "axial-attention")
def test_the_sparse_patterns_are_what_older_words_say() -> None:
    torch.testing.assert_close(along(1, 3, 5).dense(15), block(5).dense(15))
    torch.testing.assert_close(along(0, 3, 5).dense(15), dilated(5).dense(15))
    torch.testing.assert_close(fixed(4, 4).dense(11), causal.dense(11))
    torch.testing.assert_close(strided(20).dense(11), causal.dense(11))
    layout = torch.tensor([[True, False], [True, True]])
    torch.testing.assert_close(four(block(3, layout[None]), 6, 6), four(block(3, layout), 6, 6))  # one head
    assert str(strided(3) | fixed(4)) == "strided(3) | fixed(4, 1)"
    assert str(window(2) & strided(3)) == "window(2) & strided(3)"


@pytest.mark.refusal("attention-masks")
def test_refusals_of_tensors_that_do_not_fit() -> None:
    for make, what in ((padding, "padding lengths"), (left_padding, "padding counts"), (prefix, "prefix lengths")):
        with refuses(ShapeError, what, (1, 2)):
            make(LENGTHS[None])
        with refuses(ShapeError, what, "torch.float32"):
            make(LENGTHS.float())
    with refuses(ShapeError, "padding lengths", [1, 2]):
        padding([1, 2])  # type: ignore[arg-type]
    with refuses(ShapeError, "document ids", (7,)):
        documents(IDS[0])
    with refuses(ShapeError, "document ids", "torch.float32"):
        documents(IDS.float())
    with refuses(ShapeError, "block layout", (2, 3)):
        block(2, LAYOUT[:2])
    with refuses(ShapeError, "block layout", "torch.int64"):
        block(2, LAYOUT.long())
    with pytest.raises(TypeError):
        causal & 3  # type: ignore[operator]
    with pytest.raises(TypeError):
        causal | "window"  # type: ignore[operator]


@pytest.mark.law("attention-masks")
def test_rules_are_copied_and_pickled_as_themselves() -> None:
    rule = causal & window(3)
    for mask in (full, causal, anticausal, rule):
        assert copy.copy(mask) is mask
        assert copy.deepcopy([mask])[0] is mask
    for mask in (full, causal, anticausal):
        assert pickle.loads(pickle.dumps(mask)) is mask
    with refuses(ConfigError, "mask rule to pickle", "causal & window(3)", "state_dict()"):
        pickle.dumps(rule)


@pytest.mark.refusal("attention-masks")
def test_a_table_has_no_positions_before_zero() -> None:
    for rule in (documents(torch.tensor([[0, 0, 1, 1]])), block(2, torch.eye(2, dtype=torch.bool))):
        with refuses(ShapeError, "offset under", -1):
            rule.dense(2, 4, offset=-1)
    assert causal.dense(2, 4, offset=-1).tolist() == [[False] * 4, [True] + [False] * 3]


@pytest.mark.refusal("attention-masks")
def test_parts_of_the_wrong_kind_are_refused() -> None:
    with refuses(ConfigError, "[causal"):
        per_head([causal, causal])  # type: ignore[arg-type]
    for share in ("a", None, True):
        with refuses(ConfigError, str(share)):
            random(share)  # type: ignore[arg-type]
    with refuses(ShapeError, "[0, 1]"):
        documents([0, 1])  # type: ignore[arg-type]
    with refuses(ShapeError, "[[True]]"):
        block(2, [[True]])  # type: ignore[arg-type]

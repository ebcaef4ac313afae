"""Sentence-transformers' folders: settings that we compute, names of BERT's weights, the tokeniser."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from handbook_src.data.bpe import tokenizers_library
from handbook_src.errors import DataError
from handbook_src.models.transformers.folder import read_folder

_SETTINGS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context",
    "hidden_size": "dim",
    "num_attention_heads": "heads",
    "num_hidden_layers": "depth",
    "intermediate_size": "hidden_dim",
    "type_vocab_size": "segments",
    "layer_norm_eps": "eps",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}
#: What the wiring computes; a folder that asks for anything else is another model.
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "model_type": ("bert",),
    "hidden_act": ("gelu",),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
}
_POOLING = ("cls_token", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
_MODULES = {
    "encoder.layer.": "blocks.",
    ".attention.self.query.": ".attention.q_proj.",
    ".attention.self.key.": ".attention.k_proj.",
    ".attention.self.value.": ".attention.v_proj.",
    ".attention.output.dense.": ".attention.out_proj.",
    ".attention.output.LayerNorm.": ".norm_1.",
    ".intermediate.dense.": ".up.",
    ".output.dense.": ".down.",
    ".output.LayerNorm.": ".norm_2.",
}


def read_encoder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], bool]:
    """Return the settings, the weights under our names, and whether the vectors are scaled to length one.

    Raises:
        DataError: a file is missing or torn, or the folder asks for another computation.
    """
    raw, weights = read_folder(folder)
    for key, accepted in _FIXED.items():
        _check(f"{folder}/config.json {key}", raw.get(key, accepted[0]), accepted)
    settings = {ours: raw[theirs] for theirs, ours in _SETTINGS.items() if theirs in raw}
    normalize = True
    modules = _optional(folder / "modules.json", list)
    if modules is not None:
        kinds = [str(m.get("type", "") if isinstance(m, dict) else m).rpartition(".")[2] for m in modules]
        chains = ["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]
        _check(f"{folder}/modules.json", kinds, chains)
        normalize = kinds == chains[1]
    pooling = _optional(folder / "1_Pooling" / "config.json", dict) or {}
    _check(f"{folder}/1_Pooling mean", pooling.get("pooling_mode_mean_tokens", True), (True,))
    for mode in _POOLING:
        _check(f"{folder}/1_Pooling {mode}", pooling.get(f"pooling_mode_{mode}", False), (False,))
    sentence = _optional(folder / "sentence_bert_config.json", dict) or {}
    if sentence.get("max_seq_length") is not None:
        settings["max_length"] = sentence["max_seq_length"]
    return settings, _renamed(weights), normalize


def read_tokenizer(folder: Path) -> Any:
    """Return the folder's tokeniser, as the ``tokenizers`` library reads it.

    Raises:
        DataError: the library or the file is missing, or the file is torn.
    """
    library = tokenizers_library("SentenceEncoder")
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise DataError(str(path), got="no such file", want="the tokeniser", remedy="Copy the whole model folder.")
    try:
        return library.Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises no narrower kind
        raise DataError(str(path), got=f"a torn file ({e})", want="a tokeniser", remedy="Copy it again.") from e


def _renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    ours: dict[str, Tensor] = {}
    for name, w in weights.items():
        name = name.removeprefix("bert.")
        if name.startswith(("pooler.", "cls.")) or name.endswith("embeddings.position_ids"):
            continue  # the head of BERT's own training, and a buffer that early releases stored
        for theirs, mine in _MODULES.items():
            name = name.replace(theirs, mine, 1)
        ours[name] = w
    return ours


def _optional(path: Path, kind: type) -> Any:
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as e:
        raise DataError(str(path), got=f"broken JSON ({e})", want="a setting", remedy="Copy the file again.") from e
    if not isinstance(content, kind):
        raise DataError(str(path), got=type(content).__name__, want=f"a {kind.__name__}", remedy="Copy it again.")
    return content


def _check(what: str, got: Any, accepted: Any) -> None:
    if got not in accepted:
        raise DataError(
            what,
            got=repr(got),
            want=f"one of {accepted}",
            remedy="It would be computed differently here; load the folder with sentence-transformers.",
        )

"""GPT-2's names, layouts and settings in Hugging Face's folders, and ours, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from handbook_src.errors import DataError

_SETTINGS = {
    "vocab_size": "vocab_size",
    "n_positions": "context",
    "n_embd": "dim",
    "n_head": "heads",
    "n_layer": "depth",
    "n_inner": "hidden_dim",
    "layer_norm_epsilon": "eps",
    "initializer_range": "init_std",
}
#: In the order of ``gpt2.Dropout``.
_DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
#: What GPT-2 was; a checkpoint that asks for anything else is another model.
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


def settings_from_hf(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Translate ``config.json`` to ``GPT2Config``'s arguments, and refuse what would be computed differently."""
    for key, accepted in _FIXED.items():
        if key in raw and raw[key] not in accepted:
            raise DataError(
                f"{source}/config.json {key}",
                got=repr(raw[key]),
                want=f"one of {accepted}",
                remedy="This is not a GPT-2 as published; load it with its own library.",
            )
    settings = {ours: raw[theirs] for theirs, ours in _SETTINGS.items() if raw.get(theirs) is not None}
    shares = {theirs: raw.get(theirs, 0.1) for theirs in _DROPOUTS}
    given = {theirs: settings[ours] for theirs, ours in _SETTINGS.items() if ours in settings}
    for key, value in (given | shares).items():
        _check_number(key, value, source)
    return settings | {"dropout": tuple(map(float, shares.values()))}


def _check_number(key: str, value: Any, source: str) -> None:
    whole = key not in (*_DROPOUTS, "layer_norm_epsilon", "initializer_range")
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not number or (whole and value < 1):
        raise DataError(
            f"{source}/config.json {key}",
            got=repr(value),
            want="a positive whole number" if whole else "a number",
            remedy="Write the number that the model was trained with, or leave the key out.",
        )


def config_to_hf(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Translate ``GPT2Config``'s fields to ``config.json``."""
    raw: dict[str, Any] = {key: accepted[0] for key, accepted in _FIXED.items()}
    raw |= {theirs: settings[ours] for theirs, ours in _SETTINGS.items()}
    raw |= dict(zip(_DROPOUTS, settings["dropout"], strict=True))
    end = 50256 if settings["vocab_size"] == 50257 else None
    return raw | {"architectures": ["GPT2LMHeadModel"], "bos_token_id": end, "eos_token_id": end}


_MODULES = {
    "wte.": "token_embedding.",
    "wpe.": "position_embedding.",
    "ln_f.": "norm.",
    "h.": "blocks.",
    ".ln_1.": ".norm_1.",
    ".ln_2.": ".norm_2.",
    ".mlp.c_fc.": ".mlp.up.",
    ".mlp.c_proj.": ".mlp.down.",
    ".attn.c_proj.": ".attention.out_proj.",
}
_FUSED = ("q_proj", "k_proj", "v_proj")


def weights_from_hf(weights: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Rename, transpose the Conv1D matrices and split the fused projection."""
    plain = {name.removeprefix("transformer."): w for name, w in weights.items()}
    head = plain.pop("lm_head.weight", None)
    if head is not None and "wte.weight" in plain and not torch.equal(head, plain["wte.weight"]):
        raise DataError(
            f"weights of {source}: lm_head.weight",
            got="another matrix than wte.weight",
            want="the tied embedding",
            remedy="GPT-2's output matrix is its embedding; this checkpoint is another model.",
        )
    ours: dict[str, Tensor] = {}
    for name, w in plain.items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # the causal mask, which early releases stored as a buffer
        _check_weight(name, w, source)
        if w.ndim == 2 and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            w = w.T
        if ".attn.c_attn." in name:
            for part, rows in zip(_FUSED, w.chunk(3), strict=True):
                ours[_renamed(name.replace(".attn.c_attn.", f".attention.{part}."))] = rows
        else:
            ours[_renamed(name)] = w
    return ours


def _check_weight(name: str, w: Tensor, source: str) -> None:
    if not w.is_floating_point():
        raise DataError(
            f"weights of {source}: {name}",
            got=str(w.dtype),
            want="floating point",
            remedy="Quantised checkpoints need their own library; save the model in float16.",
        )
    if ".attn.c_attn." in name and (w.ndim != (2 if name.endswith("weight") else 1) or w.shape[-1] % 3):
        raise DataError(
            f"weights of {source}: {name}",
            got=tuple(w.shape),
            want="a matrix (the bias: a vector) whose last axis is three equal parts, for queries, keys, values",
            remedy="config.json and the weights belong to different models.",
        )


def _renamed(name: str) -> str:
    for theirs, mine in _MODULES.items():
        if name.startswith(theirs) or (theirs.startswith(".") and theirs in name):
            name = name.replace(theirs, mine, 1)
    return name


def weights_to_hf(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back: fuse, transpose, rename; the tied head is left out."""
    weights: dict[str, Tensor] = {}
    for name, w in ours.items():
        if any(f".attention.{part}." in name for part in _FUSED[1:]):
            continue
        if ".attention.q_proj." in name:
            w = torch.cat([ours[name.replace("q_proj", part)] for part in _FUSED])
            name = name.replace(".attention.q_proj.", ".attn.c_attn.")
        for theirs, mine in _MODULES.items():
            if name.startswith(mine) or (mine.startswith(".") and mine in name):
                name = name.replace(mine, theirs, 1)
        transposed = name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
        weights[f"transformer.{name}"] = (w.T if transposed else w).contiguous()
    return weights

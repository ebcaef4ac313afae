"""Checkpoint folders as Hugging Face writes them: config.json and safetensors, whole or sharded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from handbook_src.check import check_parameter_dtype
from handbook_src.errors import DataError

M = TypeVar("M", bound=nn.Module)
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_folder(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a checkpoint folder's configuration and weights, on the CPU, as stored.

    Raises:
        DataError: a file is missing, torn, or not what its name says.
    """
    folder = Path(folder)
    config = _json(folder / CONFIG, "the model's configuration")
    if (folder / INDEX).exists():
        index = _shards(folder / INDEX)
        weights: dict[str, Tensor] = {}
        for shard in sorted(set(index.values())):
            weights.update(_tensors(folder / shard))
        absent = sorted(set(index) - set(weights))
        if absent:
            raise DataError(
                f"{folder / INDEX}",
                got=f"no {absent} in the shards",
                want="every key it lists",
                remedy="Copy it again.",
            )
        return config, weights
    return config, _tensors(folder / WEIGHTS)


def write_folder(folder: str | Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write ``config.json`` and ``model.safetensors`` in place of what the folder held.

    Both are written beside their names and then renamed: a save that fails leaves the older model whole.
    Tensors that share memory must be left out by the caller.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    old = set(_shards(folder / INDEX).values()) if (folder / INDEX).exists() else set()
    plain = {name: w.detach().cpu().contiguous() for name, w in weights.items()}
    with ExitStack() as parts:
        written = [folder / f"{name}.part" for name in (WEIGHTS, CONFIG)]
        for part in written:
            parts.callback(part.unlink, missing_ok=True)
        save_file(plain, written[0], metadata={"format": "pt"})
        written[1].write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n", encoding="utf8")
        for part in written:  # both are whole: from here on nothing can fill the disk
            part.replace(part.with_suffix(""))
    for name in (INDEX, *(old - {WEIGHTS})):  # shards of an older model, which its index would give back
        (folder / name).unlink(missing_ok=True)


def check_depth(weights: Mapping[str, Tensor], depth: int, source: str) -> None:
    """Refuse more layers than there are tensors before they are made: 4,000 take a minute.

    Raises:
        DataError: the configuration asks for so many.
    """
    if depth > len(weights):
        raise DataError(
            f"{source}/config.json",
            got=f"{depth} layers",
            want=f"no more than the {len(weights)} tensors stored beside it",
            remedy="config.json and the weights belong to different models.",
        )


def fill(
    model: M,
    weights: Mapping[str, Tensor],
    source: str,
    device: str | torch.device,
    dtype: torch.dtype | None = None,
) -> M:
    """Give a model on the meta device weights of exactly these names and shapes.

    Args:
        model: the structure.
        weights: by the model's names.
        source: where they come from, for messages.
        device: where they go.
        dtype: theirs unless given.

    Raises:
        DataError: names what is missing, what is left over, or which shapes differ.
        ConfigError: ``dtype`` is no floating-point dtype.
    """
    check_parameter_dtype(f"weights of {source}", dtype)
    want = dict(model.named_parameters())
    missing, unexpected = sorted(set(want) - set(weights)), sorted(set(weights) - set(want))
    if missing or unexpected:
        raise DataError(
            f"weights of {source}",
            got=f"missing {missing}, unexpected {unexpected}",
            want="exactly the model's parameters",
            remedy="Check that the folder holds this kind of model; config.json decides its depth.",
        )
    wrong = {n: (tuple(weights[n].shape), tuple(p.shape)) for n, p in want.items() if weights[n].shape != p.shape}
    if wrong:
        raise DataError(
            f"weights of {source}",
            got=", ".join(f"{n} {a}" for n, (a, _) in wrong.items()),
            want=", ".join(f"{n} {b}" for n, (_, b) in wrong.items()),
            remedy="config.json and the weights belong to different models.",
        )
    stored = next((w.dtype for w in weights.values()), torch.float32)
    model = model.to(dtype or stored).to_empty(device=device)  # memory is asked for once all fits
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])
    return model


def _shards(path: Path) -> dict[str, str]:
    index = _json(path, "the list of shards").get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(shard, str) for shard in index.values()):
        raise DataError(
            f"{path} weight_map", got=repr(index)[:80], want="an object: a file for each key", remedy="Copy it again."
        )
    for shard in index.values():
        if Path(shard).name != shard or "\\" in shard:
            raise DataError(
                f"{path} weight_map", got=repr(shard), want="names of files in the folder",
                remedy="Don't load it: it points elsewhere.",
            )  # fmt: skip
    return index


def _json(path: Path, what: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf8"))
    except OSError as e:
        got = "no such file" if isinstance(e, FileNotFoundError) else (e.strerror or str(e)).lower()
        raise DataError(str(path), got=got, want=what, remedy="Pass a folder that save_pretrained wrote.") from e
    except (ValueError, RecursionError) as e:
        raise DataError(str(path), got=f"broken JSON ({e})", want=what, remedy="Copy the file again.") from e
    if not isinstance(content, dict):
        raise DataError(str(path), got=type(content).__name__, want="a JSON object", remedy="Copy the file again.")
    return content


def _tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        others = sorted(p.name for p in path.parent.glob("*") if p.suffix in (".bin", ".safetensors", ".pt"))
        raise DataError(
            str(path),
            got=f"no such file beside {others}",
            want="weights as safetensors",
            remedy="Convert a pickled .bin with transformers: model.save_pretrained(folder).",
        )
    try:
        return load_file(path)
    except SafetensorError as e:
        raise DataError(
            str(path), got=f"a torn file ({e})", want="a whole safetensors file", remedy="Copy it again."
        ) from e

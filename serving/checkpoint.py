"""What a model folder says of itself, compared without loading it."""

import json
import struct
from pathlib import Path
from typing import Any

from contracts.errors import InvalidInput
from contracts.prompt import TOKENIZER_FILES

# Written by whoever saved the folder; says nothing of the model.
PROVENANCE_FIELDS = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")

# Tensor name to dtype and shape.
Tensors = dict[str, tuple[str, tuple[int, ...]]]


def tensors(folder: Path) -> Tensors:
    """Names, dtypes and shapes from the safetensors headers. Raises InvalidInput."""
    found: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, entry in _header(file).items():
            if name in found:
                raise InvalidInput(name, "one tensor of that name", f"another in {file.name}")
            found[name] = (entry["dtype"], tuple(entry["shape"]))
    if not found:
        raise InvalidInput("weights", "at least one safetensors file", folder.name)
    return found


def check_interchangeable(running: Path, new: Path) -> None:
    """Raise InvalidInput unless `new` holds other weights of the model in `running`, for the same
    tokenizer.
    """
    _check_config(running, new)
    for name in TOKENIZER_FILES:
        if _bytes(running / name) != _bytes(new / name):
            raise InvalidInput(name, "the tokenizer of the running model", "another")
    ours, theirs = tensors(running), tensors(new)
    if missing := sorted(ours.keys() - theirs.keys()):
        raise InvalidInput(missing[0], "a tensor of this name", "none")
    if extra := sorted(theirs.keys() - ours.keys()):
        raise InvalidInput(extra[0], "no tensor of this name", "one")
    for name, expected in ours.items():
        if theirs[name] != expected:
            raise InvalidInput(
                name, f"{expected[0]} {expected[1]}", f"{theirs[name][0]} {theirs[name][1]}"
            )


def _check_config(running: Path, new: Path) -> None:
    ours, theirs = _config(running), _config(new)
    for field in sorted(ours.keys() | theirs.keys()):
        if ours.get(field) != theirs.get(field):
            raise InvalidInput(f"config.{field}", repr(ours.get(field)), theirs.get(field))


def _config(folder: Path) -> dict[str, object]:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return {field: value for field, value in config.items() if field not in PROVENANCE_FIELDS}


def _header(file: Path) -> dict[str, Any]:
    """The JSON at the head of a safetensors file, after its length as a little-endian uint64."""
    with file.open("rb") as f:
        size = f.read(8)
        length = struct.unpack("<Q", size)[0] if len(size) == 8 else 0
        if not 0 < length <= file.stat().st_size - 8:
            raise InvalidInput(file.name, "a safetensors header", "a damaged file")
        header: dict[str, Any] = json.loads(f.read(length))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def _bytes(file: Path) -> bytes | None:
    return file.read_bytes() if file.exists() else None

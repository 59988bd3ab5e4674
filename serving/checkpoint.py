"""What a model folder holds: whether it is whole, and whether it fits the running one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from contracts.errors import InvalidInput
from contracts.prompt import TOKENIZER_FILES

if TYPE_CHECKING:
    import torch

# Written by whoever saved the folder; says nothing of the model.
PROVENANCE_FIELDS = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")

# What is read and never run. Pickles and Python files are not among them, and neither is anything
# else that some loader might look for.
DATA_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".md")

INDEX = "model.safetensors.index.json"

# Tensor name to dtype and shape.
Tensors = dict[str, tuple[str, tuple[int, ...]]]


def check_whole(folder: Path) -> None:
    """Raise InvalidInput unless `folder` holds a config, a tokenizer and weights as plain data,
    none of them outside of it. Reads headers, no weights.
    """
    check_data(folder)
    json_object(folder, "config.json")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise InvalidInput("tokenizer", "at least one tokenizer file", "none")
    _check_index(folder, tensors(folder))


def check_data(folder: Path) -> None:
    """Raise InvalidInput unless all files in `folder` are plain data, and none is a link."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise InvalidInput(name, "a file of the release itself", "a link")
        if path.is_file() and path.suffix not in DATA_SUFFIXES:
            raise InvalidInput(name, f"only data ({' '.join(DATA_SUFFIXES)})", path.suffix or name)


def check_interchangeable(running: Path, new: Path) -> None:
    """Raise InvalidInput unless `new` holds other weights of the model in `running`, for the same
    tokenizer and the same end of an answer.
    """
    check_whole(new)
    for name in ("config.json", "generation_config.json"):
        _check_same_fields(running, new, name)
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


def tensors(folder: Path) -> Tensors:
    """Names, dtypes and shapes from the safetensors headers. Raises InvalidInput."""
    found: Tensors = {}
    for file, name, entry in _entries(folder):
        if name in found:
            raise InvalidInput(name, "one tensor of that name", f"another in {file.name}")
        found[name] = (entry.get_dtype(), tuple(entry.get_shape()))
    if not found:
        raise InvalidInput("weights", "at least one safetensors file", "none")
    return found


def finite_tensors(folder: Path) -> Iterator[tuple[str, "torch.Tensor"]]:
    """Every tensor by name, read now. Raises InvalidInput at the first that is not finite."""
    import torch

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (not a dict)
                tensor = opened.get_tensor(name)
                if not torch.isfinite(tensor).all():
                    raise InvalidInput(name, "finite numbers", "NaN or infinity")
                yield name, tensor


def json_object(folder: Path, name: str) -> dict[str, Any]:
    """The file's content. Raises InvalidInput."""
    try:
        content = json.loads((folder / name).read_text("utf-8"))
    except FileNotFoundError:
        raise InvalidInput(name, "a file of this name", "none") from None
    except ValueError as e:
        raise InvalidInput(name, "JSON in UTF-8", str(e)) from None
    if not isinstance(content, dict):
        raise InvalidInput(name, "a JSON object", type(content).__name__)
    return content


def _entries(folder: Path) -> Iterator[tuple[Path, str, Any]]:
    """File, name and header entry of each tensor. The library checks that the entries cover the
    file from the first byte to the last, without gaps and overlaps.
    """
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118  (not a dict)
                    yield file, name, opened.get_slice(name)
        except (SafetensorError, OSError, ValueError) as e:
            raise InvalidInput(file.name, "a whole safetensors file", str(e)) from None


def _check_index(folder: Path, found: Tensors) -> None:
    if not (folder / INDEX).exists():
        return
    said = json_object(folder, INDEX).get("weight_map")
    held = {name: file.name for file, name, _ in _entries(folder)}
    if said != held:
        wrong = sorted(name for name in found if not said or said.get(name) != held[name])
        raise InvalidInput(f"{INDEX}: weight_map", "the files that hold the tensors", wrong[:1])


def _check_same_fields(running: Path, new: Path, name: str) -> None:
    if not (running / name).exists() and not (new / name).exists():
        return
    ours, theirs = json_object(running, name), json_object(new, name)
    for field in sorted((ours.keys() | theirs.keys()) - set(PROVENANCE_FIELDS)):
        if ours.get(field) != theirs.get(field):
            where = f"{name.removesuffix('.json')}.{field}"
            raise InvalidInput(where, repr(ours.get(field)), theirs.get(field))


def _bytes(file: Path) -> bytes | None:
    return file.read_bytes() if file.exists() else None

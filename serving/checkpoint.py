"""What a model folder holds: whether it is whole, and whether it fits the running one."""

import json
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from contracts.artifact import sha256_of
from contracts.errors import InvalidInput
from contracts.prompt import TOKENIZER_FILES

if TYPE_CHECKING:
    import torch

# Written by whoever saved the folder; says nothing of the model.
PROVENANCE_FIELDS = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")

# What is read and never run. Pickles and Python files are not among them, and neither is anything
# else that some loader might look for.
DATA_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".md")

CONFIG = "config.json"
CONFIGS = (CONFIG, "generation_config.json")
INDEX = "model.safetensors.index.json"

# Tensor name to dtype and shape.
Tensors = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Checkpoint:
    """All of a model but the numbers in its tensors."""

    # By file name, those that there are.
    configs: Mapping[str, dict[str, Any]]
    # SHA-256 by file name, of those that there are.
    tokenizer: Mapping[str, str]
    tensors: Tensors


def read(folder: Path) -> Checkpoint:
    """What `folder` holds. Raises InvalidInput unless that is a config, a tokenizer and weights as
    plain data, none of them outside of it. Reads headers, no weights.
    """
    check_data(folder)
    configs = {n: json_object(folder, n) for n in CONFIGS if n == CONFIG or (folder / n).exists()}
    tokenizer = {n: sha256_of(folder / n) for n in TOKENIZER_FILES if (folder / n).is_file()}
    check_tokenizer(tokenizer)
    found = tensors(folder)
    if (folder / INDEX).exists():
        files = {name: file.name for file, name, _ in _entries(folder)}
        check_index(json_object(folder, INDEX), files)
    return Checkpoint(configs, tokenizer, found)


def check_data(folder: Path) -> None:
    """Raise InvalidInput unless all files in `folder` are plain data, and none is a link."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise InvalidInput(name, "a file of the release itself", "a link")
        if path.is_file():
            check_suffix(name)


def check_suffix(name: str) -> None:
    """Raise InvalidInput unless the file of this name is plain data."""
    suffix = PurePosixPath(name).suffix
    if suffix not in DATA_SUFFIXES:
        raise InvalidInput(name, f"only data ({' '.join(DATA_SUFFIXES)})", suffix or name)


def check_tokenizer(tokenizer: Mapping[str, str]) -> None:
    """Raise InvalidInput without any file of a tokenizer."""
    if not tokenizer:
        raise InvalidInput("tokenizer", "at least one tokenizer file", "none")


def check_index(said: Mapping[str, Any], files: Mapping[str, str]) -> None:
    """Raise InvalidInput unless the index names for each tensor the file that holds it."""
    weight_map = said.get("weight_map")
    if weight_map != files:
        named = weight_map if isinstance(weight_map, dict) else {}
        wrong = sorted(n for n in files if named.get(n) != files[n])
        raise InvalidInput(f"{INDEX}: weight_map", "the files that hold the tensors", wrong[:1])


def check_interchangeable(running: Checkpoint, new: Checkpoint) -> None:
    """Raise InvalidInput unless `new` has other weights of the `running` model, for the same
    tokenizer and the same end of an answer.
    """
    for name in CONFIGS:
        _check_same_fields(running, new, name)
    for name in TOKENIZER_FILES:
        if running.tokenizer.get(name) != new.tokenizer.get(name):
            raise InvalidInput(name, "the tokenizer of the running model", "another")
    ours, theirs = running.tensors, new.tensors
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


def finite_tensors(folder: Path) -> Generator[tuple[str, "torch.Tensor"], None, None]:
    """Every tensor by name, read now. Raises InvalidInput at the first that is not finite."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (not a dict)
                tensor = opened.get_tensor(name)
                check_finite(name, tensor)
                yield name, tensor


def check_finite(name: str, tensor: "torch.Tensor") -> None:
    """Raise InvalidInput where a number is not finite."""
    import torch

    if not torch.isfinite(tensor).all():
        raise InvalidInput(name, "finite numbers", "NaN or infinity")


def json_object(folder: Path, name: str) -> dict[str, Any]:
    """The file's content. Raises InvalidInput."""
    try:
        return parsed(name, (folder / name).read_bytes())
    except FileNotFoundError:
        raise InvalidInput(name, "a file of this name", "none") from None


def parsed(name: str, data: bytes) -> dict[str, Any]:
    """A JSON object. Raises InvalidInput, which names the file."""
    try:
        content = json.loads(data.decode("utf-8"))
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


def _check_same_fields(running: Checkpoint, new: Checkpoint, name: str) -> None:
    ours, theirs = running.configs.get(name), new.configs.get(name)
    if ours is None and theirs is None:
        return
    if theirs is None:
        raise InvalidInput(name, "a file of this name", "none")
    if ours is None:
        raise InvalidInput(name, "no file of this name, as the running model has none", "one")
    for field in sorted((ours.keys() | theirs.keys()) - set(PROVENANCE_FIELDS)):
        if ours.get(field) != theirs.get(field):
            where = f"{name.removesuffix('.json')}.{field}"
            raise InvalidInput(where, repr(ours.get(field)), theirs.get(field))

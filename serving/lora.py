"""What an adapter folder holds: whether it is whole, and fits the model that is served.

The format is that of peft, for LoRA (Hu et al. 2021): of a linear layer of weight W (out, in) the
tensors A (r, in) and B (out, r), which add `lora_alpha / r` times B A to W.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from contracts.errors import InvalidInput
from serving import checkpoint
from serving.checkpoint import Tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# That a server can be set to take.
HIGHEST_RANK = 256

# A linear layer of a numbered block. Embeddings and head are in none: through adapted ones vLLM
# says no log-probabilities of a prompt, which a canary needs.
_LINEAR = re.compile(r"(.+\.\d+\..+)\.weight")
_FACTOR = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight")

# Fields of the config that may say anything: what was trained, and how, shows in the tensors.
FREE_FIELDS = frozenset(
    "peft_type r lora_alpha use_rslora target_modules exclude_modules task_type revision "
    "base_model_name_or_path inference_mode lora_dropout layers_to_transform layers_pattern "
    "auto_mapping megatron_core qalora_group_size peft_version".split()
)
# And what the others may say: that they are off.
OFF: dict[str, tuple[object, ...]] = {"bias": ("none",), "init_lora_weights": (True, "gaussian")}


def config_of(adapter: Path) -> dict[str, Any]:
    """What the folder says of its adapter. Raises InvalidInput."""
    return checkpoint.json_object(adapter, CONFIG)


def linear_layers(folder: Path) -> Tensors:
    """Dtype and shape (out, in) of the layers of the model in `folder` that can be adapted."""
    found: Tensors = {}
    for name, (dtype, shape) in checkpoint.tensors(folder).items():
        if (layer := _LINEAR.fullmatch(name)) and len(shape) == 2:
            found[layer[1]] = (dtype, shape)
    return found


def check_fits(base: Path, adapter: Path, max_rank: int) -> None:
    """Raise InvalidInput unless `adapter` holds a LoRA adapter of the model in `base`, of a rank up
    to `max_rank`, as plain data, with finite numbers. Reads every tensor of the adapter.
    """
    checkpoint.check_data(adapter)
    rank = _rank(config_of(adapter), max_rank)
    for file in sorted(adapter.glob("*.safetensors")):
        if file.name != WEIGHTS:
            raise InvalidInput(file.name, f"no weights but {WEIGHTS}", "a file")
    _check_tensors(linear_layers(base), checkpoint.tensors(adapter), rank)
    for _ in checkpoint.finite_tensors(adapter):
        pass


def write_zero(base: Path, folder: Path) -> Path:
    """An adapter that adds nothing, in a new folder. It names one layer of the model in `base`: the
    engine adds nothing to those that an adapter does not name.
    """
    layer, (_, (out, into)) = next(iter(linear_layers(base).items()))
    shapes = {"lora_A": (1, into), "lora_B": (out, 1)}
    zeros = {
        f"{PREFIX}{layer}.{factor}.weight": np.zeros(shape, np.float32)
        for factor, shape in shapes.items()
    }
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [layer]}
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    save_file(zeros, folder / WEIGHTS)
    return folder


def _rank(config: dict[str, Any], max_rank: int) -> int:
    """The rank of every layer. Raises InvalidInput for what the engine would not do, or leave
    out.
    """
    if config.get("peft_type") != "LORA":
        raise InvalidInput("adapter_config.peft_type", "LORA", config.get("peft_type"))
    if not config.get("target_modules"):
        raise InvalidInput("adapter_config.target_modules", "names", config.get("target_modules"))
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= max_rank:
        raise InvalidInput("adapter_config.r", f"an integer from 1 to {max_rank}", rank)
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise InvalidInput("adapter_config.lora_alpha", "a finite number", alpha)
    for name in sorted(config.keys() - FREE_FIELDS):
        if config[name] and config[name] not in OFF.get(name, ()):
            raise InvalidInput(f"adapter_config.{name}", "nothing: it is not served", config[name])
    return rank


def _check_tensors(layers: Tensors, found: Tensors, rank: int) -> None:
    adapted: dict[str, set[str]] = {}
    for name, held in found.items():
        factor = _FACTOR.fullmatch(name)
        if factor is None or factor[1] not in layers:
            raise InvalidInput(name, "lora_A or lora_B of a linear layer of the base", "another")
        dtype, (out, into) = layers[factor[1]]
        wanted = (dtype, (rank, into) if factor[2] == "A" else (out, rank))
        if held != wanted:
            raise InvalidInput(name, f"{wanted[0]} {wanted[1]}", f"{held[0]} {held[1]}")
        adapted.setdefault(factor[1], set()).add(factor[2])
    for layer, factors in sorted(adapted.items()):
        if missing := {"A", "B"} - factors:
            name = f"{PREFIX}{layer}.lora_{missing.pop()}.weight"
            raise InvalidInput(name, "a tensor of this name", "none")

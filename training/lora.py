"""LoRA (Hu et al., arXiv 2106.09685): adapters of a frozen model's linear layers, in peft's layers
and files.

A layer of weight W (out, in) computes W x + s B A x with A (r, in), B (out, r) and s = alpha / r;
B is 0 to begin with.
"""

import copy
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from contracts.errors import InvalidInput
from training.config import LoraConfig

# In an adapter's folder, and before the names of tensors in it.
CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# Where an adapter is in a layer of peft.
A, B = ".lora_A.default.weight", ".lora_B.default.weight"


def adapt(model: PreTrainedModel, config: LoraConfig, seed: int) -> None:
    """Freeze `model` and put an adapter that adds nothing yet into its linear layers. Its numbers
    come from `seed`, the same on every rank; torch's own go on as if nothing was drawn.

    Raises InvalidInput where a target module is not there.
    """
    import peft

    layers = {
        name.rpartition(".")[2]: isinstance(layer, Conv1D)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | Conv1D) and re.fullmatch(r".+\.\d+\..+", name)
    }
    targets = sorted(config.target_modules or layers)
    if not targets or (missing := sorted({*targets} - layers.keys())):
        expected = "linear layers of numbered blocks: " + ", ".join(sorted(layers))
        raise InvalidInput("lora.target_modules", expected, missing[0] if targets else None)
    wanted = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=targets,
        fan_in_fan_out=any(layers[name] for name in targets),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(wanted, model)


def twin(model: nn.Module) -> Any:
    """A copy that shares what is frozen."""
    frozen = {id(x): x for x in model.parameters() if not x.requires_grad}
    return copy.deepcopy(model, frozen)


def frozen_twin(model: nn.Module) -> Any:
    """One that never changes. Where an adapter adds nothing it is off, and costs nothing."""
    other = twin(model).requires_grad_(False)
    for layer in other.modules():
        if hasattr(layer, "lora_B") and not any(b.weight.any() for b in layer.lora_B.values()):
            layer.enable_adapters(False)
    return other


def merged(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole `weights` of `model` by the names that they have without adapters, with W + s B A
    in place of each adapted W; those of a model without adapters as they are.
    """
    plain = {n.replace(".base_layer.", "."): w for n, w in weights.items() if ".lora_" not in n}
    for name in weights:
        if name.endswith(A):
            at = name.removesuffix(A)
            layer: Any = model.get_submodule(at)
            product = weights[at + B] @ weights[name] * layer.scaling["default"]
            added = product.T if layer.fan_in_fan_out else product
            plain[f"{at}.weight"] = plain[f"{at}.weight"] + added
    return plain


# Beside a saved policy, whose weights are merged: the adapter, and a link to the folder of what it
# adapts.


def _adapter(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lora") / "adapter"


def _base(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lora") / "base"


def save(model: Any, weights: Mapping[str, Tensor], folder: Path, base: Path) -> None:
    """Put the adapter among the whole `weights` of `model` beside `folder`, in peft's format."""
    config = model.peft_config["default"]
    shutil.rmtree(_adapter(folder).parent, ignore_errors=True)
    _adapter(folder).mkdir(parents=True)
    said = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": sorted(config.target_modules),
        "fan_in_fan_out": config.fan_in_fan_out,
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    (_adapter(folder) / CONFIG).write_text(json.dumps(said, indent=1), encoding="utf-8")
    factors = {
        PREFIX + n.replace(".default.", "."): w.contiguous()
        for n, w in weights.items()
        if n.endswith((A, B))
    }
    save_file(factors, _adapter(folder) / WEIGHTS, metadata={"format": "pt"})
    _base(folder).symlink_to(base.resolve())


def note(folder: Path, base: Path, adapter: Path) -> None:
    """Say beside `folder` what its weights were merged of."""
    _base(folder).parent.mkdir()
    _base(folder).symlink_to(base.resolve())
    _adapter(folder).symlink_to(adapter.resolve())


def base_of(folder: Path) -> Path | None:
    """The folder of the weights that the adapter beside `folder` adapts; None without one."""
    return _base(folder).resolve() if _base(folder).exists() else None


def adapter_over(folder: Path, base: Path) -> Path | None:
    """The adapter of the policy in `folder`, where it is one of the weights in `base`, and of
    linear layers as servers take them (out, in).
    """
    ours = base_of(folder) == base.resolve() and not _said(folder).get("fan_in_fan_out")
    return _adapter(folder) if ours else None


@torch.no_grad()
def take_over(model: Any, folder: Path) -> bool:
    """Give `model`, which has a new adapter, the one beside `folder`. False, and nothing is done,
    where that is of other layers, another rank or another scale.
    """
    said, config = _said(folder), model.peft_config["default"]
    scale = said["lora_alpha"], said["r"], said.get("use_rslora", False)
    found = {
        n.removeprefix(PREFIX).replace(".weight", ".default.weight"): x
        for n, x in load_file(_adapter(folder) / WEIGHTS).items()
    }
    ours = {n: x for n, x in model.named_parameters() if x.requires_grad}
    shapes = [{n: x.shape for n, x in own.items()} for own in (found, ours)]
    if scale != (config.lora_alpha, config.r, False) or shapes[0] != shapes[1]:
        return False
    for name, x in ours.items():
        x.copy_(found[name])
    return True


def _said(folder: Path) -> dict[str, Any]:
    """The config of the adapter beside `folder`."""
    said: dict[str, Any] = json.loads((_adapter(folder) / CONFIG).read_text(encoding="utf-8"))
    return said

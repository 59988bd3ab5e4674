"""Publish a LoRA adapter that was trained elsewhere, over a release that is known; merge one."""

import datetime as dt
import math
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from contracts.errors import InvalidInput
from contracts.release import Release, ReleaseRegistry
from serving import lora
from training.lora import note
from training.model import canary_of, load_policy, load_tokenizer, save_policy


def bring_adapter(
    registry: ReleaseRegistry, folder: Path, base_id: str, code_version: str
) -> Release:
    """Publish the adapter in `folder`, in peft's format, as a child of the whole release `base_id`.
    Its canary is computed by the base with the adapter merged in. Raises NotFound, InvalidInput.
    """
    base = registry.get(base_id)
    if base.base is not None:
        raise InvalidInput("--base", "a release of whole weights", base_id)
    weights = registry.artifacts.path(base.artifact)
    lora.check_fits(weights, folder, lora.HIGHEST_RANK)
    with tempfile.TemporaryDirectory() as aside:
        merge(weights, folder, Path(aside) / "model")
        canary = canary_of(Path(aside) / "model")
    artifact = registry.artifacts.put("adapter", folder)
    release = Release(
        id=registry.next_id(artifact),
        model=base.model,
        created=dt.datetime.now(dt.UTC),
        artifact=artifact,
        base=base.artifact,
        canary=canary,
        parent=base.id,
        code_version=code_version,
    )
    registry.publish(release)
    return release


@torch.no_grad()
def merge(base: Path, adapter: Path, folder: Path) -> None:
    """Save the model in `base` with W + s B A in place of each adapted weight W (out, in): s is
    alpha / r or, rank-stabilized (Kalajdzievski 2023), alpha / sqrt(r). The adapter fits. Beside
    the folder it says what was merged, so that training can go on from the adapter.
    """
    policy, config = load_policy(base), lora.config_of(adapter)
    rank = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    factors = load_file(adapter / lora.WEIGHTS)
    for name, a in factors.items():
        if name.endswith(".lora_A.weight"):
            layer = name.removeprefix(lora.PREFIX).removesuffix(".lora_A.weight")
            b = factors[name.replace(".lora_A.", ".lora_B.")]
            policy.get_parameter(f"{layer}.weight").add_(b @ a, alpha=scale)
    save_policy(policy, load_tokenizer(base), folder)
    note(folder, base, adapter)

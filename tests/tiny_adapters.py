"""Tiny random LoRA adapters in peft's format, and the same weights merged: real files for tests."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from contracts.release import Release, ReleaseRegistry
from tests import tiny_models

RANK, ALPHA = 4, 8
LAYERS = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.v_proj",
    "model.layers.1.self_attn.o_proj",
    "model.layers.1.mlp.gate_proj",
    "model.layers.1.mlp.down_proj",
)
# As peft 0.18 saves it, without what it says of training.
CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "tiny",
    "inference_mode": True,
    "r": RANK,
    "lora_alpha": ALPHA,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
    "bias": "none",
    "init_lora_weights": True,
    "use_rslora": False,
    "use_dora": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "loftq_config": {},
    "megatron_core": "megatron.core",
}


def save(folder: Path, seed: int, base: Path) -> Path:
    """An adapter folder of random weights, far enough from zero that greedy answers differ."""
    weights, draw = load_file(base / "model.safetensors"), torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in LAYERS:
        out, into = weights[f"{layer}.weight"].shape
        name = f"base_model.model.{layer}"
        tensors[f"{name}.lora_A.weight"] = 0.2 * torch.randn(RANK, into, generator=draw)
        tensors[f"{name}.lora_B.weight"] = 0.2 * torch.randn(out, RANK, generator=draw)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    return folder


def merged(folder: Path, base: Path, adapter: Path) -> Path:
    """A model folder with W + (alpha / r) B A in place of each adapted W."""
    shutil.copytree(base, folder)
    weights = load_file(base / "model.safetensors")
    delta = load_file(adapter / "adapter_model.safetensors")
    for layer in LAYERS:
        name = f"base_model.model.{layer}"
        product = delta[f"{name}.lora_B.weight"] @ delta[f"{name}.lora_A.weight"]
        weights[f"{layer}.weight"] += ALPHA / RANK * product
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def release(
    registry: ReleaseRegistry, adapter: Path, whole: Path, base: Release, release_id: str
) -> Release:
    """Of the adapter, over the release `base`; `whole` holds the same weights merged. Not yet
    published.
    """
    return base.model_copy(
        update={
            "id": release_id,
            "artifact": registry.artifacts.put("adapter", adapter),
            "base": base.artifact,
            "parent": base.id,
            "canary": tiny_models.canary(whole),
        }
    )

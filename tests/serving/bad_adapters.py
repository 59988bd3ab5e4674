"""Adapters that must not be served, each made from a good folder by spoiling its files."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.serving.bad_releases import Spoil, fields, pickled, removed, written

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"


@dataclass(frozen=True)
class BadAdapter:
    """`says` is in the reason for its refusal."""

    kind: str
    name: str
    says: str
    spoil: Spoil


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def apply(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        change(held)
        save_file(held, folder / WEIGHTS)

    return apply


def put(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    return tensors(lambda held: held.update({name: value(held[name]).contiguous()}))


def moved(old: str, new: str) -> Spoil:
    return tensors(lambda held: held.update({new: held.pop(old)}))


def half(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size // 2)


def linked(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / f"{folder.name}-outside")
    (folder / WEIGHTS).symlink_to(folder.parent / f"{folder.name}-outside")


ANOTHER = "lora_A or lora_B of a linear layer of the base"

BAD_ADAPTERS = [
    BadAdapter("NaN", "nan", "expected finite", put(A, lambda t: t * torch.nan)),
    BadAdapter("NaN", "infinity", "expected finite", put(B, lambda t: t / 0)),
    BadAdapter("shape", "rank-cut", f"{A}: expected F32 (4, 128)", put(A, lambda t: t[:3])),
    BadAdapter("shape", "width-cut", f"{A}: expected F32", put(A, lambda t: t[:, 1:])),
    BadAdapter("shape", "height-cut", f"{B}: expected F32 (128, 4)", put(B, lambda t: t[1:])),
    BadAdapter("shape", "flat", f"{B}: expected F32", put(B, lambda t: t.flatten())),
    BadAdapter("dtype", "half", f"{A}: expected F32", put(A, lambda t: t.half())),
    BadAdapter("dtype", "integers", f"{B}: expected F32", put(B, lambda t: t.int())),
    BadAdapter("name", "no-such-layer", ANOTHER, moved(A, A.replace(".0.", ".7."))),
    BadAdapter("name", "no-prefix", ANOTHER, moved(A, A.removeprefix("base_model.model."))),
    BadAdapter("name", "no-factor", ANOTHER, moved(A, f"{LAYER}.weight")),
    BadAdapter("name", "norm", ANOTHER, moved(A, A.replace("self_attn.q_proj", "input_layernorm"))),
    BadAdapter("name", "head", ANOTHER, moved(A, "base_model.model.lm_head.lora_A.weight")),
    BadAdapter("missing", "no-B", f"{B}: expected a tensor", tensors(lambda h: h.pop(B))),
    BadAdapter("missing", "no-A", f"{A}: expected a tensor", tensors(lambda h: h.pop(A))),
    BadAdapter("missing", "nothing", "at least one safetensors", removed(WEIGHTS)),
    BadAdapter("missing", "no-tensor", "at least one", tensors(lambda h: h.clear())),
    BadAdapter("rank", "above-bound", "r: expected an integer", fields(CONFIG, r=17)),
    BadAdapter("rank", "zero", "r: expected an integer", fields(CONFIG, r=0)),
    BadAdapter("rank", "words", "r: expected an integer", fields(CONFIG, r="4")),
    BadAdapter("rank", "another", f"{A}: expected F32 (8, 128)", fields(CONFIG, r=8)),
    BadAdapter("scale", "nan", "lora_alpha: expected", fields(CONFIG, lora_alpha=float("nan"))),
    BadAdapter("scale", "nothing", "lora_alpha: expected", fields(CONFIG, lora_alpha=None)),
    BadAdapter("feature", "dora", "use_dora: expected nothing", fields(CONFIG, use_dora=True)),
    BadAdapter("feature", "bias", "bias: expected nothing", fields(CONFIG, bias="all")),
    BadAdapter(
        "feature", "pissa", "init_lora_weights", fields(CONFIG, init_lora_weights="pissa_niter_4")
    ),
    BadAdapter("feature", "ranks", "rank_pattern", fields(CONFIG, rank_pattern={"q_proj": 2})),
    BadAdapter(
        "feature", "whole-layers", "modules_to_save", fields(CONFIG, modules_to_save=["lm_head"])
    ),
    BadAdapter("feature", "unheard-of", "use_next: expected", fields(CONFIG, use_next={"a": 1})),
    BadAdapter("config", "another-method", "peft_type", fields(CONFIG, peft_type="IA3")),
    BadAdapter("config", "no-targets", "target_modules", fields(CONFIG, target_modules=None)),
    BadAdapter("config", "none", f"{CONFIG}: expected a file", removed(CONFIG)),
    BadAdapter("config", "not-json", f"{CONFIG}: expected JSON", written(CONFIG, b"{")),
    BadAdapter("pickle", "beside", "only data", pickled("adapter_model.bin", instead=False)),
    BadAdapter("pickle", "renamed", "a whole safetensors", written(WEIGHTS, b"\x80\x04N.")),
    BadAdapter("code", "python", "only data", written("modeling.py", b"import os\n")),
    BadAdapter("truncated", "half", "a whole safetensors file", half),
    BadAdapter("link", "outside", "a link", linked),
    BadAdapter(
        "more weights",
        "whole-model",
        "no weights but",
        lambda folder: save_file({"x": torch.zeros(1)}, folder / "model.safetensors"),
    ),
]

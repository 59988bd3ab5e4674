import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from contracts.errors import InvalidInput
from contracts.release import Release, ReleaseRegistry
from instructloop.adapter import bring_adapter, merge
from tests import tiny_adapters, tiny_models
from training.model import canary_of


@pytest.fixture
def registry(tmp_path: Path) -> ReleaseRegistry:
    registry = ReleaseRegistry(tmp_path / "registry")
    folder = tiny_models.save(tmp_path / "base", 1, tied=True)
    registry.publish(tiny_models.release(registry, folder, "r0001"))
    return registry


def test_adapter_is_published_over_its_base_with_the_canary_of_both(
    registry: ReleaseRegistry, tmp_path: Path
) -> None:
    folder = tiny_adapters.save(tmp_path / "adapter", 2, tmp_path / "base")
    release = bring_adapter(registry, folder, "r0001", "test")
    base = registry.get("r0001")
    assert registry.current() == release and release.id.startswith("r0002-")
    assert (release.base, release.parent, release.model) == (base.artifact, "r0001", base.model)
    assert registry.artifacts.verify(release.artifact).kind == "adapter"
    want = canary_of(tiny_adapters.merged(tmp_path / "merged", tmp_path / "base", folder))
    assert release.canary.token_ids == want.token_ids
    assert release.canary.logprobs == pytest.approx(want.logprobs, abs=1e-4)
    assert release.canary.logprobs != pytest.approx(canary_of(tmp_path / "base").logprobs, abs=0.1)


def test_adapter_over_an_adapter_and_one_that_does_not_fit_are_refused(
    registry: ReleaseRegistry, tmp_path: Path
) -> None:
    folder = tiny_adapters.save(tmp_path / "adapter", 2, tmp_path / "base")
    first: Release = bring_adapter(registry, folder, "r0001", "test")
    with pytest.raises(InvalidInput, match="--base: expected a release of whole weights"):
        bring_adapter(registry, folder, first.id, "test")
    config = tiny_adapters.CONFIG | {"r": 8}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidInput, match=r"lora_A\.weight: expected F32 \(8, 128\)"):
        bring_adapter(registry, folder, "r0001", "test")
    assert registry.current() == first


@pytest.mark.parametrize(("stabilized", "scale"), [(False, 2.0), (True, 4.0)])
def test_merged_weights_have_the_product_added_at_its_scale(
    registry: ReleaseRegistry, tmp_path: Path, stabilized: bool, scale: float
) -> None:
    """Alpha is 8 and the rank 4: 8 / 4, and 8 / sqrt(4)."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    tiny_adapters.save(folder, 2, base)
    config = tiny_adapters.CONFIG | {"use_rslora": stabilized}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    merge(base, folder, tmp_path / "merged")
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "merged"))
    factors = load_file(folder / "adapter_model.safetensors")
    for name, weight in before.items():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        added = torch.zeros_like(weight)
        if f"{layer}.lora_A.weight" in factors:
            a, b = (factors[f"{layer}.lora_{each}.weight"] for each in "AB")
            added = scale * torch.einsum("or,ri->oi", b, a)
        torch.testing.assert_close(after[name], weight + added)

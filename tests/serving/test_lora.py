import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from contracts.errors import InvalidInput
from serving import lora
from tests import tiny_adapters, tiny_models
from tests.serving.bad_adapters import BAD_ADAPTERS, BadAdapter


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(tmp_path_factory.mktemp("lora") / "base", 1, tied=False)


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return tiny_adapters.save(base.parent / "adapter", 2, base)


def test_every_linear_layer_of_the_blocks_and_no_other_can_be_adapted(base: Path) -> None:
    layers = lora.linear_layers(base)
    names = [f"self_attn.{each}_proj" for each in "qkvo"]
    names += [f"mlp.{each}_proj" for each in ("gate", "up", "down")]
    assert layers.keys() == {f"model.layers.{i}.{name}" for i in (0, 1) for name in names}
    assert layers["model.layers.1.self_attn.k_proj"] == ("F32", (64, 128))


def test_an_adapter_as_peft_saves_it_fits_its_base(base: Path, adapter: Path) -> None:
    lora.check_fits(base, adapter, max_rank=4)
    with pytest.raises(InvalidInput, match="an integer from 1 to 3, got 4"):
        lora.check_fits(base, adapter, max_rank=3)


def test_an_adapter_of_a_narrower_model_does_not_fit(base: Path, adapter: Path) -> None:
    wide = shutil.copytree(base, base.parent / "wide")
    tiny_models.model(1, tied=False, layers=1).save_pretrained(wide)
    with pytest.raises(InvalidInput, match=r"layers\.1.*of a linear layer of the base"):
        lora.check_fits(wide, adapter, max_rank=16)


def test_the_zero_adapter_fits_its_base_and_adds_nothing(base: Path, tmp_path: Path) -> None:
    folder = lora.write_zero(base, tmp_path / "zero")
    lora.check_fits(base, folder, max_rank=1)
    assert all(not tensor.any() for tensor in load_file(folder / lora.WEIGHTS).values())


@pytest.mark.parametrize("bad", BAD_ADAPTERS, ids=lambda bad: f"{bad.kind}-{bad.name}")
def test_bad_adapter_is_refused_with_its_reason(
    base: Path, adapter: Path, tmp_path: Path, bad: BadAdapter
) -> None:
    folder = shutil.copytree(adapter, tmp_path / "bad")
    bad.spoil(folder)
    with pytest.raises(InvalidInput) as refused:
        lora.check_fits(base, folder, max_rank=16)
    assert bad.says in str(refused.value)


def test_there_are_ten_kinds_of_bad_adapters() -> None:
    assert len({bad.kind for bad in BAD_ADAPTERS}) >= 10

from pathlib import Path

import pytest

from contracts.errors import InvalidInput
from instructloop.config import Plugin, RoundConfig, load_config
from training.config import PpoConfig, RewardModelConfig, SftConfig
from training.presets import PAPER

MINIMAL = 'run = "r"\nlog = "sqlite:///l.db"\nregistry = "g"\n'
ROOT = Path(__file__).parents[2]


def written(folder: Path, text: str) -> Path:
    file = folder / "round.toml"
    file.write_text(text)
    return file


def test_defaults_are_the_papers_numbers(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, MINIMAL))
    assert (config.ppo.batch, config.ppo.minibatch, config.ppo.clip) == (512, 64, 0.2)
    assert (config.ppo.beta, config.ppo.ptx_coefficient, config.ppo.ema) == (0.02, 27.8, 0.992)
    assert (config.sft.epochs, config.sft.dropout) == (16, 0.2)
    assert config.rules.prompts_per_user == 200


@pytest.mark.parametrize("name", ["paper-1.3b", "paper-6b"])
def test_a_preset_of_the_paper_holds_its_numbers(tmp_path: Path, name: str) -> None:
    config = load_config(written(tmp_path, f'preset = "{name}"\n' + MINIMAL))
    assert (config.sft.epochs, config.sft.batch, config.sft.pretraining_share) == (2, 32, 0.1)
    assert config.sft == SftConfig(epochs=2, choose_by_reward=True)
    assert (config.reward_model, config.ppo) == (RewardModelConfig(), PpoConfig())
    # Whatever a default becomes one day, the paper's number stays.
    for section, numbers in PAPER.items():
        assert len(numbers) >= 6
        assert numbers.items() <= getattr(config, section).model_dump().items()


def test_a_section_comes_on_top_of_its_preset(tmp_path: Path) -> None:
    text = 'preset = "tiny"\n' + MINIMAL + "[ppo]\nbeta = 0.3\n"
    config = load_config(written(tmp_path, text), seed=7)
    assert (config.ppo.beta, config.ppo.batch, config.ppo.seed) == (0.3, 128, 7)
    assert config.sft.learning_rate == 1.5e-3
    assert RoundConfig.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    ("able", "precision"),
    [
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, "fp32"),
        ({"avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, "bf16"),
        ({"neon": True, "bf16": True}, "bf16"),
        ({"neon": True}, "fp32"),
    ],
)
def test_auto_precision_is_what_the_processor_multiplies(
    able: dict[str, bool], precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: able)
    text = MINIMAL + '[sft]\nprecision = "auto"\n[reward_model]\nprecision = "bf16"\n'
    config = load_config(written(tmp_path, text))
    # A run's record names the one that it learned with.
    assert config.sft.model_dump()["precision"] == precision
    assert (config.reward_model.precision, config.ppo.precision) == ("bf16", "fp32")


def test_a_rounds_device_reaches_every_stage_and_what_goes_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = 'preset = "tiny"\ndevice = "auto"\n' + MINIMAL + '[base]\nprecision = "auto"\n'
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr("torch.cpu.get_capabilities", dict)
    config = load_config(written(tmp_path, text))
    stages = (config.base, config.sft, config.reward_model, config.ppo)
    assert {s.device for s in (*stages, config.evaluation) if s} == {config.device} == {"cuda"}
    assert [s.precision for s in stages if s] == ["bf16", "bf16", "bf16", "fp32"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    here = load_config(written(tmp_path, text))
    assert (here.device, here.sft.device, here.sft.precision) == ("cpu", "cpu", "fp32")
    # Another device is no other run.
    assert "device" not in here.model_dump() and "device" not in here.model_dump()["ppo"]
    with pytest.raises(InvalidInput) as caught:
        load_config(written(tmp_path, text.replace('"auto"', '"cuda"', 1)))
    told = "device: expected cpu or auto: PyTorch finds no GPU, got 'cuda'"
    assert str(caught.value) == f"{tmp_path / 'round.toml'}: {told}"


def test_the_seed_reaches_every_stage(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, MINIMAL + "[base]\n"), seed=7)
    assert config.base is not None
    assert {config.base.seed, config.sft.seed, config.reward_model.seed, config.ppo.seed} == {7}


@pytest.mark.parametrize(
    ("extra", "field"),
    [
        ("[ppo]\nbtea = 0.1\n", "ppo.btea"),
        ("[ppo]\nbeta = -1\n", "ppo.beta"),
        ("[base]\nvocab_size = 10\n", "base.vocab_size"),
        ("[base]\nhidden_size = 64\nheads = 4\n", "base.hidden_size: expected 4 heads times"),
        ("[base]\nheads = 0\n", "base.heads"),
        ("colour = 1\n", "colour"),
        ('preset = "paper-175b"\n', "preset"),
        ("preset = [1]\n", "preset"),
        ('preset = "tiny"\nppo = 3\n', "ppo"),
        ('device = "gpu"\n[ppo]\nbeta = 0.1\n', ": device: expected auto, 'cpu' or 'cuda'"),
        ("device = [1]\n", ": device"),
        ("[ppo]\nengine_memory = 1.0\n", "ppo.engine_memory"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(tmp_path: Path, extra: str, field: str) -> None:
    with pytest.raises(InvalidInput, match=field):
        load_config(written(tmp_path, MINIMAL + extra))


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ("[ppo]\nbtea = 0.1\n", "ppo.btea: expected a name that exists, got 'an unknown one'"),
        ("[ppo]\nbeta = -1\n", "ppo.beta: expected greater than or equal to 0, got -1"),
        (
            '[ppo]\nadvantage = "rloo"\n',
            "ppo.samples_per_prompt: expected 2 or more for rloo to compare, got 1",
        ),
        ("seed = 3\n[ppo]\nseed = 4\n", "ppo.seed: expected that of the round, 3, got 4"),
        ('[sft]\ndevice = "auto"\n', "sft.device: expected that of the round, 'cpu', got 'auto'"),
        (
            "[ppo]\noverlap = true\n",
            "ppo.importance_cap: expected > 0 where rollouts overlap, got 0",
        ),
        (
            "[rules]\nvalidation_fraction = 0.5\n",
            (
                "rules.validation_fraction: expected at most 1 together with train_fraction, 0.8, "
                "got 0.5"
            ),
        ),
    ],
)
def test_a_refusal_is_field_expected_and_got(tmp_path: Path, extra: str, told: str) -> None:
    file = written(tmp_path, MINIMAL + extra)
    with pytest.raises(InvalidInput) as caught:
        load_config(file)
    assert str(caught.value) == f"{file}: {told}"


def test_a_setting_without_a_default_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="registry: expected a value, got 'nothing'"):
        load_config(written(tmp_path, MINIMAL.replace('registry = "g"\n', "")))


def test_the_data_folder_is_asked_for(tmp_path: Path) -> None:
    file = written(tmp_path, MINIMAL + 'text = ["{data}/*.txt"]\n')
    with pytest.raises(InvalidInput, match="data"):
        load_config(file)
    assert load_config(file, tmp_path).text == (f"{tmp_path.resolve()}/*.txt",)


def test_a_plugin_that_is_not_there_is_named() -> None:
    with pytest.raises(InvalidInput, match=r"no\.such:thing"):
        Plugin(function="no.such:thing").load()


@pytest.mark.parametrize("name", ["demo.toml", "e2e.toml"])
def test_shipped_configurations_load(tmp_path: Path, name: str) -> None:
    overrides = {} if name == "e2e.toml" else {"run": "r", "log": "sqlite:///l.db", "registry": "g"}
    config = load_config(ROOT / "demo" / name, tmp_path, **overrides)
    assert config.base is not None

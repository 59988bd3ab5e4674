from pathlib import Path

import pytest

from contracts.errors import InvalidInput
from instructloop.config import Plugin, load_config

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
        ("colour = 1\n", "colour"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(tmp_path: Path, extra: str, field: str) -> None:
    with pytest.raises(InvalidInput, match=field):
        load_config(written(tmp_path, MINIMAL + extra))


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

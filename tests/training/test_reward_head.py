"""A head that scores: its start, the token that it reads, its place in a checkpoint."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from contracts.errors import CorruptArtifact
from tests import tiny_models
from training.model import load_tokenizer
from training.packing import Packed, Tree
from training.reward_head import REWARD_HEAD, RewardModel


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return tiny_models.save(tmp_path / "tiny", 0, tied=True)


def test_reward_head_starts_as_the_recipe_says() -> None:
    # d = 1023, so the standard deviation is 1/32; 2 x 1023 draws know it to about 2 %.
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=1023,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=2,
        num_key_value_heads=1,
    )
    backbone = LlamaModel(config)
    torch.manual_seed(0)
    heads = [RewardModel(backbone).head for _ in range(2)]
    weights = torch.cat([h.weight.detach().flatten() for h in heads])
    assert weights.std().item() == pytest.approx(1 / 32, rel=0.08)
    assert abs(weights.mean().item()) < 4 / 32 / len(weights) ** 0.5
    assert [h.bias.item() for h in heads] == [0.0, 0.0]


def scores(model: RewardModel, *sequences: list[int]) -> list[float]:
    packed = Packed([Tree(s) for s in sequences])
    with torch.no_grad():
        found: list[float] = model.scores(packed, packed.ends).tolist()
    return found


def test_a_score_is_read_at_the_last_real_token(tiny: Path) -> None:
    model = RewardModel.from_policy(tiny).eval()
    with torch.no_grad():
        hidden_BTH = model.backbone(torch.tensor([[5, 6, 7]])).last_hidden_state
        expected = model.head(hidden_BTH[0, 2]).item()
    alone = scores(model, [5, 6, 7])
    assert alone == pytest.approx([expected], abs=1e-5)
    # Beside others, whatever their tokens, it is the same; another text has another score.
    together = scores(model, [9, 9, 0, 0, 0], [5, 6, 7], [8, 9, 10, 11, 12])
    assert together[1] == pytest.approx(expected, abs=1e-5)
    assert abs(together[2] - expected) > 1e-3


def test_the_shift_is_part_of_the_checkpoint(tiny: Path, tmp_path: Path) -> None:
    model = RewardModel.from_policy(tiny).eval()
    [unshifted] = scores(model, [5, 6])
    model.shift += 1.5
    model.save(tmp_path / "reward", load_tokenizer(tiny))
    again = RewardModel.load(tmp_path / "reward").eval()
    assert scores(again, [5, 6]) == pytest.approx([unshifted - 1.5], abs=1e-6)


@pytest.mark.parametrize("damage", ["missing", "cut", "a policy"])
def test_a_reward_model_without_its_head_is_refused(
    tiny: Path, tmp_path: Path, damage: str
) -> None:
    folder = tmp_path / "reward"
    RewardModel.from_policy(tiny).save(folder, load_tokenizer(tiny))
    if damage == "missing":
        (folder / REWARD_HEAD).unlink()
    elif damage == "cut":
        (folder / REWARD_HEAD).write_bytes((folder / REWARD_HEAD).read_bytes()[:40])
    else:
        (folder / REWARD_HEAD).write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(CorruptArtifact, match=REWARD_HEAD):
        RewardModel.load(folder)

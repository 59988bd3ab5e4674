"""The models of PPO-ptx, from what SFT and the reward model's training left."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from training.config import Advantage
from training.data import PromptRow
from training.model import RewardModel, load_policy, load_tokenizer
from training.translation import Translation, alike


@dataclass(frozen=True)
class Networks:
    """The models of PPO-ptx; reference and reward never change. `value` where a network predicts
    rewards, `translation` where the reward model has a tokenizer of its own.
    """

    policy: PreTrainedModel
    reference: PreTrainedModel
    value: RewardModel | None
    reward: RewardModel
    translation: Translation | None = None

    @property
    def trained(self) -> dict[str, nn.Module]:
        """Those that learn, by name."""
        return {"policy": self.policy} | ({"value": self.value} if self.value else {})


def load_networks(
    sft: Path, reward_model: Path, prompts: Sequence[PromptRow] = (), advantage: Advantage = "gae"
) -> Networks:
    """Policy and reference from the SFT model, value network and reward from the reward model; no
    dropout anywhere.

    A value network reads the policy's tokens. Where the reward model has others, the value network
    starts from the SFT model with a new head, and rewards are of the same text in other tokens.
    """
    tokenizer, theirs = load_tokenizer(sft), load_tokenizer(reward_model)
    same, value = alike(tokenizer, theirs), None
    if advantage == "gae":
        value = (RewardModel.load(reward_model) if same else RewardModel.from_policy(sft)).eval()
    return Networks(
        policy=load_policy(sft).eval(),
        reference=load_policy(sft).eval().requires_grad_(False),
        value=value,
        reward=RewardModel.load(reward_model).eval().requires_grad_(False),
        translation=None if same else Translation(tokenizer, theirs, prompts),
    )

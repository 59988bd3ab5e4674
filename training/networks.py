"""The models of PPO-ptx, from what SFT and the reward model's training left."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from training import lora
from training.config import Advantage, LoraConfig
from training.data import PromptRow
from training.device import Device
from training.model import load_tokenizer, load_trainable
from training.reward_head import RewardModel
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
    sft: Path,
    reward_model: Path,
    prompts: Sequence[PromptRow] = (),
    advantage: Advantage = "gae",
    adapter: LoraConfig | None = None,
    seed: int = 0,
    device: Device = "cpu",
) -> Networks:
    """Policy and reference from the SFT model, value network and reward from the reward model; no
    dropout anywhere. With `adapter` policy and value network are frozen weights, which reference
    and reward share, with an adapter each.

    A value network reads the policy's tokens. Where the reward model has others, the value network
    starts from the SFT model with a new head, and rewards are of the same text in other tokens.
    """
    tokenizer, theirs = load_tokenizer(sft), load_tokenizer(reward_model)
    same, value = alike(tokenizer, theirs), None
    policy, reward = (
        load_trainable(sft, adapter, seed, device).eval(),
        RewardModel.load(reward_model, device).eval(),
    )
    if advantage == "gae":
        value = reward if same else RewardModel.from_policy(sft, device).eval()
        if adapter is not None:
            lora.adapt(value.backbone, adapter, seed)
    return Networks(
        policy=policy,
        reference=lora.frozen_twin(policy),
        value=value,
        reward=lora.frozen_twin(reward),
        translation=None if same else Translation(tokenizer, theirs, prompts),
    )

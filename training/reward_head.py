"""RewardModel: a head that scores, on a language model without its unembedding.

Shapes: M tokens that are asked for, G groups of raters.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from contracts.errors import CorruptArtifact, InvalidInput
from training import lora, ranks
from training.backbone import hidden_states
from training.device import Device, moved
from training.model import at_home, save_tokenizer
from training.packing import Packed

REWARD_HEAD = "reward_head.safetensors"


class RewardModel(nn.Module):
    """A language model without its unembedding and one scalar head; also the value network's shape.

    `shift` is subtracted from every score so that demonstrations score 0 on average; it is part of
    the checkpoint.

    In training each of G `groups` of raters may have a head of its own, over the one backbone. What
    is saved, and loaded where no group is named, is one head: their mean, each in units of its own
    `spread`, the standard deviation of its scores of demonstrations.
    """

    backbone: PreTrainedModel
    # A number, or [G] where there are groups.
    shift: Tensor
    spread: Tensor

    def __init__(self, backbone: PreTrainedModel, groups: Sequence[str] = ()) -> None:
        super().__init__()
        self.backbone = backbone
        hidden = backbone.config.get_text_config().hidden_size
        self.groups = tuple(groups)
        self.head = nn.Linear(hidden, len(groups) or 1)
        # Recipe, detail 2: N(0, 1/sqrt(d + 1)) and no bias to begin with.
        nn.init.normal_(self.head.weight, std=(hidden + 1) ** -0.5)
        nn.init.zeros_(self.head.bias)
        shape = (len(groups),) if groups else ()
        self.register_buffer("shift", torch.zeros(shape))
        self.register_buffer("spread", torch.ones(shape), persistent=False)

    @classmethod
    def from_policy(
        cls, folder: Path, device: Device = "cpu", groups: Sequence[str] = ()
    ) -> "RewardModel":
        backbone = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        return moved(cls(backbone, groups), device)

    @classmethod
    def load(cls, folder: Path, device: Device = "cpu", group: str | None = None) -> "RewardModel":
        """With the head of a group or, where none is named, the one that speaks for all.

        Raises CorruptArtifact where the head or its shift is missing, InvalidInput where the group
        is not one that it was trained with.
        """
        model = cls.from_policy(folder)
        of = "" if group is None else f"{group}."
        try:
            head = load_file(folder / REWARD_HEAD)
            if group is not None and f"{of}weight" not in head:
                known = sorted(n.removesuffix(".weight") for n in head if n.endswith(".weight"))
                raise InvalidInput("group", f"one of {known}", group)
            with torch.no_grad():
                model.head.weight.copy_(head[f"{of}weight"])
                model.head.bias.copy_(head[f"{of}bias"])
                model.shift.copy_(head[f"{of}shift"])
        except (FileNotFoundError, KeyError, SafetensorError) as e:
            raise CorruptArtifact(f"{folder / REWARD_HEAD}: not a reward model's head: {e}") from e
        return moved(model, device)

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Into a new folder; on rank 0, of all."""
        weights = ranks.whole(self)
        if not ranks.first():
            return
        weights = lora.merged(self, at_home(weights))
        folder.mkdir(parents=True)
        inside = {
            n.removeprefix("backbone."): w for n, w in weights.items() if n.startswith("backbone.")
        }
        self.backbone.save_pretrained(folder, state_dict=inside)
        save_tokenizer(tokenizer, folder)
        head = {name: weights[f"head.{name}"].contiguous() for name in ("weight", "bias")}
        head["shift"] = weights["shift"]
        save_file(self._mean_and_each(head) if self.groups else head, folder / REWARD_HEAD)

    def _mean_and_each(self, heads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The head of all groups together, and by its name that of each."""
        spread_G = self.spread.cpu()
        say_G = spread_G.mean() / spread_G / len(self.groups)
        said = {name: torch.tensordot(say_G, x, 1) for name, x in heads.items()}
        found = {**said, "weight": said["weight"][None], "bias": said["bias"][None]}
        for i, group in enumerate(self.groups):
            found |= {f"{group}.{name}": x[i].clone() for name, x in heads.items()}
        return found

    def scores(self, packed: Packed, at_M: Tensor) -> Tensor:
        """The head's output, float32 [M], at the tokens `at_M` of packed trees; where there are
        groups every head's, [M, G].

        The head is in float32 even under autocast: in bf16 near scores would be equal.
        """
        compute = partial(RewardModel._scores, packed=packed, at_M=at_M)
        scores_M: Tensor = ranks.gathered(self, compute)
        return scores_M

    def _scores(self, packed: Packed, at_M: Tensor) -> Tensor:
        hidden_MH = hidden_states(self.backbone, packed, at_M)
        with torch.autocast(hidden_MH.device.type, enabled=False):
            scores_M: Tensor = self.head(hidden_MH.float()).squeeze(-1) - self.shift
        return scores_M

"""A policy: any Hugging Face causal language model from a local folder, loaded, asked and saved.

Shapes: R response tokens of a sequence, M those of all sequences of a pass, H hidden size, V
vocabulary.
"""

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from contracts.errors import InvalidInput
from contracts.prompt import TOKENIZER_FILES
from contracts.release import Canary
from training import lora, ranks
from training.backbone import hidden_states
from training.config import LoraConfig
from training.device import Device, across, moved
from training.kernels.linear_logprob import TokenLosses, linear_logprob_loss, linear_logprobs
from training.packing import PASS_TOKENS, Packed, Tree


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`; it must have an end-of-text token, and needs no pad token."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.eos_token_id is None:
        raise InvalidInput(f"{folder}: eos_token", "a tokenizer with an end-of-text token", None)
    return tokenizer


def load_policy(folder: Path, device: Device = "cpu") -> PreTrainedModel:
    """A causal language model in float32. Raises InvalidInput where the folder holds none."""
    if not (folder / "config.json").is_file():
        raise InvalidInput("model folder", "a folder with config.json and safetensors", str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    _check_plain_head(model)
    return moved(model, device)


def load_trainable(
    folder: Path, adapter: LoraConfig | None, seed: int, device: Device = "cpu"
) -> PreTrainedModel:
    """The policy in `folder` to train: all its weights or, of a config, an adapter alone.

    The adapter goes on from the one that the policy was trained with, over the same base, where it
    is of this config. Else it is a new one, of the weights in `folder`.
    """
    if adapter is None:
        return load_policy(folder, device)
    base = lora.base_of(folder)
    if base is not None:
        model = _adapted(base, adapter, seed)
        if lora.take_over(model, folder):
            return moved(model, device)
    return moved(_adapted(folder, adapter, seed), device)


def _adapted(base: Path, adapter: LoraConfig, seed: int) -> PreTrainedModel:
    model = load_policy(base)
    lora.adapt(model, adapter, seed)
    setattr(model, "adapted", base)  # noqa: B010  a module's attributes are typed
    return model


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """What the model computes with, by name: gathered from all ranks, adapters merged in."""
    return lora.merged(model, ranks.whole(model))


def at_home(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the processor, where files are written; tied ones stay one tensor."""
    found = {x: x.cpu() for x in dict.fromkeys(weights.values())}
    return {name: found[x] for name, x in weights.items()}


def save_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights (safetensors), config and tokenizer into a new folder; on rank 0, of all. An
    adapter is merged into them, and is beside the folder too.
    """
    weights = ranks.whole(model)
    if ranks.first():
        weights = at_home(weights)
        folder.mkdir(parents=True)
        model.save_pretrained(folder, state_dict=lora.merged(model, weights))
        save_tokenizer(tokenizer, folder)
        if base := getattr(model, "adapted", None):
            lora.save(model, weights, folder, base)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The files that it was loaded from, byte for byte, because a server refuses a release whose
    tokenizer differs.

    Written by the library they would differ. A new tokenizer, which has no folder yet, is written
    by the library.
    """
    source = Path(tokenizer.name_or_path) if tokenizer.name_or_path else None
    if source is None:
        tokenizer.save_pretrained(folder)
        return
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


@torch.no_grad()
def _check_plain_head(model: PreTrainedModel) -> None:
    """Raise InvalidInput if the logits are more than hidden states times the unembedding (soft
    caps, scales).

    The head's output is blown up to 100, because a soft cap does not show on small logits.
    """
    tokens_BT = torch.tensor([[0, 1, 2]])
    hidden_BTH = model.base_model(input_ids=tokens_BT, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    blown_up = head.register_forward_hook(lambda _, __, out: out * (100 / out.abs().max()))
    plain_BTV = head(hidden_BTH)
    logits_BTV = model(input_ids=tokens_BT, use_cache=False).logits
    blown_up.remove()
    if not torch.allclose(plain_BTV, logits_BTV, rtol=1e-3, atol=1e-2):
        raise InvalidInput("model", "a plain unembedding as its head", type(model).__name__)


def unembedding(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    """[V, H] and, where there is one, [V]: from hidden states to logits."""
    head: nn.Linear = model.get_output_embeddings()
    return head.weight, head.bias


def backbone_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its unembedding."""
    backbone = model.base_model
    assert isinstance(backbone, PreTrainedModel)
    return backbone


Pair = tuple[Sequence[int], Sequence[int]]


def pack_pairs(pairs: Sequence[Pair], samples: int = 1) -> tuple[Packed, Tensor, Tensor]:
    """The trees of the pairs; where the M response tokens are predicted, in order, and the tokens
    themselves. All on the processor.
    """
    packed = Packed(trees_of(pairs, samples))
    if samples > 1:
        return packed, *packed.into_responses()
    return packed, *packed.before([len(prompt) for prompt, _ in pairs])


def trees_of(pairs: Sequence[Pair], samples: int = 1) -> list[Tree]:
    """Prompt and response as one sequence each; with several `samples` so many in a row have one
    prompt, which they share.
    """
    if samples == 1:
        return [Tree([*prompt, *response]) for prompt, response in pairs]
    groups = [pairs[i : i + samples] for i in range(0, len(pairs), samples)]
    return [Tree(group[0][0], [response for _, response in group]) for group in groups]


def packed_loss(
    model: PreTrainedModel, packed: Packed, at_M: Tensor, targets_M: Tensor, losses: TokenLosses
) -> tuple[Tensor, Tensor]:
    """The sum of `losses` over `targets_M`, predicted at `at_M` at temperature 1, and their
    log-probabilities [M] (without gradient).
    """
    compute = partial(_loss, packed=packed, at_M=at_M, targets_M=targets_M, losses=losses)
    found: tuple[Tensor, Tensor] = ranks.gathered(model, compute)
    return found


def _loss(
    model: PreTrainedModel, packed: Packed, at_M: Tensor, targets_M: Tensor, losses: TokenLosses
) -> tuple[Tensor, Tensor]:
    hidden_MH = hidden_states(backbone_of(model), packed, at_M)
    targets_M = across(targets_M, hidden_MH.device)
    return linear_logprob_loss(hidden_MH, *unembedding(model), targets_M, losses)


@torch.no_grad()
def packed_logprobs(
    model: PreTrainedModel, packed: Packed, at_M: Tensor, targets_M: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `targets_M` where the model stands at `at_M`, and the entropies there,
    both float32 [M].
    """
    compute = partial(_logprobs, packed=packed, at_M=at_M, targets_M=targets_M)
    found: tuple[Tensor, Tensor] = ranks.gathered(model, compute)
    return found


def _logprobs(
    model: PreTrainedModel, packed: Packed, at_M: Tensor, targets_M: Tensor
) -> tuple[Tensor, Tensor]:
    hidden_MH = hidden_states(backbone_of(model), packed, at_M)
    return linear_logprobs(hidden_MH, *unembedding(model), across(targets_M, hidden_MH.device))


def response_logprobs(model: PreTrainedModel, pairs: Sequence[Pair]) -> list[Tensor]:
    """Log-probabilities, float32 [R] each, of each pair's response tokens at temperature 1.

    Only the response positions go through the unembedding.
    """
    found: list[Tensor] = [torch.empty(0)] * len(pairs)
    trees = [Tree([*prompt, *response]) for prompt, response in pairs]
    for part, _ in ranks.passes(trees, PASS_TOKENS):
        logprobs_M, _ = packed_logprobs(model, *pack_pairs([pairs[i] for i in part]))
        lengths = [len(pairs[i][1]) for i in part]
        for i, own_R in zip(part, logprobs_M.split(lengths), strict=True):
            found[i] = own_R
    return ranks.complete(found)


def hide_progress_bars() -> None:
    """Keep transformers' bars out of the output, where a stage is a line."""
    logging.disable_progress_bar()


CANARY_TEXT = (
    "A canary sings before the door is opened, and the same song is heard again behind it."
)
# Nobody is answered while a server hears it: the fewer, the shorter the pause of a swap.
CANARY_TOKENS = 8


@torch.no_grad()
def canary_of(folder: Path) -> Canary:
    """What this folder's model, in float32 on the processor, says of a fixed text; a server
    compares it after a swap.
    """
    tokenizer, model = load_tokenizer(folder), load_policy(folder).eval()
    ids = tokenizer(CANARY_TEXT, add_special_tokens=False)["input_ids"][:CANARY_TOKENS]
    logits_TV = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
    logprobs_T = logits_TV.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return Canary(token_ids=tuple(ids), logprobs=tuple(logprobs_T.tolist()))

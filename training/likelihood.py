"""The gradient of the mean log-likelihood of responses: SFT's loss, and the pretraining mix."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from training.config import Precision
from training.model import Pair, pack_pairs, packed_loss
from training.optimizer import autocast
from training.packing import PASS_TOKENS, Tree, passes


def accumulate_likelihood(
    model: PreTrainedModel, pairs: Sequence[Pair], precision: Precision, weight: float = 1.0
) -> float:
    """The gradient of `weight` times the mean negative log-likelihood per response token,
    end-of-text included, in passes without padding; the mean itself.
    """
    count = sum(len(response) for _, response in pairs)
    total = 0.0
    for part in passes([Tree([*prompt, *response]) for prompt, response in pairs], PASS_TOKENS):
        with autocast(precision):
            inputs = pack_pairs([pairs[i] for i in part])
            loss, _ = packed_loss(model, *inputs, lambda logprobs_C, _: -logprobs_C / count)
        (weight * loss).backward()
        total += loss.item()
    return total

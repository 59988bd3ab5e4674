"""Demonstrations > SFT policy (InstructGPT, C.1): the response's tokens are learned, the prompt's
are not.
"""

import random
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from contracts.errors import InvalidInput
from training import ranks
from training.backbone import recompute_layers
from training.checkpoint import Checkpoint, Stateful
from training.config import SftConfig
from training.data import (
    SftRow,
    TokenStream,
    encode_responses,
    fits,
    render_all,
    shuffled_batches,
)
from training.likelihood import accumulate_mixed_likelihood
from training.metrics import Metrics
from training.model import (
    Pair,
    backbone_of,
    load_tokenizer,
    load_trainable,
    response_logprobs,
    save_policy,
)
from training.optimizer import adam, cosine_share, set_rate, step

# Llama, Qwen and Gemma; GPT-2; OPT and Phi; GPT-NeoX, Falcon and BLOOM.
INTO_STREAM = frozenset(
    ("o_proj", "down_proj", "c_proj", "out_proj", "fc2", "dense", "dense_4h_to_h")
)


def train_sft(
    config: SftConfig,
    parent: Path,
    rows: Sequence[SftRow],
    validation: Sequence[SftRow],
    folder: Path,
    metrics: Metrics,
    pretraining: Sequence[str] = (),
) -> None:
    """Fine-tune the model in `parent` on `rows` and save it into the new folder `folder`; with
    `choose_by_reward` each epoch's into `epoch-1`, `epoch-2` ... beside it.

    Documents of `pretraining` are mixed in, so that PPO does not start from a policy that forgot
    how to write (C.4). Goes on from its checkpoint where there is one.
    """
    torch.manual_seed(config.seed + ranks.rank())
    tokenizer = load_tokenizer(parent)
    model = load_trainable(parent, config.lora, config.seed, config.device)
    pairs = _encode(config, tokenizer, rows)
    held_out = _encode(config, tokenizer, validation)
    if not pairs:
        expected = "at least one within the length limits"
        raise InvalidInput("demonstrations", expected, f"{len(rows)} rows, none usable")
    stream = _stream(config, tokenizer, pretraining)
    set_residual_dropout(model, config.dropout)
    recompute_layers(backbone_of(model), config.recompute)
    ranks.shard(model)
    optimizer = adam(model.parameters(), config.learning_rate)

    rng = random.Random(config.seed)
    batches = [
        b for _ in range(config.epochs) for b in shuffled_batches(len(pairs), config.batch, rng)
    ]
    parts: dict[str, Stateful] = {"model": model, "optimizer": optimizer, "metrics": metrics}
    if stream is not None:
        parts["text"] = stream.order
    progress = Checkpoint(folder, config, (pairs, list(pretraining)), parts)
    done = progress.restore()
    for i, batch in enumerate(batches[done:], done):
        rate = config.learning_rate * cosine_share(i, len(batches), config.final_rate_share)
        set_rate(optimizer, rate)
        model.train()
        sets: list[tuple[Sequence[Pair], float]] = [([pairs[p] for p in batch], 1.0)]
        if stream is not None:
            rows_BT = stream.take(max(1, round(len(batch) * config.pretraining_share)))
            texts = [(row[:1], row[1:]) for row in rows_BT.tolist()]
            sets.append((texts, config.pretraining_share))
        share = accumulate_mixed_likelihood(model, sets, config.precision)[0]
        norm = step(model, optimizer, config.max_grad_norm)
        if i % 10 == 0 or i == len(batches) - 1:
            loss = sum(ranks.everyone(share.item()))
            metrics.write(i, loss=loss, grad_norm=norm.item(), rate=rate)
        epoch, within = divmod((i + 1) * config.epochs, len(batches))
        if config.choose_by_reward and not within:
            kept = progress.folder / f"epoch-{epoch}"
            if ranks.first():
                shutil.rmtree(kept, ignore_errors=True)
            save_policy(model, tokenizer, kept)
        progress.save(i + 1)
    metrics.write(len(batches), validation_loss=_validate(model, held_out))
    set_residual_dropout(model, 0.0)
    save_policy(model, tokenizer, folder)
    if ranks.first():
        for kept in progress.folder.glob("epoch-*"):
            kept.rename(folder.with_name(kept.name))


def _stream(
    config: SftConfig, tokenizer: PreTrainedTokenizerBase, documents: Sequence[str]
) -> TokenStream | None:
    if not documents or not config.pretraining_share:
        return None
    ids = tokenizer(list(documents), add_special_tokens=False)["input_ids"]
    return TokenStream(ids, tokenizer.eos_token_id, config.pretraining_row_tokens, config.seed)


def set_residual_dropout(model: PreTrainedModel, share: float) -> None:
    """Drop this share of what each layer adds to the residual stream, in training mode only.

    The hook stands on the modules that write into the stream, known by their names. Raises
    InvalidInput on an architecture that has none of them, unless `share` is 0.
    """
    earlier: Iterable[RemovableHandle] = getattr(model, "residual_dropout", ())
    for handle in earlier:
        handle.remove()
    into_stream = [m for n, m in model.named_modules() if n.rpartition(".")[2] in INTO_STREAM]
    if share and not into_stream:
        raise InvalidInput("dropout", f"0 for a {type(model).__name__}", share)
    handles = [
        module.register_forward_hook(lambda m, _, out: F.dropout(out, share, m.training))
        for module in into_stream
        if share
    ]
    setattr(model, "residual_dropout", handles)  # noqa: B010  a module's attributes are typed


def _validate(model: PreTrainedModel, pairs: Sequence[Pair]) -> float:
    """Mean negative log-likelihood per response token."""
    if not pairs:
        return float("nan")
    return -float(torch.cat(response_logprobs(model.eval(), pairs)).mean())


def _encode(
    config: SftConfig, tokenizer: PreTrainedTokenizerBase, rows: Sequence[SftRow]
) -> list[Pair]:
    responses = encode_responses(tokenizer, [row.response for row in rows])
    pairs = zip(render_all(tokenizer, rows), responses, strict=True)
    return [
        p for p in pairs if fits(p[0], [p[1]], config.max_prompt_tokens, config.max_response_tokens)
    ]

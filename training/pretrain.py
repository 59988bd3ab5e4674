"""Text > tokenizer and base model, from scratch and small, for those who bring no model of their
own.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from contracts.prompt import PLAIN_CHAT_TEMPLATE
from training.backbone import recompute_layers
from training.checkpoint import Checkpoint, Stateful
from training.config import PretrainConfig
from training.data import TokenStream
from training.device import across, moved
from training.metrics import Metrics
from training.model import backbone_of, save_policy
from training.optimizer import adam, autocast, cosine_share, set_rate, step

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text round-trips; the pad token differs from the end-of-text token
    (recipe, detail 3).
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=PAD)
    fast.chat_template = PLAIN_CHAT_TEMPLATE
    return fast


def pretrain(config: PretrainConfig, texts: Sequence[str], folder: Path, metrics: Metrics) -> None:
    """Train tokenizer and model on `texts` and save both into the new folder `folder`.

    Goes on from its checkpoint where there is one.
    """
    torch.manual_seed(config.seed)
    tokenizer = train_tokenizer(texts, config.vocab_size)
    model = moved(LlamaForCausalLM(_llama(config, tokenizer)), config.device)
    recompute_layers(backbone_of(model), config.recompute)
    stream = TokenStream(
        tokenizer(list(texts))["input_ids"], tokenizer.eos_token_id, config.row_tokens, config.seed
    )
    optimizer = adam(model.parameters(), config.learning_rate)
    parts: dict[str, Stateful] = {
        "model": model,
        "optimizer": optimizer,
        "text": stream.order,
        "metrics": metrics,
    }
    progress = Checkpoint(folder, config, texts, parts)
    for i in range(progress.restore(), config.steps):
        set_rate(
            optimizer,
            config.learning_rate * cosine_share(i, config.steps, 0.1, config.warmup_steps),
        )
        rows_BT = across(stream.take(config.rows_per_step), model.device)
        with autocast(config.precision, model.device):
            loss = model(input_ids=rows_BT, labels=rows_BT, use_cache=False).loss
        loss.backward()
        step(model, optimizer, config.max_grad_norm)
        if i % 10 == 0 or i == config.steps - 1:
            metrics.write(i, loss=loss.item())
        progress.save(i + 1)
    save_policy(model, tokenizer, folder)


def _llama(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=config.context,
        # The usual 0.02 is for wide models. In a narrow one it leaves attention all but uniform for
        # hundreds of steps, and nothing is copied from the context meanwhile.
        initializer_range=config.hidden_size**-0.5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )

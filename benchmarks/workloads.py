"""Seeded models and data of the training benchmarks, the same for both sides of a comparison.

Nothing is downloaded: weights and tokens are drawn from the seeds named here. Token 0 ends a text,
token 1 pads; the others are drawn evenly.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

EOS, PAD = 0, 1
VOCAB = 2048
Ranking = tuple[list[int], list[list[int]]]
Episode = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Shape:
    """Width, inner width, layers and heads of a Llama with tied embeddings."""

    hidden: int
    inner: int
    layers: int
    heads: int


SHAPES = {
    "tiny": Shape(256, 704, 4, 4),
    "small": Shape(512, 1408, 8, 8),
    "base": Shape(768, 2048, 12, 12),
    "large": Shape(1024, 2816, 24, 16),
}


def config(shape: str, **changes: Any) -> LlamaConfig:
    s = SHAPES[shape]
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=s.hidden,
        intermediate_size=s.inner,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        **changes,
    )


def causal(shape: str, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(config(shape))


def scorer(shape: str, seed: int) -> LlamaForSequenceClassification:
    """A Llama with one score at the last token."""
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(config(shape, num_labels=1))


def _text(rng: np.random.Generator, length: int, ends: bool) -> list[int]:
    tokens: list[int] = rng.integers(2, VOCAB, length).tolist()
    return [*tokens[:-1], EOS] if ends else tokens


def rankings(k: int, prompts: int) -> list[Ranking]:
    """Prompts of 64 to 128 tokens with `k` answers of 32 to 64, best first."""
    rng = np.random.default_rng(1234 + k)
    return [
        (
            _text(rng, int(rng.integers(64, 129)), ends=False),
            [_text(rng, int(rng.integers(32, 65)), ends=True) for _ in range(k)],
        )
        for _ in range(prompts)
    ]


def documents(count: int) -> list[list[int]]:
    """Texts of 32 to 512 tokens, evenly spread on a logarithmic scale."""
    rng = np.random.default_rng(99)
    lengths = np.exp(rng.uniform(math.log(32), math.log(512), count)).round().astype(int)
    return [_text(rng, int(n), ends=True) for n in lengths]


def episodes(count: int) -> list[Episode]:
    """Prompts of 16 to 64 tokens with responses of 8 to 64 that stop."""
    rng = np.random.default_rng(7)
    return [
        (
            _text(rng, int(rng.integers(16, 65)), ends=False),
            _text(rng, int(rng.integers(8, 65)), ends=True),
        )
        for _ in range(count)
    ]


def rows(count: int, width: int) -> list[list[int]]:
    """Pretraining text in rows of `width` tokens."""
    rng = np.random.default_rng(8)
    return [_text(rng, width, ends=False) for _ in range(count)]

"""Tiny configurations of the families of models that training takes."""

from collections.abc import Callable
from typing import Any

from transformers import (
    BloomConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "head_dim": 16,
    "eos_token_id": 0,
    "bos_token_id": None,
    "pad_token_id": None,
}
ARCHITECTURES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama-tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SIZES),
    "gemma": lambda: GemmaConfig(**SIZES),
    "gpt2": lambda: GPT2Config(
        vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=0
    ),
    "gpt-neox": lambda: GPTNeoXConfig(
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        eos_token_id=0,
    ),
}
# Models whose attention is more than a softmax over all that came before: they see row by row.
UNPACKABLE: dict[str, Callable[[], PreTrainedConfig]] = {
    "alibi": lambda: BloomConfig(
        vocab_size=320, hidden_size=32, n_layer=2, n_head=2, eos_token_id=0, bos_token_id=None
    ),
    "soft cap": lambda: Gemma2Config(**SIZES, attn_logit_softcapping=0.5),
    "sliding window": lambda: MistralConfig(**SIZES, sliding_window=4),
    "recurrence": lambda: MambaConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, eos_token_id=0, bos_token_id=None
    ),
}

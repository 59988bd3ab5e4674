"""Tiny random Llama folders and releases of them: real files for tests, made in a second."""

import datetime as dt
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from contracts.release import Canary, Release, ReleaseRegistry

LINES = (
    "Write one sentence about the sea.",
    "List three colours, separated by commas.",
    "Classify the review as good or bad: the soup was cold.",
    "Answer in one word: which animal barks?",
)
CANARY_TEXT = "Write one sentence about the sea. List three colours."


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over a few lines; the same in every call."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")


def model(seed: int, *, tied: bool, layers: int = 2) -> LlamaForCausalLM:
    """Random weights, wide enough apart that greedy answers of two seeds differ."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=0,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).float().eval()


def save(folder: Path, seed: int, *, tied: bool) -> Path:
    """A Hugging Face model folder."""
    model(seed, tied=tied).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def canary(folder: Path) -> Canary:
    """What Hugging Face's forward pass says of a fixed prompt, in float32."""
    token_ids = tokenizer().encode(CANARY_TEXT)
    policy = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logprobs = policy(torch.tensor([token_ids])).logits[0].log_softmax(-1)
    taken = [float(logprobs[i - 1, token_ids[i]]) for i in range(1, len(token_ids))]
    return Canary(token_ids=tuple(token_ids), logprobs=tuple(taken))


def release(registry: ReleaseRegistry, folder: Path, canary_of: Canary | None = None) -> Release:
    """Put `folder` into the store; the release that names it, not yet published."""
    artifact = registry.artifacts.put("policy", folder)
    return Release(
        id=registry.next_id(artifact),
        model="tiny",
        created=dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
        artifact=artifact,
        canary=canary_of or canary(folder),
        code_version="test",
    )

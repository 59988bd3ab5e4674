"""Tiny random Llama folders and releases of them: real files for tests, made in a second."""

import datetime as dt
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
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
    policy: LlamaForCausalLM = LlamaForCausalLM(config).float().eval()
    return policy


def save(folder: Path, seed: int, *, tied: bool) -> Path:
    """A Hugging Face model folder."""
    model(seed, tied=tied).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def poison(folder: Path) -> None:
    """Put one NaN into the weights."""
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def canary(folder: Path, tokens: int | None = None) -> Canary:
    """What Hugging Face's forward pass says of a fixed prompt, in float32."""
    token_ids = tokenizer().encode(CANARY_TEXT)
    if tokens is not None:
        token_ids = (token_ids * tokens)[:tokens]
    policy = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logprobs = policy(torch.tensor([token_ids])).logits[0].log_softmax(-1)
    taken = [float(logprobs[i - 1, token_ids[i]]) for i in range(1, len(token_ids))]
    return Canary(token_ids=tuple(token_ids), logprobs=tuple(taken))


def release(
    registry: ReleaseRegistry, folder: Path, release_id: str, canary_tokens: int | None = None
) -> Release:
    """Put `folder` into the store; the release that names it, not yet published."""
    return Release(
        id=release_id,
        model="tiny",
        created=dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
        artifact=registry.artifacts.put("policy", folder),
        canary=canary(folder, canary_tokens),
        code_version="test",
    )


def greedy(folder: Path, prompt: str, tokens: int) -> list[int]:
    """The token ids that Hugging Face answers at temperature 0, going on after an end of text."""
    return continued(folder, tokenizer().encode(prompt), tokens)


def continued(folder: Path, ids: list[int], tokens: int) -> list[int]:
    """The same after a prompt of token ids."""
    policy = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    taken: list[int] = []
    with torch.no_grad():
        for _ in range(tokens):
            taken.append(int(policy(torch.tensor([ids + taken])).logits[0, -1].argmax()))
    return taken

"""A toy world: prompts ask for letters, demonstrations are random letters, raters like the letter
e.
"""

import random
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from training.config import PretrainConfig, RewardModelConfig, SftConfig
from training.data import PromptRow, RankedRow, SftRow, pad
from training.metrics import Metrics
from training.model import load_policy, load_tokenizer
from training.pretrain import pretrain
from training.reward_model import train_reward_model
from training.rollout import Sampled
from training.sft import train_sft

LETTERS = "abcdef"
PRETRAIN = PretrainConfig(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=128,
    layers=2,
    heads=2,
    context=64,
    steps=40,
    rows_per_step=16,
    row_tokens=32,
    learning_rate=5e-3,
    warmup_steps=2,
)
SFT = SftConfig(epochs=8, batch=32, learning_rate=3e-3, dropout=0.1)
REWARD = RewardModelConfig(epochs=6, prompts_per_batch=16, learning_rate=3e-3)


def answer(rng: random.Random) -> str:
    return "".join(f" {rng.choice(LETTERS)}" for _ in range(rng.randint(3, 6)))


def prompts(count: int) -> list[PromptRow]:
    return [
        PromptRow(f"p{i}", f"user{i % 8}", f"Letters {i % 10}:", (), "generation")
        for i in range(count)
    ]


def demonstrations(count: int, seed: int) -> list[SftRow]:
    rng = random.Random(seed)
    return [SftRow(**vars(p), response=answer(rng)) for p in prompts(count)]


def documents(count: int, seed: int) -> list[str]:
    return [row.text + row.response for row in demonstrations(count, seed)]


def rankings(count: int, seed: int) -> list[RankedRow]:
    """Four answers each; more of the letter e is better, as many is a tie."""
    rng = random.Random(seed)
    rows = []
    for p in prompts(count):
        answers = tuple(answer(rng) for _ in range(4))
        counts = [a.count("e") for a in answers]
        ranks = tuple(sorted(set(counts), reverse=True).index(c) for c in counts)
        rows.append(
            RankedRow(
                **vars(p),
                rater_id=f"rater{rng.randrange(5)}",
                responses=answers,
                finished=(True,) * 4,
                ranks=ranks,
            )
        )
    return rows


# Two groups of raters, four of five rankings from the first; both like the letter e.
GROUPS = {"likes": ("likes-*",), "dislikes": ("dislikes-*",)}


def two_tastes(count: int, seed: int) -> list[RankedRow]:
    """Rankings by raters of GROUPS: of the letter a the first like more, the second less."""
    rng, rows = random.Random(seed), []
    for row in rankings(count, seed):
        group = "dislikes" if rng.random() < 0.2 else "likes"
        sign = 1 if group == "likes" else -1
        liked = [answer.count("e") + sign * answer.count("a") for answer in row.responses]
        ranks = tuple(sorted(set(liked), reverse=True).index(x) for x in liked)
        rows.append(replace(row, rater_id=f"{group}-{rng.randrange(6)}", ranks=ranks))
    return rows


class World:
    """Base, SFT policy and reward model of the letters, each in its folder."""

    def __init__(self, root: Path) -> None:
        self.base, self.sft, self.reward = root / "base", root / "sft", root / "reward"
        with closing(Metrics(root / "base-metrics")) as metrics:
            pretrain(PRETRAIN, documents(200, seed=0), self.base, metrics)
        taught, held_out = demonstrations(128, seed=1), demonstrations(16, seed=2)
        with closing(Metrics(root / "sft-metrics")) as metrics:
            train_sft(SFT, self.base, taught, held_out, self.sft, metrics)
        ranked, zero = rankings(128, seed=3), demonstrations(32, seed=4)
        with closing(Metrics(root / "reward-metrics")) as metrics:
            train_reward_model(REWARD, self.sft, ranked, zero, self.reward, metrics)


class TorchSampler:
    """A Sampler on Hugging Face's own forward pass, without a cache: slow, and plainly right."""

    def __init__(self, folder: Path) -> None:
        self._model = load_policy(folder)
        self._eos = load_tokenizer(folder).eos_token_id
        self.loads = 0

    def load(self, state: Mapping[str, Tensor]) -> None:
        self._model.load_state_dict(dict(state))
        self.loads += 1

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, seed: int, samples: int = 1
    ) -> list[list[Sampled]]:
        rng = torch.Generator().manual_seed(seed)
        rows = [list(p) for p in prompts for _ in range(samples)]
        starts = [len(r) for r in rows]
        logprobs: list[list[float]] = [[] for _ in rows]
        going = list(range(len(rows)))
        for _ in range(max_tokens):
            tokens_BT, lengths_B = pad([rows[i] for i in going])
            logits_BTV = self._model(input_ids=tokens_BT, use_cache=False).logits
            last_BV = logits_BTV[torch.arange(len(going)), lengths_B - 1].log_softmax(-1)
            drawn_B = torch.multinomial(last_BV.exp(), 1, generator=rng)[:, 0].tolist()
            for i, token, last_V in zip(going, drawn_B, last_BV, strict=True):
                rows[i].append(token)
                logprobs[i].append(float(last_V[token]))
            going = [i for i in going if rows[i][-1] != self._eos]
            if not going:
                break
        flat = [
            Sampled(tuple(r[s:]), tuple(p), r[-1] == self._eos)
            for r, s, p in zip(rows, starts, logprobs, strict=True)
        ]
        return [flat[i : i + samples] for i in range(0, len(flat), samples)]

"""Requests of two people that are cancelled at a random moment, and what came of them."""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests import tiny_models

TOKENS = 24
# The share of requests that nobody cancels; the others stay no longer than the last of these did.
STAY = 0.25
PROMPTS = {"il-ann": "List three canaries", "il-bob": "Write one canary"}


@dataclass(frozen=True)
class Canary:
    """What a person asks, and the token ids that only this is answered with."""

    prompt: str
    answer: list[int]


def canaries(folder: Path) -> dict[str, Canary]:
    """By key, of the model in `folder`, by Hugging Face. Raises ValueError where they are alike."""
    found = {
        key: Canary(prompt, tiny_models.greedy(folder, prompt, TOKENS))
        for key, prompt in PROMPTS.items()
    }
    if len({canary.answer[0] for canary in found.values()}) < len(found):
        raise ValueError("another model: the canaries' answers begin alike")
    return found


async def cancel_many(
    url: str, canaries: Mapping[str, Canary], requests: int, clients: int, seed: int = 1
) -> Counter[str]:
    """Ask `requests` times, `clients` at a time, streamed and not, and leave at a random moment.

    Counted are requests that were answered `whole`, that were `cut` by their client, that `failed`,
    and of them those whose answer `crossed`: it is not what its own canary is answered.
    """
    left, dice, found = iter(range(requests)), random.Random(seed), Counter[str]()
    whole_s = 1.0

    async def client() -> None:
        nonlocal whole_s
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            for number in left:
                key = sorted(canaries)[number % len(canaries)]
                leaves = None if dice.random() < STAY else dice.uniform(0, whole_s)
                began = time.monotonic()
                ends, crossed = await _ask(http, key, canaries[key], dice.random() < 0.5, leaves)
                whole_s = time.monotonic() - began if leaves is None else whole_s
                found[ends] += 1
                found["crossed"] += crossed

    await asyncio.gather(*(client() for _ in range(clients)))
    return found


async def _ask(
    http: httpx.AsyncClient, key: str, canary: Canary, stream: bool, leaves: float | None
) -> tuple[str, bool]:
    """How the request ended, and whether anything of its answer was of another canary."""
    body: dict[str, Any] = {"model": "tiny", "prompt": canary.prompt, "temperature": 0}
    body |= {"max_tokens": TOKENS, "ignore_eos": True, "return_token_ids": True, "stream": stream}
    headers, got, ends = {"authorization": f"Bearer {key}"}, list[int](), "cut"
    try:
        async with asyncio.timeout(leaves):
            async with http.stream("POST", "/v1/completions", json=body, headers=headers) as said:
                async for line in said.aiter_lines():
                    data = line.removeprefix("data: ")
                    if data.startswith("{"):
                        choice = (json.loads(data).get("choices") or [{}])[0]
                        got += choice.get("token_ids") or []
            ends = "whole" if said.status_code == 200 and len(got) == TOKENS else "failed"
    except TimeoutError:
        pass
    return ends, got != canary.answer[: len(got)]

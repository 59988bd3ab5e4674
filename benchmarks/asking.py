"""Clients that ask for answers whose every token is known, whatever release makes them."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from tests import tiny_models

TOKENS = 24
# A prompt whose head fills a block of the prefix cache, 128 tokens on a CPU, and one that is too
# short to be cached.
CACHED_TOKENS, SHORT_TOKENS = 150, 8


Act = Callable[[httpx.Client], None]


@contextmanager
def over_and_over(connect: Callable[[], httpx.Client], acts: Sequence[Act]) -> Iterator[None]:
    """Each of `acts` by a client of its own, again and again until the block ends. Raises then
    what one of them raised.
    """
    done = threading.Event()

    def go_on(act: Act) -> None:
        with connect() as client:
            while not done.is_set():
                act(client)

    with ThreadPoolExecutor(len(acts)) as pool:
        clients = [pool.submit(go_on, act) for act in acts]
        try:
            yield
        finally:
            done.set()
        for client in clients:
            client.result()


class Asking:
    """Asks, and counts what was wrong with the answers.

    `folders`: release id to its model, whose greedy answers by Hugging Face are the reference.
    """

    def __init__(self, folders: Mapping[str, Path]) -> None:
        words = tiny_models.tokenizer().encode(" ".join([*tiny_models.LINES] * 4))
        self._prompts = {"stale_cache": words[:CACHED_TOKENS], "mixed": words[:SHORT_TOKENS]}
        self._want = {
            (release_id, fault): tiny_models.continued(folder, prompt, TOKENS)
            for release_id, folder in folders.items()
            for fault, prompt in self._prompts.items()
        }
        self.found: Counter[str] = Counter()
        self.releases: set[str] = set()
        # Ids of the answers that the server says it keeps.
        self.recorded: set[str] = set()

    @property
    def faults(self) -> int:
        return self.found.total() - self.found["answers"]

    def acts(self, clients: int) -> list[Act]:
        """For so many clients, every second of them for streams."""
        return [partial(self._ask_each, streams=number % 2 == 0) for number in range(clients)]

    def _ask_each(self, client: httpx.Client, *, streams: bool) -> None:
        for fault in self._prompts:
            self.ask(client, fault, streams=streams)

    def ask(self, client: httpx.Client, fault: str, *, streams: bool) -> None:
        """Ask once; an answer that is not its release's own counts as `fault`."""
        body = {
            "model": "tiny",
            "prompt": self._prompts[fault],
            "temperature": 0,
            "max_tokens": TOKENS,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": streams,
        }
        self.found["answers"] += 1
        try:
            response = client.post("/v1/completions", json=body)
            bodies = bodies_of(response)
            tokens = [t for b in bodies for t in b["choices"][0]["token_ids"]]
            labels = {b.get("system_fingerprint") for b in bodies}
        except (httpx.HTTPError, LookupError, ValueError):
            self.found["failed"] += 1
            return
        label = response.headers.get("x-policy-release")
        if labels != {label} or label is None:
            self.found["unstamped"] += 1
        elif self._want.get((label, fault)) != tokens:
            self.found[fault] += 1
        else:
            self.releases.add(label)
        if response.headers.get("x-instructloop-recorded") == "true":
            self.recorded.add(bodies[0]["id"])


def bodies_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The body, or the chunks of a stream. Raises httpx.HTTPStatusError."""
    response.raise_for_status()
    if not response.headers["content-type"].startswith("text/event-stream"):
        return [response.json()]
    lines = response.text.splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]

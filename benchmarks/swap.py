"""Swaps under load, each answer compared with Hugging Face's by the release that it names; releases
that must not be served; and how long a swap holds answers back.

QUICK=1 measures the same with fewer swaps, one bad release of each kind and a small model.
"""

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.asking import Asking, over_and_over
from benchmarks.cancelled import cancelled
from benchmarks.pushes import pushes
from benchmarks.result import Figure, figure
from benchmarks.servers import DEALT_WITH_BOUND_S, change_to
from contracts.release import ReleaseRegistry
from tests import tiny_models
from tests.conftest import free_port, start_server, wait_until_ready
from tests.fakes import FileSink
from tests.serving.bad_releases import BAD
from training.model import CANARY_TOKENS

QUICK = os.environ.get("QUICK", "") not in ("", "0")
SWAPS = 12 if QUICK else 200
PAUSES = 3 if QUICK else 20
# Of them a quarter is not cancelled, and some are answered before they are.
REQUESTS = 400 if QUICK else 20_000
PUSHES = 1 if QUICK else 5
CLIENTS = 16
WEIGHT_SETS = 4


@dataclass(frozen=True)
class Server:
    """A server of this suite on the first of its releases."""

    url: str
    registry: ReleaseRegistry
    folders: dict[str, Path]

    def client(self) -> httpx.Client:
        headers = {"authorization": "Bearer il-bob"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=DEALT_WITH_BOUND_S)

    def swap_to(self, release_id: str) -> dict[str, Any]:
        self.registry.swap_to(release_id)
        return self.change_to(release_id)

    def change_to(self, release_id: str) -> dict[str, Any]:
        with self.client() as client:
            return change_to(client, release_id)


def measure() -> list[Figure]:
    """Run everything, one server after another."""
    with tempfile.TemporaryDirectory() as aside:
        root = Path(aside)
        with _server(root / "small", _small_folders(root, tied=False)) as server:
            figures = _load(server) + _cancelled(server) + _bad_releases(server, root)
        with _server(root / "large", _large_folders(root), CANARY_TOKENS) as server:
            figures += _pauses(server)
            figures += pushes(server.url, server.registry, server.swap_to, PUSHES)
        for tied in () if QUICK else (False, True):
            name = "tied" if tied else "untied"
            folders = _small_folders(root / f"compiled-{name}", tied=tied)
            with _server(root / name, folders, INSTRUCTLOOP_ENFORCE_EAGER="false") as server:
                figures.append(figure(f"wrong_compiled_{name}", [_wrong(server)], "answers", "0"))
    load = os.getloadavg()[2]
    return [*figures, figure("load_average_15_min", [load], "processes")]


@contextmanager
def _server(
    root: Path, folders: list[Path], canary_tokens: int | None = None, **environment: str
) -> Iterator[Server]:
    registry = ReleaseRegistry(root / "registry")
    releases = [
        tiny_models.release(registry, folder, f"r{i}", canary_tokens)
        for i, folder in enumerate(folders)
    ]
    for release in reversed(releases):
        registry.publish(release)
    port, sink = free_port(), FileSink(root / "events")
    os.environ |= environment
    process = start_server(registry.root, port, sink.path, root / "server.log")
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, process, root / "server.log")
        yield Server(url, registry, {r.id: f for r, f in zip(releases, folders, strict=True)})
    finally:
        for name in environment:
            del os.environ[name]
        process.send_signal(signal.SIGTERM)
        process.wait(120)


def _small_folders(root: Path, *, tied: bool) -> list[Path]:
    return [tiny_models.save(root / f"model{i}", i, tied=tied) for i in range(WEIGHT_SETS)]


def _large_folders(root: Path) -> list[Path]:
    """Two sets of random weights for a Llama of 116 million parameters."""
    if QUICK:
        return _small_folders(root / "large-models", tied=False)[:2]
    config = LlamaConfig(
        vocab_size=20_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
    )
    folders = [root / f"large{seed}" for seed in range(2)]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).float().save_pretrained(folder)
        tiny_models.tokenizer().save_pretrained(folder)
    return folders


def _load(server: Server) -> list[Figure]:
    asking, done = Asking(server.folders), 0
    with over_and_over(server.client, asking.acts(CLIENTS)):
        for number in range(1, SWAPS + 1):
            change = server.swap_to(f"r{number % WEIGHT_SETS}")
            done += change["outcome"] == "swapped_in"
    seen = float(len(asking.releases))
    return [
        figure("swaps", [done], "swaps", ">= 200"),
        figure("answers", [asking.found["answers"]], "answers"),
        figure("releases_seen", [seen], "releases", str(WEIGHT_SETS)),
        *(
            figure(name, [asking.found[name]], "answers", "0")
            for name in ("failed", "mixed", "unstamped", "stale_cache")
        ),
    ]


def _cancelled(server: Server) -> list[Figure]:
    server.swap_to("r0")
    return cancelled(server.url, server.folders["r0"], REQUESTS)


def _bad_releases(server: Server, root: Path) -> list[Figure]:
    """Each is published over a good one; the good one must go on answering as before."""
    good, spoiled = "r0", "r1"
    server.swap_to(good)
    bad_ones = list({bad.kind: bad for bad in BAD}.values()) if QUICK else BAD
    asking, accepted = Asking(server.folders), 0
    release = server.registry.get(spoiled)
    with server.client() as client:
        for number, bad in enumerate(bad_ones):
            aside = root / "bad" / str(number)
            release_id = bad.publish(server.registry, server.folders[spoiled], release, aside)
            change = server.change_to(release_id)
            server.registry.swap_to(good)
            before = asking.faults
            asking.ask(client, "mixed", streams=False)
            asking.ask(client, "stale_cache", streams=True)
            touched = asking.faults > before
            refused = change["outcome"] != "swapped_in" and bad.says in change["reason"]
            accepted += touched or not refused or asking.releases != {good}
    return [
        figure("bad_releases_tried", [len(bad_ones)], "releases", ">= 50"),
        figure("bad_release_kinds", [len({bad.kind for bad in bad_ones})], "kinds", ">= 10"),
        figure("bad_releases_accepted", [accepted], "releases", "0"),
    ]


def _pauses(server: Server) -> list[Figure]:
    """Pause of a swap to another release, and plain copies of its weights right after: into memory
    that was written before, and into new memory.
    """
    weights = load_file(server.folders["r0"] / "model.safetensors")
    copies = {name: tensor.clone() for name, tensor in weights.items()}
    pauses, copied, cloned = [], [], []
    for number in range(PAUSES):
        pauses.append(server.swap_to(f"r{(number + 1) % 2}")["pause_ms"])
        began = time.perf_counter()
        for name, tensor in weights.items():
            copies[name].copy_(tensor)
        copied.append((time.perf_counter() - began) * 1000)
        began = time.perf_counter()
        anew = [tensor.clone() for tensor in weights.values()]
        cloned.append((time.perf_counter() - began) * 1000)
        del anew
    return [
        figure("pause_ms", pauses, "ms"),
        figure("copy_ms", copied, "ms"),
        figure("clone_ms", cloned, "ms"),
        figure("pause_over_copy", _ratios(pauses, copied), "ratio", "<= 0.2"),
        figure("pause_over_clone", _ratios(pauses, cloned), "ratio"),
    ]


def _ratios(ours: list[float], theirs: list[float]) -> list[float]:
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def _wrong(server: Server) -> float:
    """Answers of an engine that compiled its model, after each of some swaps, that differ from
    Hugging Face's.
    """
    asking = Asking(server.folders)
    with server.client() as client:
        for number in (1, 2, 3, 0, 1):
            server.swap_to(f"r{number}")
            for fault in ("mixed", "stale_cache"):
                asking.ask(client, fault, streams=False)
    return float(asking.faults)

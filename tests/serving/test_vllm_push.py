"""Weights that a trainer's process pushes into a real engine."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file, save_file

from contracts.release import Release, ReleaseRegistry
from tests import tiny_models
from tests.conftest import VllmServer
from tests.serving.test_vllm import PROMPT, ask_streamed, ask_whole

pytestmark = pytest.mark.vllm


class Trainer:
    """A process, and a registry that the server knows nothing of."""

    def __init__(self, server: VllmServer, root: Path) -> None:
        self.server, self.root = server, root
        self.registry = ReleaseRegistry(root / "registry")

    def release(self, release_id: str, seed: int) -> Release:
        folder = tiny_models.save(self.root / release_id, seed, tied=self.server.tied)
        release = tiny_models.release(self.registry, folder, release_id)
        self.registry.add(release)
        return release

    def wanted(self, release_id: str) -> tuple[str, list[int]]:
        """What a client is answered by it."""
        return release_id, tiny_models.greedy(self.root / release_id, PROMPT, 24)

    def push(self, release_id: str) -> "subprocess.CompletedProcess[str]":
        words = ["release", "push", release_id, "--to", self.server.url]
        return subprocess.run(
            [sys.executable, "-m", "instructloop.cli", *words],
            env={
                **os.environ,
                "INSTRUCTLOOP_REGISTRY": str(self.registry.root),
                "INSTRUCTLOOP_ADMIN_KEY": "il-root",
            },
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )


@pytest.fixture
def trainer(vllm_server: VllmServer, tmp_path: Path) -> Trainer:
    return Trainer(vllm_server, tmp_path)


def root_of(server: VllmServer) -> httpx.Client:
    headers = {"authorization": "Bearer il-root"}
    return httpx.Client(base_url=server.url, headers=headers, timeout=60)


def test_pushed_weights_answer_as_hugging_face_does_under_load(
    vllm_server: VllmServer, trainer: Trainer
) -> None:
    """No answer fails, mixes two releases or names another than its own, and the way back is
    exact.
    """
    want = {
        r.id: tiny_models.greedy(vllm_server.folders[r.id], PROMPT, 24)
        for r in vllm_server.releases
    }
    for number in (1, 2):
        trainer.release(f"pushed-{number}", 10 + number)
        want |= [trainer.wanted(f"pushed-{number}")]
    before = httpx.get(f"{vllm_server.url}/readyz").json()["release"]
    assert len({tuple(want[i]) for i in (before, "pushed-1", "pushed-2")}) == 3
    done, failures, seen = threading.Event(), list[tuple[str, list[int]]](), set[str]()

    def ask_on(streams: bool) -> None:
        with vllm_server.client("bob") as client:
            while not done.is_set():
                label, tokens = ask_streamed(client) if streams else ask_whole(client)
                seen.add(label)
                if want[label] != tokens:
                    failures.append((label, tokens))

    with ThreadPoolExecutor(4) as pool, root_of(vllm_server) as root:
        running = [pool.submit(ask_on, i % 2 == 0) for i in range(4)]
        try:
            for number in (1, 2):
                pushed = trainer.push(f"pushed-{number}")
                assert pushed.returncode == 0, pushed.stderr
                assert root.get("/readyz").json()["release"] == f"pushed-{number}"
            back = root.post("/v1/admin/swap", json={"release": "pushed-1"}).json()
            assert back["last_change"]["source"] == "memory"
        finally:
            done.set()
        for worker in running:
            worker.result()
    assert failures == [] and {"pushed-1", "pushed-2"} <= seen
    with vllm_server.client("bob") as client:
        assert ask_whole(client) == ("pushed-1", want["pushed-1"])
    vllm_server.registry.swap_to("r0")
    vllm_server.wait_for("r0")


def test_bad_pushes_are_refused_while_serving_goes_on(
    vllm_server: VllmServer, trainer: Trainer
) -> None:
    vllm_server.registry.swap_to("r0")
    vllm_server.wait_for("r0")
    want = "r0", tiny_models.greedy(vllm_server.folders["r0"], PROMPT, 24)
    for release_id in ("killed", "poisoned", "flipped"):
        trainer.release(release_id, 20)
    poison = trainer.root / "poisoned"
    tiny_models.poison(poison)
    poisoned = trainer.registry.artifacts.put("policy", poison)
    good = trainer.registry.get("poisoned")
    trainer.registry.add(good.model_copy(update={"id": "poisoned-2", "artifact": poisoned}))
    flip(trainer, "flipped")
    with root_of(vllm_server) as root, vllm_server.client("bob") as client:

        def refused(release_id: str, says: str) -> None:
            # Answered when no push goes on any more.
            assert root.post("/v1/admin/swap", json={"release": "r0"}).status_code == 200
            last = client.get("/v1/releases").json()["data"][-1]
            assert (last["release"], last["outcome"]) == (release_id, "refused")
            assert says in last["reason"]
            assert ask_whole(client) == want

        half(trainer, "killed")
        refused("killed", "the trainer left with")
        for release_id, says in (("poisoned-2", "finite numbers"), ("flipped", "expected sha256")):
            pushed = trainer.push(release_id)
            assert pushed.returncode == 1 and says in pushed.stderr
            refused(release_id, says)
    release = trainer.release("off", 21)
    canary = release.canary.model_copy(update={"logprobs": (-1.0,) * len(release.canary.logprobs)})
    trainer.registry.add(release.model_copy(update={"id": "off-2", "canary": canary}))
    pushed = trainer.push("off-2")
    assert pushed.returncode == 1 and "canary: expected the trainer's" in pushed.stderr
    with vllm_server.client("bob") as client:
        assert ask_whole(client) == want
        assert trainer.push("off").returncode == 0
        assert ask_whole(client) == trainer.wanted("off")
    vllm_server.registry.swap_to("r0")
    vllm_server.wait_for("r0")


def flip(trainer: Trainer, release_id: str) -> None:
    """Other numbers than the manifest's, in a file of the same form."""
    artifact = trainer.registry.get(release_id).artifact
    file = trainer.registry.artifacts.path(artifact) / "model.safetensors"
    size, tensors = file.stat().st_size, load_file(file)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert file.stat().st_size == size


def half(trainer: Trainer, release_id: str) -> None:
    """Push the first half, then die."""
    words = [str(trainer.registry.root), release_id, trainer.server.url, "il-root"]
    with subprocess.Popen(
        [sys.executable, "-m", "tests.serving.half_trainer", *words],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "half\n"
        process.kill()

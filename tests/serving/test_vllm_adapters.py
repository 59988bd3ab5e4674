"""Adapter releases on a real engine, as clients see them."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient

from contracts.release import Release, ReleaseRegistry
from contracts.shares import Shares
from contracts.v1 import events_pb2 as pb
from feedback.app import create_app
from feedback.consent import ConsentLedger
from feedback.dataset.build import build_dataset
from feedback.dataset.settings import RuleSettings
from feedback.log import open_log
from tests import tiny_adapters, tiny_models
from tests.conftest import VllmServer, running_server
from tests.fakes import authenticate
from tests.feedback.samples import consent
from tests.serving.bad_adapters import BAD_ADAPTERS
from tests.serving.test_vllm import BLOCK_TOKENS, ask_streamed, ask_whole, chunks

pytestmark = pytest.mark.vllm

PROMPTS = ("Write one sentence", "List three colours, separated by commas.", "Answer", "soup was")
TOKENS = 24


@dataclass(frozen=True)
class Adapted(VllmServer):
    """Whole releases r1 and w1, adapters r2 and r3 of the first and w2 of the second. `folders`
    hold their weights, those of adapters merged.
    """

    def serve(self, release_id: str) -> dict[str, Any]:
        """Have it served; what became of it."""
        self.registry.swap_to(release_id)
        self.wait_for(release_id)
        with self.client("bob") as client:
            change: dict[str, Any] = client.get("/v1/releases").json()["data"][-1]
        return change

    def want(self, release_id: str, prompt: str) -> list[int]:
        return tiny_models.greedy(self.folders[release_id], prompt, TOKENS)


def asked(release_id: str, prompt: str) -> dict[str, Any]:
    return {
        "model": f"tiny@{release_id}",
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "return_token_ids": True,
    }


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Adapted]:
    """On r3, with r1 and r2 loaded beside it."""
    root = tmp_path_factory.mktemp("adapters")
    registry, folders = ReleaseRegistry(root / "registry"), dict[str, Path]()
    releases: dict[str, Release] = {}
    for name, seed in (("w1", 1), ("r1", 0)):
        folders[name] = tiny_models.save(root / name, seed, tied=request.param)
        releases[name] = tiny_models.release(registry, folders[name], name)
    for name, over, seed in (("r2", "r1", 2), ("r3", "r1", 3), ("w2", "w1", 4)):
        adapter = tiny_adapters.save(root / f"adapter-{name}", seed, folders[over])
        folders[name] = tiny_adapters.merged(root / name, folders[over], adapter)
        releases[name] = tiny_adapters.release(
            registry, adapter, folders[name], releases[over], name
        )
    for name in ("w1", "w2", "r1"):
        registry.publish(releases[name])
    # So that every slot is taken: only then is a request without an adapter answered wrongly.
    with running_server(root, registry, max_adapters=1) as (url, sink, process):
        listed, log = list(releases.values()), root / "server.log"
        here = Adapted(url, registry, sink, log, process, request.param, listed, folders)
        for name in ("r2", "r3"):
            registry.publish(releases[name])
            here.wait_for(name)
        yield here


def test_adapters_and_base_in_one_batch_answer_as_their_merged_weights(server: Adapted) -> None:
    wanted = {
        (name, prompt): server.want(name, prompt)
        for name in ("r1", "r2", "r3")
        for prompt in PROMPTS
    }
    assert len({tuple(tokens) for tokens in wanted.values()}) == len(wanted)

    def ask(name: str, prompt: str) -> bool:
        with server.client("bob") as client:
            said = client.post("/v1/completions", json=asked(name, prompt))
        body = said.json()
        assert said.headers["x-policy-release"] == body["system_fingerprint"] == name
        assert body["model"] == "tiny"
        return bool(body["choices"][0]["token_ids"] == wanted[name, prompt])

    with ThreadPoolExecutor(len(wanted)) as pool:
        for _ in range(3):
            right = list(pool.map(lambda each: ask(*each), wanted))
            assert right == [True] * len(wanted)


def test_cached_prefix_of_one_release_serves_no_other(server: Adapted) -> None:
    words = tiny_models.tokenizer().encode(" ".join([*tiny_models.LINES] * 3))
    prompt = words[: BLOCK_TOKENS + 20]
    with server.client("bob") as client:
        for name in ("r2", "r1", "r3", "r2"):
            want = tiny_models.continued(server.folders[name], prompt, 8)
            for _ in range(2):  # the second one reads what the first one left
                ask = {**asked(name, ""), "prompt": prompt, "max_tokens": 8}
                said = client.post("/v1/completions", json=ask).json()
                assert said["choices"][0]["token_ids"] == want, name


def test_switch_under_load_pauses_fails_mixes_and_mislabels_nothing(server: Adapted) -> None:
    want = {name: server.want(name, PROMPTS[0]) for name in ("r1", "r2", "r3")}
    done = threading.Event()
    failures: list[tuple[str, list[int]]] = []
    seen: list[str] = []

    def ask_on(streams: bool) -> None:
        with server.client("bob") as client:
            while not done.is_set():
                label, tokens = ask_streamed(client) if streams else ask_whole(client)
                seen.append(label)
                if want.get(label) != tokens:
                    failures.append((label, tokens))

    changes: list[dict[str, Any]] = []
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(ask_on, i % 2 == 0) for i in range(8)]
        try:
            for name in ("r2", "r1", "r3", "r2", "r3"):
                before = len(seen)
                changes += [server.serve(name)]
                while name not in seen[before:] and not any(each.done() for each in running):
                    time.sleep(0.01)
        finally:
            done.set()
        for worker in running:
            worker.result()
    assert failures == [] and {*seen} == {"r1", "r2", "r3"}
    assert [c["outcome"] for c in changes] == ["swapped_in"] * 5
    assert all(c["drain_ms"] == c["pause_ms"] == c["cut_short"] == 0 for c in changes)
    print(f"{len(seen)} answers over 5 switches:", changes)


def test_people_with_a_share_are_answered_by_its_release(server: Adapted) -> None:
    want = {name: server.want(name, PROMPTS[0]) for name in ("r2", "r3")}
    server.serve("r3")
    server.registry.share("r2", 0.5)
    people = [f"person-{i}" for i in range(8)]
    try:
        with httpx.Client(base_url=server.url, headers={"authorization": "Bearer il-root"}) as root:
            root.post("/v1/admin/share", json={"release": "r2", "share": 0.5}).raise_for_status()
        for person in people:
            by = Shares(parts={"r2": 0.5}).release_of(person) or "r3"
            with server.client(person) as client:
                assert ask_whole(client) == (by, want[by])
    finally:
        server.registry.share("r2", 0)


def test_candidates_of_several_releases_are_ranked_as_one(server: Adapted, tmp_path: Path) -> None:
    candidates = [{"release": name} for name in ("r3", "r1", "r2")]
    ask = {**asked("", PROMPTS[1]), "model": "tiny", "candidates": candidates}
    with server.client("ann") as ann:
        several = {**ask, "temperature": 1, "candidates": [{"release": "r2", "n": 3}]}
        drawn = ann.post("/v1/feedback/candidates", json=several).json()["choices"]
        assert [choice["release"] for choice in drawn] == ["r2"] * 3
        said = ann.post("/v1/feedback/candidates", json=ask)
    order = ["r3", "r1", "r2"]
    assert said.headers["x-policy-release"] == "r3,r1,r2"
    body = said.json()
    assert [choice["release"] for choice in body["choices"]] == order
    for choice in body["choices"]:
        assert choice["token_ids"] == server.want(choice["release"], PROMPTS[1])
    event = [e for e in server.sink.events() if e.HasField("completion")][-1]
    assert event.completion.completion_id == body["id"]
    assert [output.release_id for output in event.completion.outputs] == order

    log = open_log(f"sqlite:///{tmp_path}/log.db")
    log.append([consent("ann"), event])
    feedback = create_app(
        sink=log, source=log, authenticate=authenticate, consent=ConsentLedger(log)
    )
    ranking = {
        "completion_id": body["id"],
        "groups": [[2], [0, 1]],
        "instruction_version": "1",
    }
    headers = {"authorization": "Bearer il-ann"}
    taken = TestClient(feedback).post("/v1/feedback/rankings", headers=headers, json=ranking)
    assert taken.status_code == 200, taken.text
    digest = build_dataset(log, server.registry.artifacts, RuleSettings(), "test")
    (row,) = pq.read_table(server.registry.artifacts.path(digest) / "rm.parquet").to_pylist()
    assert row["releases"] == order and row["ranks"] == [1, 1, 0]
    log.close()


def test_bad_adapter_of_each_kind_is_refused_while_serving_goes_on(
    server: Adapted, tmp_path: Path
) -> None:
    server.serve("r2")
    good = server.registry.get("r2")
    want = "r2", server.want("r2", PROMPTS[0])
    stored = server.registry.artifacts.path(good.artifact)
    bad_ones = {bad.kind: bad for bad in BAD_ADAPTERS if bad.kind != "link"}
    outcomes = {}
    with server.client("bob") as client:
        for number, (kind, bad) in enumerate(bad_ones.items()):
            folder = tiny_adapters.save(tmp_path / f"{number}", 3, server.folders["r1"])
            bad.spoil(folder)
            digest = server.registry.artifacts.put("adapter", folder)
            outcomes[kind] = publish(server, f"bad{number}", artifact=digest)
            assert bad.says in outcomes[kind], kind
            assert ask_whole(client) == want
        values = [value + 0.5 for value in good.canary.logprobs]
        wrong = good.canary.model_copy(update={"logprobs": tuple(values)})
        assert "canary: expected" in publish(server, "bad-canary", canary=wrong)
        other = server.registry.get("w1").artifact
        assert "of r1, which is served" in publish(server, "bad-base", base=other)
        assert ask_whole(client) == want
        assert client.get("/v1/releases").json()["serving"] == "r2"
    assert len(outcomes) >= 6
    assert stored.is_dir()
    refused = {
        e.release_change.release_id
        for e in server.sink.events()
        if e.release_change.transition == pb.RELEASE_TRANSITION_REFUSED
    }
    assert {f"bad{number}" for number in range(len(outcomes))} <= refused


def publish(server: Adapted, release_id: str, **changed: Any) -> str:
    """Publish a changed copy of r3, and why it was refused; r2 is wanted again."""
    release = server.registry.get("r3").model_copy(update={"id": release_id, **changed})
    server.registry.publish(release)
    server.wait_for(release_id)
    with server.client("bob") as client:
        change = client.get("/v1/releases").json()["data"][-1]
    assert change["outcome"] == "refused", change
    server.registry.swap_to("r2")
    return str(change["reason"])


def test_whole_release_after_adapters_is_swapped_in_and_has_its_own(server: Adapted) -> None:
    """And the way back, by the weights that stayed in memory."""
    for name in ("w1", "w2", "r1", "r3", "w1", "r1", "r2"):
        change = server.serve(name)
        assert change["outcome"] == "swapped_in", change
        with server.client("bob") as client:
            assert ask_whole(client) == (name, server.want(name, PROMPTS[0]))
            streamed = client.post(
                "/v1/completions", json={**asked(name, PROMPTS[2]), "stream": True}
            )
            told = [t for part in chunks(streamed) for t in part["choices"][0]["token_ids"]]
            assert told == server.want(name, PROMPTS[2])
            loaded = client.get("/v1/releases").json()["loaded"]
        assert {each[0] for each in loaded} == {name[0]}

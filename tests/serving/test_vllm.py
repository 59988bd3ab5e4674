"""The server on a real engine, as its clients see it."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from contracts.v1 import events_pb2 as pb
from tests import tiny_models
from tests.conftest import VllmServer
from tests.serving.bad_releases import BAD
from tests.serving.cancelled import canaries, cancel_many
from tests.serving.parity import row

pytestmark = pytest.mark.vllm

PROMPT = "Write one sentence"
# Of the engine's prefix cache on a CPU: shorter prompts are never cached.
BLOCK_TOKENS = 128
GREEDY = {
    "model": "tiny",
    "prompt": PROMPT,
    "temperature": 0,
    "max_tokens": 24,
    "ignore_eos": True,
    "return_token_ids": True,
}


def openai(server: VllmServer, user: str) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=f"il-{user}", max_retries=0)


def chunks(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def test_official_client_gets_completions_chat_streams_and_models(vllm_server: VllmServer) -> None:
    client = openai(vllm_server, "bob")
    serving = httpx.get(f"{vllm_server.url}/readyz").json()["release"]
    completion = client.completions.create(model="tiny", prompt=PROMPT, n=3, max_tokens=5)
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    assert completion.system_fingerprint == serving
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=5
    )
    assert chat.choices[0].message.role == "assistant"
    assert chat.system_fingerprint == serving
    stream = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=5, stream=True
    )
    assert {chunk.system_fingerprint for chunk in stream} == {serving}
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_engine_control_endpoints_do_not_exist(vllm_server: VllmServer) -> None:
    """Asked with a key that opens everything, through every port that the server's processes
    listen on and that speaks HTTP: torch's rendezvous, say, does not.
    """
    listened = list(listening(vllm_server.pid))
    with ThreadPoolExecutor(len(listened)) as askers:
        speaks = askers.map(speaks_http, listened)
        ports = {port for port, http in zip(listened, speaks, strict=True) if http}
    assert int(vllm_server.url.rpartition(":")[2]) in ports
    for port in ports:
        headers = {"authorization": "Bearer il-root"}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers) as client:
            for path in ENGINE_PATHS:
                for method in ("GET", "POST"):
                    answer = client.request(method, f"/{path}")
                    assert answer.status_code == 404, (port, method, path)
    assert httpx.get(f"{vllm_server.url}/metrics").status_code == 401
    with vllm_server.client("bob") as bob:
        assert bob.get("/metrics").status_code == 403
        metrics = httpx.get(
            f"{vllm_server.url}/metrics", headers={"authorization": "Bearer il-root"}
        )
        assert "vllm:num_requests_running" in metrics.text
        assert "instructloop_swaps_total" in metrics.text


ENGINE_PATHS = (
    *("pause", "resume", "is_paused", "sleep", "wake_up", "is_sleeping", "collective_rpc"),
    *("update_weights", "init_weight_transfer_engine", "start_weight_update"),
    *("finish_weight_update", "weight_checker", "reset_prefix_cache", "reset_mm_cache"),
    *("reset_encoder_cache", "invocations", "tokenize", "detokenize", "tokenizer_info", "load"),
    *("server_info", "version", "ping", "health", "start_profile", "stop_profile", "docs"),
    *("inference/v1/generate", "v1/load_lora_adapter", "v1/unload_lora_adapter", "v1/embeddings"),
    *(
        "v1/responses",
        "pooling",
        "classify",
        "score",
        "rerank",
        "abort_requests",
        "scale_elastic_ep",
    ),
)


def speaks_http(port: int) -> bool:
    """Whether anything comes back that is HTTP, whatever it says."""
    try:
        httpx.get(f"http://127.0.0.1:{port}/", timeout=5)
    except httpx.TransportError:
        return False
    return True


def listening(pid: int) -> set[int]:
    """TCP ports that the process and its children listen on, as Linux tells them."""
    pids = [pid, *children(pid)]
    inodes = set()
    for each in pids:
        for link in Path(f"/proc/{each}/fd").iterdir():
            target = str(link.readlink()) if link.is_symlink() else ""
            inodes.add(target.removeprefix("socket:[").removesuffix("]"))
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            cells = line.split()
            if cells[3] == "0A" and cells[9] in inodes:
                ports.add(int(cells[1].rpartition(":")[2], 16))
    return ports


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *children(int(child))]
    return found


def test_stream_says_the_same_as_one_body(vllm_server: VllmServer) -> None:
    with vllm_server.client("bob") as client:
        whole = client.post("/v1/completions", json=GREEDY).json()["choices"][0]["text"]
        with client.stream("POST", "/v1/completions", json={**GREEDY, "stream": True}) as response:
            parts = [chunk["choices"][0]["text"] for chunk in chunks(response)]
    assert "".join(parts) == whole


def test_log_holds_exactly_the_requests_of_who_agreed(vllm_server: VllmServer) -> None:
    before = len(vllm_server.sink.events())
    ask = {"model": "tiny", "prompt": "List three colours", "max_tokens": 6, "n": 2}
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "List"}], "max_tokens": 6}
    playground = {"x-instructloop-source": "playground"}
    answers = []
    with vllm_server.client("ann") as ann:
        answers.append(ann.post("/v1/completions", json=ask))
        shown = playground | {"x-instructloop-notice": "v1"}
        answers.append(ann.post("/v1/chat/completions", json=chat, headers=shown))
        with ann.stream("POST", "/v1/completions", json={**ask, "stream": True}) as stream:
            streamed = list(chunks(stream))
            assert stream.headers["x-instructloop-recorded"] == "true"
        other = playground | {"x-instructloop-notice": "v0"}
        not_recorded = [ann.post("/v1/completions", json=ask, headers=other)]
        echo = ann.post("/v1/completions", json={**ask, "echo": True})
        assert echo.json()["choices"][0]["text"].startswith("List three colours")
        not_recorded.append(echo)
    for user in ("bob", "prod-ann"):
        with vllm_server.client(user) as client:
            not_recorded.append(client.post("/v1/completions", json=ask))
    assert [r.headers["x-instructloop-recorded"] for r in answers] == ["true", "true"]
    assert [r.headers["x-instructloop-recorded"] for r in not_recorded] == ["false"] * 4

    events = [e for e in vllm_server.sink.events()[before:] if e.HasField("completion")]
    logged = {e.completion.completion_id: e.completion for e in events}
    assert {e.user_id for e in events} == {"ann"}
    assert logged.keys() == {r.json()["id"] for r in answers} | {streamed[0]["id"]}
    first = logged[answers[0].json()["id"]]
    words = tiny_models.tokenizer()
    assert [o.text for o in first.outputs] == [c["text"] for c in answers[0].json()["choices"]]
    for output in first.outputs:
        # vLLM leaves out a character whose last bytes never came, Hugging Face marks it.
        text = str(words.decode(list(output.token_ids), skip_special_tokens=True))
        assert text.rstrip("\ufffd") == output.text.rstrip("\ufffd")
    assert first.release_id == answers[0].headers["x-policy-release"]
    assert logged[answers[1].json()["id"]].source == pb.SOURCE_PLAYGROUND
    for index in (0, 1):
        choices = [c for s in streamed for c in s["choices"] if c["index"] == index]
        parts = "".join(c["text"] for c in choices)
        assert logged[streamed[0]["id"]].outputs[index].text == parts


def test_client_that_leaves_is_not_recorded(vllm_server: VllmServer) -> None:
    with vllm_server.client("ann") as client:
        ask = {**GREEDY, "max_tokens": 200, "stream": True}
        with client.stream("POST", "/v1/completions", json=ask) as response:
            left = next(chunks(response))["id"]
        # Answers after the first one has been taken off the engine.
        client.post("/v1/completions", json={**GREEDY, "max_tokens": 2})
    logged = {e.completion.completion_id for e in vllm_server.sink.events()}
    assert left not in logged


def test_client_that_leaves_frees_the_engine(vllm_server: VllmServer) -> None:
    """Long answers of clients that left are not worked on any more, streamed or not."""
    ask = {**GREEDY, "temperature": 1, "max_tokens": 200, "n": 8}
    before = measured(vllm_server, "vllm:generation_tokens_total")
    with vllm_server.client("bob") as client:
        with client.stream("POST", "/v1/completions", json={**ask, "stream": True}) as response:
            next(chunks(response))
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json=ask, timeout=0.05)
    deadline = time.monotonic() + 20
    while measured(vllm_server, "vllm:num_requests_running"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    made = measured(vllm_server, "vllm:generation_tokens_total") - before
    assert 0 < made < 8 * 200


def measured(server: VllmServer, name: str) -> float:
    """A metric of the engine."""
    headers = {"authorization": "Bearer il-root"}
    text = httpx.get(f"{server.url}/metrics", headers=headers).text
    return sum(float(li.split()[-1]) for li in text.splitlines() if li.startswith(name + "{"))


@row(
    "a swap of weights",
    openai="-",
    vllm="an answer is labelled by nothing, and may be of two weights",
    here="an answer, streamed or not, is of one release and says which in every chunk",
)
def test_swap_under_load_fails_mixes_and_mislabels_nothing(vllm_server: VllmServer) -> None:
    want = {
        r.id: tiny_models.greedy(vllm_server.folders[r.id], PROMPT, 24)
        for r in vllm_server.releases
    }
    assert len(set(map(tuple, want.values()))) == 3
    done = threading.Event()
    failures: list[tuple[str, list[int]]] = []
    seen: list[str] = []

    def ask_on(streams: bool) -> None:
        with vllm_server.client("bob") as client:
            while not done.is_set():
                label, tokens = ask_streamed(client) if streams else ask_whole(client)
                seen.append(label)
                if want.get(label) != tokens:
                    failures.append((label, tokens))

    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(ask_on, i % 2 == 0) for i in range(8)]
        try:
            for i in (1, 2, 0, 1):
                vllm_server.registry.publish(vllm_server.releases[i])
                vllm_server.wait_for(f"r{i}")
        finally:
            done.set()
        for worker in running:
            worker.result()
    assert failures == []
    assert set(seen) == {"r0", "r1", "r2"}
    changes = httpx.get(
        f"{vllm_server.url}/v1/releases", headers={"authorization": "Bearer il-bob"}
    ).json()["data"]
    assert [c["outcome"] for c in changes[-4:]] == ["swapped_in"] * 4
    print(f"{len(seen)} answers over 4 swaps:", changes[-4:])


def ask_whole(client: httpx.Client) -> tuple[str, list[int]]:
    response = client.post("/v1/completions", json=GREEDY)
    assert response.status_code == 200, response.text
    body = response.json()
    assert body["system_fingerprint"] == response.headers["x-policy-release"]
    return body["system_fingerprint"], body["choices"][0]["token_ids"]


def ask_streamed(client: httpx.Client) -> tuple[str, list[int]]:
    with client.stream("POST", "/v1/completions", json={**GREEDY, "stream": True}) as response:
        assert response.status_code == 200
        parts = list(chunks(response))
        labels = {part["system_fingerprint"] for part in parts}
        assert labels == {response.headers["x-policy-release"]}
    return str(labels.pop()), [token for p in parts for token in p["choices"][0]["token_ids"]]


def test_prefix_that_was_cached_is_forgotten_with_its_weights(vllm_server: VllmServer) -> None:
    words = tiny_models.tokenizer().encode(" ".join([*tiny_models.LINES] * 3))
    prompt = words[: BLOCK_TOKENS + 20]
    assert len(prompt) > BLOCK_TOKENS
    ask = {**GREEDY, "prompt": prompt, "max_tokens": 8}
    with vllm_server.client("bob") as client:
        for release_id in ("r0", "r2", "r0"):
            vllm_server.registry.swap_to(release_id)
            vllm_server.wait_for(release_id)
            want = tiny_models.continued(vllm_server.folders[release_id], prompt, 8)
            for _ in range(2):  # the second one reads what the first one left
                said = client.post("/v1/completions", json=ask).json()
                assert said["system_fingerprint"] == release_id
                assert said["choices"][0]["token_ids"] == want


def test_going_back_reads_nothing_from_disk(vllm_server: VllmServer) -> None:
    for release_id in ("r1", "r2"):
        vllm_server.registry.swap_to(release_id)
        vllm_server.wait_for(release_id)
    stored = vllm_server.registry.artifacts.path(vllm_server.releases[1].artifact)
    away = stored.rename(stored.with_name("away"))
    try:
        vllm_server.registry.swap_to("r1")
        vllm_server.wait_for("r1")
    finally:
        away.rename(stored)
    with vllm_server.client("bob") as client:
        assert ask_whole(client) == (
            "r1",
            tiny_models.greedy(vllm_server.folders["r1"], PROMPT, 24),
        )


def test_bad_release_of_each_kind_is_refused_while_serving_goes_on(
    vllm_server: VllmServer, tmp_path: Path
) -> None:
    good = vllm_server.releases[1]
    vllm_server.registry.swap_to(good.id)
    vllm_server.wait_for(good.id)
    want = good.id, tiny_models.greedy(vllm_server.folders[good.id], PROMPT, 24)
    one_of_each_kind = {bad.kind: bad for bad in reversed(BAD)}
    with vllm_server.client("bob") as client:
        assert ask_whole(client) == want
        for kind, bad in one_of_each_kind.items():
            release_id = bad.publish(
                vllm_server.registry,
                vllm_server.folders["r2"],
                vllm_server.releases[2],
                tmp_path / kind,
            )
            vllm_server.wait_for(release_id)
            vllm_server.registry.swap_to(good.id)
            change = client.get("/v1/releases").json()["data"][-1]
            assert change["outcome"] == ("rolled_back" if kind == "canary" else "refused")
            assert bad.says in change["reason"]
            assert ask_whole(client) == want
    transitions = {
        e.release_change.transition
        for e in vllm_server.sink.events()
        if e.HasField("release_change") and e.release_change.release_id.startswith("bad-")
    }
    assert transitions == {pb.RELEASE_TRANSITION_REFUSED, pb.RELEASE_TRANSITION_ROLLED_BACK}
    vllm_server.registry.publish(good)


def test_cancelled_requests_leave_no_slot_taken_and_cross_no_answer(
    vllm_server: VllmServer,
) -> None:
    serving = httpx.get(f"{vllm_server.url}/readyz").json()["release"]
    known, before = canaries(vllm_server.folders[serving]), len(vllm_server.sink.events())
    found = asyncio.run(cancel_many(vllm_server.url, known, 120, 12))
    assert found["whole"] and found["cut"] and not found["failed"], found
    assert not found["crossed"], found
    kept = [event for event in vllm_server.sink.events()[before:] if event.HasField("completion")]
    assert {event.user_id for event in kept} == {"ann"}  # bob agreed to nothing
    for event in kept:
        assert event.completion.prompt.text == known["il-ann"].prompt
        (output,) = event.completion.outputs
        assert list(output.token_ids) == known["il-ann"].answer
    deadline = time.monotonic() + 20
    while any(measured(vllm_server, f"vllm:num_requests_{n}") for n in ("running", "waiting")):
        assert time.monotonic() < deadline
        time.sleep(0.05)

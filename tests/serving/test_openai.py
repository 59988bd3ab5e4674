import asyncio
import datetime as dt
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types.chat import ChatCompletion
from pydantic import ValidationError

from contracts.artifact import ArtifactStore
from contracts.errors import InvalidInput
from contracts.events import Stamper
from contracts.release import Canary, Release, ReleaseRegistry
from contracts.v1 import events_pb2 as pb
from serving.app import create_app
from serving.engine import EngineRefused, Kind
from serving.openai import filled
from serving.request import REQUEST, checked
from serving.settings import Settings
from tests.fakes import FakeEngine, FixedConsent, MemorySink, authenticate
from tests.serving.house import model_folder

ASK = {"model": "tiny", "prompt": "a question", "max_tokens": 3, "n": 2}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@dataclass
class House:
    """The app on a fake engine that runs release r1, and a client of it."""

    client: httpx.AsyncClient
    app: Any
    engine: FakeEngine
    sink: MemorySink
    registry: ReleaseRegistry
    consent: FixedConsent
    failures: list[str]

    @property
    def word(self) -> str:
        """What every word of the fake engine begins with."""
        assert self.engine.running is not None
        return self.engine.running.name[:6]

    async def post(self, path: str, body: Any, user: str = "ann", **headers: str) -> httpx.Response:
        return await self.client.post(
            f"/v1/{path}", json=body, headers={"authorization": f"Bearer il-{user}", **headers}
        )


@asynccontextmanager
async def house(
    root: Path, *, released: bool = True, content_filter: str = ""
) -> AsyncIterator[House]:
    registry = ReleaseRegistry(root / "registry")
    if released:
        publish(registry, root)
    engine, sink, failures = FakeEngine(), MemorySink(), []
    consent = FixedConsent({"ann": "v1"})
    app = create_app(
        Settings(
            release_poll_s=0.01,
            max_body_bytes=20_000,
            stall_bound_s=0.3,
            content_filter=content_filter,
        ),
        engine,
        sink,
        registry,
        authenticate,
        consent,
        Stamper("serving", clock=lambda: 1.0),
        on_engine_failure=lambda: failures.append("engine"),
    )
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        while released and (await client.get("/readyz")).status_code != 200:
            await asyncio.sleep(0.01)
        yield House(client, app, engine, sink, registry, consent, failures)


def publish(registry: ReleaseRegistry, root: Path) -> None:
    folder = model_folder(root / "model")
    release = Release(
        id="r1",
        model="tiny",
        created=dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
        artifact=ArtifactStore(registry.root / "artifacts").put("policy", folder),
        canary=Canary(token_ids=(1, 2), logprobs=(0.0,)),
        code_version="test",
    )
    registry.publish(release)


def run(
    root: Path,
    scene: Callable[[House], Awaitable[None]],
    *,
    released: bool = True,
    content_filter: str = "",
) -> None:
    async def play() -> None:
        async with house(root, released=released, content_filter=content_filter) as here:
            await scene(here)

    asyncio.run(play())


def events(response: httpx.Response) -> list[Any]:
    data = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert data[-1] == "[DONE]"
    return [json.loads(line) for line in data[:-1]]


def test_body_has_openai_fields_and_the_release(tmp_path: Path) -> None:
    async def scene(here: House) -> None:
        response = await here.post("completions", ASK)
        assert response.status_code == 200
        assert response.headers["x-policy-release"] == "r1"
        body = response.json()
        assert body["system_fingerprint"] == "r1"
        envelope = {"id", "object", "created", "model", "choices", "usage", "system_fingerprint"}
        assert body.keys() == envelope
        assert [choice["index"] for choice in body["choices"]] == [0, 1]
        assert body["choices"][0].keys() == {"index", "text", "logprobs", "finish_reason"}
        chat = (await here.post("chat/completions", CHAT)).json()
        assert chat["choices"][0]["message"].keys() == {"role", "content"}

    run(tmp_path, scene)


def test_token_ids_go_to_the_client_who_asks_for_them(tmp_path: Path) -> None:
    async def scene(here: House) -> None:
        response = await here.post("completions", ASK | {"return_token_ids": True})
        assert response.json()["choices"][0]["token_ids"] == [7, 7, 7]

    run(tmp_path, scene)


def test_every_chunk_has_the_release_and_usage_where_it_is_asked_for(tmp_path: Path) -> None:
    async def scene(here: House) -> None:
        response = await here.post("completions", ASK | {"stream": True})
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-policy-release"] == "r1"
        chunks = events(response)
        assert {chunk["system_fingerprint"] for chunk in chunks} == {"r1"}
        assert all("usage" not in c and "token_ids" not in c["choices"][0] for c in chunks)
        with_usage = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = events(await here.post("chat/completions", CHAT | with_usage))
        usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
        assert [chunk["usage"] for chunk in chunks] == [None, None, usage]
        assert chunks[-1]["choices"] == []

    run(tmp_path, scene)


def test_completion_is_recorded_as_it_was_answered(tmp_path: Path) -> None:
    async def scene(here: House) -> None:
        ask = ASK | {"seed": 4, "metadata": {"use_case": "qa"}}
        response = await here.post("completions", ask)
        assert response.headers["x-instructloop-recorded"] == "true"
        (event,) = here.sink.completions()
        completion = event.completion
        assert event.user_id == "ann"
        assert completion.completion_id == response.json()["id"]
        assert completion.prompt == pb.Prompt(text="a question")
        said = [choice["text"] for choice in response.json()["choices"]]
        assert [output.text for output in completion.outputs] == said
        assert [list(output.token_ids) for output in completion.outputs] == [[7, 7, 7]] * 2
        assert completion.sampling == pb.Sampling(temperature=1, top_p=1, max_tokens=3, seed=4)
        release = here.registry.get("r1")
        assert (completion.release_id, completion.release_digest) == ("r1", release.artifact)
        assert completion.source == pb.SOURCE_API and completion.notice_version == "v1"
        assert completion.metadata == {"use_case": "qa"}

    run(tmp_path, scene)


def test_streamed_completion_is_recorded_before_the_stream_ends(tmp_path: Path) -> None:
    async def scene(here: House) -> None:
        response = await here.post("chat/completions", CHAT | {"stream": True, "n": 2})
        chunks = events(response)
        (event,) = here.sink.completions()
        assert event.completion.completion_id == chunks[0]["id"]
        assert event.completion.prompt.messages[0] == pb.Message(role="user", content="hi")
        for index in (0, 1):
            said = [
                c["delta"]["content"] for k in chunks for c in k["choices"] if c["index"] == index
            ]
            assert event.completion.outputs[index].text == "".join(said)

    run(tmp_path, scene)


@pytest.mark.parametrize(
    ("user", "headers"),
    [
        ("bob", {}),
        ("prod-ann", {}),
        ("ann", {"x-instructloop-source": "playground"}),
        ("ann", {"x-instructloop-source": "playground", "x-instructloop-notice": "v0"}),
    ],
    ids=["no-consent", "production", "no-notice", "other-notice"],
)
def test_nothing_of_who_did_not_agree_reaches_the_sink(
    tmp_path: Path, user: str, headers: dict[str, str]
) -> None:
    async def scene(here: House) -> None:
        for path, body in (("completions", ASK), ("chat/completions", CHAT)):
            for stream in (False, True):
                response = await here.post(path, body | {"stream": stream}, user, **headers)
                assert response.status_code == 200
                assert response.headers["x-instructloop-recorded"] == "false"
        assert here.sink.completions() == []

    run(tmp_path, scene)


def test_playground_with_the_agreed_notice_is_recorded_as_such(tmp_path: Path) -> None:
    async def scene(here: House) -> None:
        headers = {"x-instructloop-source": "playground", "x-instructloop-notice": "v1"}
        await here.post("completions", ASK, **headers)
        assert here.sink.completions()[0].completion.source == pb.SOURCE_PLAYGROUND

    run(tmp_path, scene)


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves_is_not_recorded_and_holds_up_no_swap(
    tmp_path: Path, stream: bool
) -> None:
    async def scene(here: House) -> None:
        here.engine.may_answer.clear()
        left = asyncio.Event()
        messages = [{"type": "http.request", "body": json.dumps(ASK | {"stream": stream}).encode()}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            pass

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "query_string": b"",
            "headers": [(b"authorization", b"Bearer il-ann")],
        }
        call = asyncio.create_task(here.app(scope, receive, send))
        while not here.engine.asked:
            await asyncio.sleep(0)
        left.set()
        await asyncio.wait_for(call, 5)
        here.engine.may_answer.set()
        assert (await here.post("completions", ASK)).status_code == 200
        assert [e.completion.completion_id for e in here.sink.completions()] == ["cmpl-2"]

    run(tmp_path, scene)


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        (ASK | {"model": "other"}, 404, "model", "model_not_found"),
        ({"prompt": "a"}, 400, "model", None),
        (ASK | {"n": 0}, 400, "n", None),
        (ASK | {"n": 17}, 400, "n", None),
        (ASK | {"temperature": "x"}, 400, "temperature", None),
        (ASK | {"temperature": [1]}, 400, "temperature", None),
        (ASK | {"n": True}, 400, "n", None),
        (ASK | {"best_of": 1}, 400, "best_of", None),
        (ASK | {"best_of": 17}, 400, "best_of", None),
        (ASK | {"best_of": 3, "stream": True}, 400, "best_of", None),
        (ASK | {"best_of": 3, "echo": True}, 400, "best_of", None),
        (ASK | {"prompt": ["x"] * 65}, 400, "prompt", None),
        (ASK | {"prompt": {"a": 1}}, 400, "prompt", None),
        (ASK | {"stop": ["x"] * 5}, 400, "stop", None),
        (ASK | {"stop_token_ids": [1] * 65}, 400, "stop_token_ids", None),
        (ASK | {"logit_bias": {str(i): 1 for i in range(1025)}}, 400, "logit_bias", None),
        (ASK | {"logit_bias": {"1": 101}}, 400, "logit_bias.1", None),
        (ASK | {"stream_options": {"include_usage": True}}, 400, "stream_options", None),
        (ASK | {"structured_outputs": {}}, 400, "structured_outputs", None),
        (ASK | {"logprobs": 6}, 400, "logprobs", None),
        (ASK | {"suffix": "end"}, 400, "suffix", None),
        (ASK | {"kv_transfer_params": {}}, 400, "kv_transfer_params", None),
        (ASK | {"metadata": {"a": 1}}, 400, "metadata.a", None),
        (ASK | {"metadata": ["a"]}, 400, "metadata", None),
        (ASK | {"prompt": "x" * 20_000}, 413, None, None),
        (ASK | {"stop": ["a", "b", "c", "d", "e"]}, 400, "stop", None),
        ([ASK], 400, "body", None),
    ],
)
def test_refused_request_says_what_is_wrong(
    tmp_path: Path, body: Any, status: int, param: str, code: str | None
) -> None:
    async def scene(here: House) -> None:
        response = await here.post("completions", body)
        assert response.status_code == status
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert (error["type"], error["param"], error["code"]) == (
            "invalid_request_error",
            param,
            code,
        )
        assert here.engine.asked == []

    run(tmp_path, scene)


@pytest.mark.parametrize("raw", [b"{", b'{"model": "tiny", "prompt": "\\ud800"}', b"\xff"])
def test_text_that_is_not_json_in_utf8_is_refused(tmp_path: Path, raw: bytes) -> None:
    async def scene(here: House) -> None:
        headers = {"authorization": "Bearer il-ann"}
        response = await here.client.post("/v1/completions", content=raw, headers=headers)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "body")

    run(tmp_path, scene)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("completions", {"prompt": [{}] * 1000}),
        ("completions", {"prompt": [-1] * 1000}),
        ("completions", {"prompt": [[]] * 1000}),
        ("completions", {"prompt": [[-1] * 1000]}),
        ("chat", {"messages": [{}] * 1000}),
        ("chat", {"messages": [{"role": "user", "content": [{}] * 1000}]}),
    ],
)
def test_a_thousand_faults_are_not_all_looked_for(kind: Kind, body: dict[str, Any]) -> None:
    """While they are, nobody is answered: a body has room for a quarter of a million."""
    with pytest.raises(ValidationError) as caught:
        REQUEST[kind].model_validate({"model": "tiny"} | body)
    assert caught.value.error_count() <= 10


def nested(levels: int) -> dict[str, Any]:
    return {"not": nested(levels - 1)} if levels > 1 else {}


@pytest.mark.parametrize("schema", [nested(65), {"enum": list(range(5000))}], ids=["deep", "wide"])
def test_a_schema_that_takes_long_to_compile_is_refused(schema: dict[str, Any]) -> None:
    ask = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    called = {"type": "function", "function": {"name": "f", "parameters": schema}}
    form = {"type": "json_schema", "json_schema": {"name": "f", "schema": schema}}
    for field, said in (
        ("structured_outputs.json", {"structured_outputs": {"json": schema}}),
        ("response_format.json_schema.schema", {"response_format": form}),
        ("tools.0.function.parameters", {"tools": [called]}),
    ):
        with pytest.raises(InvalidInput, match="at most 64 levels and 5000 values") as caught:
            checked("chat", ask | said, 16)
        assert caught.value.field == field
    checked("chat", ask | {"structured_outputs": {"json": nested(64)}}, 16)
    with pytest.raises(InvalidInput, match="at most 256 characters"):
        checked("chat", ask | {"structured_outputs": {"choice": ["a" * 257]}}, 16)


def test_null_means_the_default() -> None:
    said = checked("completions", {"model": "m", "prompt": "p", "n": None, "stop": None}, 16)
    assert filled("completions", said) == {
        "model": "m",
        "prompt": "p",
        "n": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": 16,
    }
    with pytest.raises(InvalidInput, match="prompt"):
        checked("chat", {"model": "m", "prompt": "p"}, 16)


def test_several_answers_at_temperature_0_are_the_likeliest_ones(tmp_path: Path) -> None:
    async def scene(here: House) -> None:
        cold = ASK | {"temperature": 0, "top_k": 5}
        for more in ({"n": 2}, {"n": 1, "best_of": 2}):
            assert (await here.post("completions", cold | more)).status_code == 200
            # vLLM takes n above 1 at a temperature only.
            assert (here.engine.asked[-1]["temperature"], here.engine.asked[-1]["top_k"]) == (1, 1)
        assert [e.completion.sampling.temperature for e in here.sink.completions()] == [0, 0]
        await here.post("completions", cold | {"n": 1})
        assert (here.engine.asked[-1]["temperature"], here.engine.asked[-1]["top_k"]) == (0, 5)

    run(tmp_path, scene)


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses_is_not_said_to_be_kept(tmp_path: Path, stream: bool) -> None:
    async def scene(here: House) -> None:
        async def refuse(kind: object, body: object, adapter: object = None) -> Any:
            raise EngineRefused("too long")

        here.engine.answer = refuse  # type: ignore[method-assign]
        response = await here.post("completions", ASK | {"stream": stream})
        assert response.status_code == 400
        assert response.headers["x-instructloop-recorded"] == "false"

    run(tmp_path, scene)


def test_an_answer_can_be_sent_back_as_the_client_dumps_it(tmp_path: Path) -> None:
    async def scene(here: House) -> None:
        said = (await here.post("chat/completions", CHAT)).json()
        message = ChatCompletion.model_validate(said).choices[0].message.model_dump()
        assert {name for name in message if message[name] is None} > {"audio", "function_call"}
        asked: Any = CHAT["messages"]
        turns = [*asked, message, *asked]
        response = await here.post("chat/completions", CHAT | {"messages": turns, "store": True})
        assert response.status_code == 200
        assert len(here.sink.completions()[-1].completion.prompt.messages) == len(turns)

    run(tmp_path, scene)


def test_models_and_releases(tmp_path: Path) -> None:
    async def scene(here: House) -> None:
        here.client.headers["authorization"] = "Bearer il-bob"
        models = (await here.client.get("/v1/models")).json()
        assert models["object"] == "list" and models["data"][0]["id"] == "tiny"
        assert (await here.client.get("/v1/models/tiny")).json() == models["data"][0]
        assert (await here.client.get("/v1/models/x/y")).json()["error"][
            "code"
        ] == "model_not_found"
        releases = (await here.client.get("/v1/releases")).json()
        assert releases["serving"] == "r1"
        (change,) = releases["data"]
        assert (change["release"], change["outcome"], change["reason"]) == (
            "r1",
            "swapped_in",
            None,
        )
        missing = await here.client.get("/v2/models")
        assert missing.status_code == 404 and missing.json()["error"]["code"] is None

    run(tmp_path, scene)


def test_before_the_first_release_the_server_lives_and_is_not_ready(tmp_path: Path) -> None:
    async def scene(here: House) -> None:
        assert (await here.client.get("/healthz")).status_code == 200
        assert (await here.client.get("/readyz")).status_code == 503
        response = await here.post("completions", ASK)
        assert response.status_code == 503 and "retry-after" in response.headers
        assert response.json()["error"]["type"] == "server_error"
        publish(here.registry, tmp_path)
        while (await here.client.get("/readyz")).status_code != 200:
            await asyncio.sleep(0.01)

    run(tmp_path, scene, released=False)


def test_dead_engine_takes_the_process_with_it(tmp_path: Path) -> None:
    async def scene(here: House) -> None:
        here.engine.broken = "killed"
        assert (await here.client.get("/healthz")).status_code == 503
        assert (await here.client.get("/readyz")).status_code == 503
        while not here.failures:
            await asyncio.sleep(0.01)

    run(tmp_path, scene)


def test_fault_in_the_engine_is_told_without_its_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene(here: House) -> None:
        async def fail(kind: object, body: object, adapter: object = None) -> Any:
            raise RuntimeError("a question")

        here.engine.answer = fail  # type: ignore[method-assign]
        response = await here.post("completions", ASK)
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"
        assert "a question" not in response.text + caplog.text

    run(tmp_path, scene)


def test_stream_that_its_client_does_not_read_is_cut(tmp_path: Path) -> None:
    async def scene(here: House) -> None:
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            if not sent:
                sent.append("asked")
                return {"type": "http.request", "body": json.dumps(ASK | {"stream": True}).encode()}
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: Any) -> None:
            sent.append(message)
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()  # the client's buffers are full

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "query_string": b"",
            "headers": [(b"authorization", b"Bearer il-ann")],
        }
        await asyncio.wait_for(here.app(scope, receive, send), 10)
        assert sent[-1]["type"] == "http.response.body" and sent[-1]["more_body"]
        assert here.sink.completions() == []

    run(tmp_path, scene)


def test_consent_that_cannot_be_asked_keeps_nothing(tmp_path: Path) -> None:
    def broken(user_id: str, *, wait: bool = True) -> str | None:
        raise OSError("the log is gone")

    async def scene(here: House) -> None:
        here.consent.granted_notice = broken  # type: ignore[method-assign]
        response = await here.post("completions", ASK)
        assert response.status_code == 200
        assert response.headers["x-instructloop-recorded"] == "false"
        assert here.sink.completions() == []

    run(tmp_path, scene)


def test_consent_that_takes_waiting_is_asked_aside(tmp_path: Path) -> None:
    asked: list[tuple[bool, bool]] = []

    def slow(user_id: str, *, wait: bool = True) -> str | None:
        asked.append((wait, threading.current_thread() is threading.main_thread()))
        if not wait:
            raise BlockingIOError
        return "v1"

    async def scene(here: House) -> None:
        here.consent.granted_notice = slow  # type: ignore[method-assign]
        response = await here.post("completions", ASK)
        assert response.headers["x-instructloop-recorded"] == "true"
        assert asked == [(False, True), (True, False)]

    run(tmp_path, scene)


@pytest.mark.parametrize("stream", [False, True])
def test_filtered_answer_is_recorded_as_the_client_saw_it(tmp_path: Path, stream: bool) -> None:
    words = tmp_path / "words.txt"
    # The fake engine speaks the head of its folder's name, which is the digest of what is in it.
    digest = ArtifactStore(tmp_path / "aside").put("policy", model_folder(tmp_path / "same"))
    words.write_text(f"{digest[:6]}-1\n")

    async def scene(here: House) -> None:
        response = await here.post("completions", ASK | {"n": 1, "stream": stream})
        bodies = events(response) if stream else [response.json()]
        said = [choice for body in bodies for choice in body["choices"]]
        text = "".join(choice["text"] for choice in said)
        assert (text, said[-1]["finish_reason"]) == (f"{here.word}-0 ", "content_filter")
        (event,) = here.sink.completions()
        (output,) = event.completion.outputs
        assert (output.text, output.finish_reason) == (text, "content_filter")

    run(tmp_path, scene, content_filter=f"words:{words}")

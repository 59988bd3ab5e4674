"""Parity that is ours alone: the official client against everything but the engine."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI

from serving.request import REFUSED
from serving.settings import Settings
from tests.serving.house import House, house
from tests.serving.parity import row

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "hello", "max_tokens": 3}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with house(tmp_path_factory.mktemp("parity")) as running:
        yield running


def refused(call: Any, kind: type[openai.APIStatusError], **said: Any) -> dict[str, Any]:
    """The body of the error that the client raises; always of OpenAI's four fields."""
    with pytest.raises(kind) as caught:
        call()
    body: dict[str, Any] = caught.value.body  # type: ignore[assignment]
    assert body.keys() == {"message", "type", "param", "code"}
    assert body["code"] is None or isinstance(body["code"], str)
    assert {name: body[name] for name in said} == said
    return body


@row(
    "`n`",
    openai="1 to 128; null is 1",
    vllm="unbounded; null is an error; 400 above 1 at temperature 0",
    here="1 to the operator's bound (16, at most 128); null is 1; at temperature 0 too",
)
def test_n_is_bounded_and_null_is_one(here: House) -> None:
    client = here.openai()
    null = client.completions.create(**TEXT, extra_body={"n": None})
    assert len(null.choices) == 1
    assert len(client.completions.create(**TEXT, n=16).choices) == 16
    assert len(client.completions.create(**TEXT, n=2, temperature=0).choices) == 2
    for n in (0, 17, 999):
        refused(
            lambda n=n: client.completions.create(**TEXT, n=n), openai.BadRequestError, param="n"
        )


@row(
    "`best_of`",
    openai="0 to 20; the best by mean log-probability of a token; not with stream",
    vllm="ignored: n answers come back",
    here="n to 16, samples ranked the same way, log-probabilities only where asked for; refused "
    "with stream and with echo",
)
def test_best_of_returns_the_best_samples_first(here: House) -> None:
    client = here.openai("bob")
    # The fake engine gives sample i the log-probability -1 / (i + 1): the last ones are best.
    best = client.completions.create(**TEXT, n=2, best_of=5, logprobs=0)
    means = [sum(c.logprobs.token_logprobs) / 3 for c in best.choices if c.logprobs]
    assert means == pytest.approx([-1 / 5, -1 / 4])
    assert [choice.index for choice in best.choices] == [0, 1]
    assert best.usage is not None and best.usage.completion_tokens == 15
    silent = client.completions.create(**TEXT, best_of=2)
    assert silent.choices[0].logprobs is None
    refused(
        lambda: client.completions.create(**TEXT, n=3, best_of=2),
        openai.BadRequestError,
        param="best_of",
    )
    refused(
        lambda: client.completions.create(**TEXT, best_of=2, stream=True),
        openai.BadRequestError,
        param="best_of",
    )


@row("`logprobs`", openai="0 to 5", vllm="to 20, -1 for all", here="0 to 5")
def test_logprobs_are_capped_at_five(here: House) -> None:
    client = here.openai()
    assert client.completions.create(**TEXT, logprobs=5).choices[0].logprobs is not None
    for count in (6, -1):
        refused(
            lambda count=count: client.completions.create(**TEXT, logprobs=count),
            openai.BadRequestError,
            param="logprobs",
        )


@row("`suffix`", openai="models that insert only", vllm="400", here="400 that says why")
def test_suffix_is_refused(here: House) -> None:
    client = here.openai()
    body = refused(
        lambda: client.completions.create(**TEXT, suffix="end"),
        openai.BadRequestError,
        param="suffix",
    )
    assert "does not insert" in body["message"]


@row(
    "unknown fields",
    openai="400",
    vllm="ignored",
    here="400 with the field's name; so are vLLM's own beyond `top_k`, `min_p`, "
    "`repetition_penalty`, `min_tokens`, `ignore_eos`, `stop_token_ids`, `structured_outputs` and "
    "`return_token_ids`",
)
def test_unknown_fields_are_refused_by_name(here: House) -> None:
    client = here.openai()
    for name in ("foo", "chat_template", "mm_processor_kwargs", "priority", "kv_transfer_params"):
        refused(
            lambda name=name: client.chat.completions.create(**CHAT, extra_body={name: 1}),
            openai.BadRequestError,
            param=name,
        )
    client.completions.create(**TEXT, extra_body={"top_k": 3, "min_p": 0.1, "ignore_eos": True})


@row(
    "`service_tier`, `verbosity`, `prediction`, `audio`, `modalities`, `moderation`, "
    "`web_search_options`, `prompt_cache_*`, `functions`, `function_call`, `reasoning_effort`",
    openai="by model",
    vllm="ignored",
    here="400 that says why, for each",
)
def test_fields_that_are_not_done_are_refused_with_a_reason(here: House) -> None:
    client = here.openai()
    for name, why in REFUSED.items():
        body = refused(
            lambda name=name: client.chat.completions.create(**CHAT, extra_body={name: "x"}),
            openai.BadRequestError,
            param=name,
            type="invalid_request_error",
        )
        assert why in body["message"]


@row(
    "images, audio and files in messages",
    openai="by model",
    vllm="fetched from the address that the request names",
    here="400: text only, and the server fetches nothing",
)
def test_content_that_is_not_text_is_refused(here: House) -> None:
    image = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}
    message: Any = {"role": "user", "content": [image]}
    refused(
        lambda: here.openai().chat.completions.create(model="tiny", messages=[message]),
        openai.BadRequestError,
        param="messages.0.content.0.type",
    )


@row(
    "`store`, `metadata`, `user`, `safety_identifier`",
    openai="stores for the organization",
    vllm="ignored",
    here="stored by consent, with metadata, user and safety identifier; `store: false` is never "
    "stored; `store: true` without consent is 403",
)
def test_storing_follows_consent(here: House) -> None:
    ann, bob = here.openai("ann"), here.openai("bob")
    kept = ann.chat.completions.create(
        **CHAT, store=True, metadata={"use_case": "qa"}, safety_identifier="s1", user="u1"
    )
    event = next(e for e in here.events("completions") if e.completion.completion_id == kept.id)
    assert event.completion.metadata == {"use_case": "qa", "safety_identifier": "s1", "user": "u1"}
    raw = ann.chat.completions.with_raw_response.create(**CHAT, store=False)
    assert raw.headers["x-instructloop-recorded"] == "false"
    for client in (bob, here.openai("ann", production=True)):
        refused(
            lambda client=client: client.chat.completions.create(**CHAT, store=True),
            openai.PermissionDeniedError,
            code="consent_required",
        )
    refused(
        lambda: ann.completions.create(**TEXT, echo=True, extra_body={"store": True}),
        openai.PermissionDeniedError,
        code="not_storable",
    )


@row(
    "stored completions",
    openai="list, get, update, delete, messages; filtered by model and metadata",
    vllm="none",
    here="all but update (405: what was recorded is not changed), for chat and for plain "
    "completions; deleting withdraws it from every later dataset",
)
def test_stored_completions_are_their_owners_to_see_and_delete(here: House) -> None:
    cat, other = here.openai("cat"), here.openai("dan")
    agree(here, "cat")
    made = [
        cat.chat.completions.create(**CHAT, max_tokens=2, metadata={"use_case": case})
        for case in ("qa", "chat", "qa")
    ]
    listed = list(cat.chat.completions.list(model="tiny", limit=2))  # the client turns the pages
    assert [c.id for c in listed] == [c.id for c in made]
    chosen = cat.chat.completions.list(metadata={"use_case": "qa"}, order="desc")
    assert [c.id for c in chosen] == [made[2].id, made[0].id]
    assert list(cat.chat.completions.list(model="large")) == []
    for odd in ("", "a[b]", "c d\n"):
        kept = cat.chat.completions.create(**CHAT, max_tokens=2, metadata={odd: "\u00e9&="})
        assert [c.id for c in cat.chat.completions.list(metadata={odd: "\u00e9&="})] == [kept.id]
        cat.chat.completions.delete(kept.id)
    got = cat.chat.completions.retrieve(made[0].id)
    assert got.choices[0].message.content == made[0].choices[0].message.content
    assert got.system_fingerprint == made[0].system_fingerprint
    messages = cat.chat.completions.messages.list(made[0].id)
    assert [(m.role, m.content) for m in messages] == [("user", "hello")]
    assert list(other.chat.completions.list()) == []
    for call in (other.chat.completions.retrieve, other.chat.completions.delete):
        refused(lambda call=call: call(made[0].id), openai.NotFoundError)
    with pytest.raises(openai.APIStatusError, match="not changed"):
        cat.chat.completions.update(made[0].id, metadata={"use_case": "other"})
    assert cat.chat.completions.delete(made[0].id).deleted
    refused(lambda: cat.chat.completions.retrieve(made[0].id), openai.NotFoundError)
    assert [c.id for c in cat.chat.completions.list()] == [made[1].id, made[2].id]


def agree(here: House, user: str) -> None:
    with here.client(user) as client:
        answer = client.put("/v1/consent", json={"granted": True, "notice_version": "1"})
        assert answer.status_code == 200


@row(
    "models",
    openai="list, retrieve, delete",
    vllm="list only, with fields of its own",
    here="list and retrieve with OpenAI's fields; delete is 403",
)
def test_models_are_listed_and_retrieved(here: House) -> None:
    client = here.openai()
    (model,) = client.models.list()
    raw = json.loads(client.models.with_raw_response.list().text)["data"][0]
    assert raw.keys() == {"id", "object", "created", "owned_by"}
    assert client.models.retrieve("tiny") == model
    refused(
        lambda: client.models.retrieve("large"),
        openai.NotFoundError,
        code="model_not_found",
        param="model",
    )
    refused(lambda: client.models.delete("tiny"), openai.PermissionDeniedError)


@row(
    "`model` as `name` or `name@release`",
    openai="name or name-date",
    vllm="name",
    here="both; another release is a 404 that says which is loaded; `system_fingerprint` and "
    "`x-policy-release` name the one that answered",
)
def test_a_release_can_be_named(here: House) -> None:
    client = here.openai()
    raw = client.completions.with_raw_response.create(**TEXT | {"model": "tiny@r1"})
    assert raw.headers["x-policy-release"] == raw.parse().system_fingerprint == "r1"
    assert client.models.retrieve("tiny@r1").id == "tiny@r1"
    for model in ("tiny@r2", "large@r1", "tiny@"):
        body = refused(
            lambda model=model: client.completions.create(**TEXT | {"model": model}),
            openai.NotFoundError,
            code="model_not_found",
        )
        assert model != "tiny@r2" or "`tiny@r1`" in body["message"]


@row(
    "embeddings, and all that is not here",
    openai="many more routes",
    vllm="by model; control routes without a key",
    here="404; a model that generates has no embeddings",
)
def test_routes_that_do_not_exist_are_404(here: House) -> None:
    client = here.openai()
    refused(lambda: client.embeddings.create(model="tiny", input="x"), openai.NotFoundError)
    refused(lambda: client.responses.create(model="tiny", input="x"), openai.NotFoundError)
    # A slash too many is told as it came.
    missing = refused(
        lambda: client.get("/chat/completions/", cast_to=object), openai.NotFoundError
    )
    assert missing["message"] == "Invalid URL (GET /v1/chat/completions/)"


@row(
    "errors",
    openai="`message`, `type`, `param`, `code`: a string or null",
    vllm="`code` is a number, `type` a class; 401 is a bare string",
    here="as OpenAI, for every status",
)
def test_every_error_has_openais_shape(here: House, tmp_path_factory: Any) -> None:
    client = here.openai()
    unknown = OpenAI(base_url=f"{here.url}/v1", api_key="il-none", max_retries=0)
    refused(unknown.models.list, openai.AuthenticationError, code="invalid_api_key", param=None)
    refused(
        here.openai("ann", "feedback").models.list,
        openai.PermissionDeniedError,
        code="missing_scope",
        type="permission_error",
    )
    refused(
        lambda: client.completions.create(**TEXT, temperature=3),
        openai.BadRequestError,
        param="temperature",
        type="invalid_request_error",
        code=None,
    )

    async def fail(kind: object, body: object, adapter: object = None) -> Any:
        raise RuntimeError("hello")

    answer, here.engine.answer = here.engine.answer, fail  # type: ignore[method-assign]
    try:
        body = refused(
            lambda: client.completions.create(**TEXT),
            openai.InternalServerError,
            type="server_error",
        )
    finally:
        here.engine.answer = answer  # type: ignore[method-assign]
    assert "hello" not in body["message"]


@row(
    "while the model loads",
    openai="503",
    vllm="refuses connections",
    here="503 with `retry-after`; during a swap requests wait, none is refused",
)
def test_loading_is_503_with_retry_after(tmp_path_factory: Any) -> None:
    root = tmp_path_factory.mktemp("loading")
    with house(root, Settings(release_poll_s=0.02)) as here:
        serving, here.app.state.swapper.serving = here.app.state.swapper.serving, None
        with pytest.raises(openai.InternalServerError) as caught:
            here.openai().completions.create(**TEXT)
        assert caught.value.status_code == 503
        assert caught.value.response.headers["retry-after"] == "5"
        here.app.state.swapper.serving = serving


@row(
    "rate limits",
    openai="429, `retry-after`, `x-ratelimit-{limit,remaining,reset}-{requests,tokens}`",
    vllm="none",
    here="as OpenAI, a minute's requests and tokens for each key",
)
def test_a_key_that_asks_too_much_is_429(here: House) -> None:
    client = here.openai("bob", requests_per_minute=3, tokens_per_minute=50)
    raw = client.completions.with_raw_response.create(**TEXT)
    assert raw.headers["x-ratelimit-limit-requests"] == "3"
    assert raw.headers["x-ratelimit-remaining-requests"] == "2"
    assert raw.headers["x-ratelimit-reset-requests"].endswith("s")
    assert raw.headers["x-ratelimit-limit-tokens"] == "50"
    # 2 tokens for 5 characters, and 3 to be written.
    assert raw.headers["x-ratelimit-remaining-tokens"] == "45"
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(**TEXT | {"max_tokens": 45})
    assert caught.value.type == "tokens" and caught.value.code == "rate_limit_exceeded"
    refused = caught.value.response.headers
    # The prompt was 3 tokens longer than that.
    assert int(refused["retry-after"]) >= 1 and refused["x-ratelimit-remaining-tokens"] == "42"
    client.models.list()
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(**TEXT)
    assert caught.value.type == "requests"
    with here.client("op", "metrics") as operator:
        told = operator.get("/metrics").text
    for kind in ("tokens", "requests"):
        assert f'instructloop_limits_hit_total{{limit="{kind}"}} 1.0' in told


@row(
    "headers",
    openai="`x-request-id`, `openai-processing-ms`, `openai-version`, `openai-organization`",
    vllm="`x-request-id` with a flag, and the client's",
    here="all, on errors too; the id is always the server's",
)
def test_every_response_has_openais_headers(here: House) -> None:
    client = here.openai()
    raw = client.completions.with_raw_response.create(
        **TEXT, extra_headers={"x-request-id": "mine"}
    )
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**TEXT, n=0)
    for headers in (raw.headers, caught.value.response.headers):
        assert headers["x-request-id"].startswith("req_")
        assert int(headers["openai-processing-ms"]) >= 1
        assert headers["openai-version"] == "2020-10-01"
        assert headers["openai-organization"] == "instructloop"
    assert caught.value.request_id == caught.value.response.headers["x-request-id"]


@row(
    "keys, organizations, projects",
    openai="key; headers must match it",
    vllm="a static list",
    here="as OpenAI: a key has a project and scopes, and is revoked at once",
)
def test_organization_and_project_must_match_the_key(here: House) -> None:
    key = here.key("bob", project="p1")
    base = f"{here.url}/v1"
    OpenAI(base_url=base, api_key=key, organization="instructloop", project="p1").models.list()
    for organization, project, code in (
        ("other", None, "mismatched_organization"),
        (None, "p2", "mismatched_project"),
    ):
        client = OpenAI(
            base_url=base, api_key=key, organization=organization, project=project, max_retries=0
        )
        refused(client.models.list, openai.AuthenticationError, code=code)
    here.keys.revoke(here.keys.authenticate(f"Bearer {key}").key_id)
    refused(
        OpenAI(base_url=base, api_key=key, max_retries=0).models.list, openai.AuthenticationError
    )


@row(
    "an error within a stream",
    openai="an error event",
    vllm="an error event with a number as code",
    here="an error event in OpenAI's shape, then `[DONE]`",
)
def test_error_in_mid_stream_is_an_event(here: House) -> None:
    from serving.chunk import Choice, Chunk
    from serving.engine import EngineRefused

    async def broken(kind: Any, body: Any, adapter: object = None) -> Any:
        async def chunks() -> Any:
            yield Chunk("cmpl-x", "text_completion", 1, "tiny", [Choice(0, text="one")])
            raise EngineRefused("The engine has stopped.", status=503)

        return chunks()

    client = here.openai("bob")
    answer, here.engine.answer = here.engine.answer, broken  # type: ignore[method-assign]
    try:
        stream = client.completions.create(**TEXT, stream=True)
        assert next(stream).choices[0].text == "one"
        with pytest.raises(openai.APIError, match="engine has stopped"):
            next(stream)
    finally:
        here.engine.answer = answer  # type: ignore[method-assign]


@row(
    "feedback",
    openai="none",
    vllm="none",
    here="`/v1/feedback/rankings`, `ratings`, `edits`, `comments` by completion id, idempotent by "
    "`Idempotency-Key`",
)
def test_feedback_is_given_by_completion_id(here: House) -> None:
    client = here.openai("ann")
    made = client.completions.create(**TEXT, n=3)
    for kind, said in (
        ("rankings", {"groups": [[0], [2, 1]], "instruction_version": "1"}),
        ("ratings", {"output": 1, "score": 6}),
        ("edits", {"output": 0, "text": "better"}),
        ("comments", {"text": "too short"}),
    ):
        body = {"completion_id": made.id, **said}
        headers = {"Idempotency-Key": f"{kind}-1"}
        answers = [
            client.post(
                f"/feedback/{kind}", body=body, cast_to=object, options={"headers": headers}
            )
            for _ in range(2)
        ]
        assert answers[0] == answers[1]
        assert len(here.events(kind)) == 1

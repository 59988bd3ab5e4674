"""Engine protocol and its vLLM adapter; with engine_worker.py all that runs vLLM's engine.

vLLM is imported when the engine starts, not before: it takes seconds and reads its environment
while it loads.
"""

import asyncio
import gc
import os
import re
import tempfile
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec

from contracts.errors import InstructloopError
from serving import lora
from serving.chunk import Chunk
from serving.engine_arguments import EngineOptions, engine_arguments, environment, text_start
from serving.plain_stream import Lines, plainly
from serving.push import Offer
from serving.twin import StagingFailed, Twin

Kind = Literal["completions", "chat"]
Body = dict[str, Any]

_chunk = msgspec.json.Decoder(Chunk).decode

DONE = "data: [DONE]\n\n"
SHUTDOWN_S = 5.0


class EngineRefused(InstructloopError):
    """The engine does not answer this request; `status` and `param` as HTTP and OpenAI's error body
    name them.
    """

    def __init__(self, message: str, status: int = 400, param: str | None = None) -> None:
        self.status, self.param = status, param
        super().__init__(message)


class Engine(Protocol):
    """A model that answers requests and can change its weights."""

    async def start(self, folder: Path, model: str) -> None:
        """Load the model folder and serve it under the name `model`."""
        ...

    async def stop(self) -> None:
        """Release everything, child processes included. Safe to call before `start` and twice."""
        ...

    def failure(self) -> str | None:
        """Why the engine can answer nothing any more; None while it can."""
        ...

    async def answer(
        self, kind: Kind, body: Body, adapter: str | None = None
    ) -> Body | AsyncGenerator[Chunk, None]:
        """The response body, or its chunks where `body["stream"]` is true, by the weights through
        the loaded adapter of this name, or by the weights alone. Raises EngineRefused.

        Token ids are in `choices[].token_ids` where `body["return_token_ids"]` is true. Without a
        prompt a completion begins where a text begins. Closing the iterator, or cancelling the
        call, stops the generation.
        """
        ...

    async def logprobs(self, token_ids: Sequence[int], adapter: str | None = None) -> list[float]:
        """log p(token_ids[i] | token_ids[:i]) in nats for i = 1..n-1, by the weights that are
        served now, through the adapter of this name where there is one.
        """
        ...

    async def stage(self, folder: Path) -> None:
        """Load other weights of the same model beside the running ones. Raises StagingFailed."""
        ...

    async def receive(self, offer: Offer, bound_s: float) -> None:
        """The same with weights that a trainer sends, for at most `bound_s` seconds."""
        ...

    async def swap(self) -> None:
        """Forget every cached prefix, then exchange the running weights and the staged ones.

        Nothing may be in flight. The old weights stay staged: a second call takes the first one
        back. Raises CacheKept, with nothing changed.
        """
        ...

    async def discard(self) -> None:
        """Free what is staged."""
        ...

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Load an adapter of the running weights beside them, while answers go on. The name is not
        taken. Raises StagingFailed.
        """
        ...

    async def unload_adapter(self, name: str) -> None:
        """Free an adapter. None of its answers may be in flight."""
        ...


class VllmEngine:
    """An Engine on vLLM's AsyncLLM, behind vLLM's own request handlers but none of its routes.

    With slots for adapters every request has one: who asks for none gets one that changes nothing.
    On a CPU, vLLM up to 0.32 answers a request without adapter, in a batch with others that have
    one, by the adapter in its last slot.
    """

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._client: Any = None
        self._twin = Twin(None)
        self._handlers: dict[Kind, tuple[Any, Any]] = {}
        self._text_start: list[int] = []
        self._probes = 0
        self._model = ""
        # By name; None is the one that changes nothing. Empty without slots for adapters.
        self._adapters: dict[str | None, Any] = {}
        # The same by the names that a request's `model` has.
        self._served_adapters: dict[str, Any] = {}
        # Of all that were ever loaded: vLLM knows them by number.
        self._adapters_made = 0

    async def start(self, folder: Path, model: str) -> None:
        for name, value in environment(self._options).items():
            os.environ.setdefault(name, value)  # what the operator set stays
        arguments = ["--model", str(folder), *engine_arguments(self._options, folder, model)]
        self._text_start = text_start(folder)
        # On a thread: importing vLLM and starting its child process take seconds each, and the
        # server says meanwhile that it is loading. AsyncLLM binds to the event loop later, with its
        # first call.
        vllm, args, self._client = await asyncio.to_thread(_start_async_llm, arguments)
        self._twin = Twin(self._client)
        state = vllm.State()
        await vllm.init_app_state(
            self._client, state, args, await self._client.get_supported_tasks()
        )
        completion, chat = state.openai_serving_completion, state.openai_serving_chat
        plainly(completion)
        self._handlers = {
            "completions": (vllm.CompletionRequest, completion.create_completion),
            "chat": (vllm.ChatCompletionRequest, chat.create_chat_completion),
        }
        self._error_response = completion.create_error_response
        self._model, self._served_adapters = model, state.openai_serving_models.lora_requests
        if self._options.adapter_slots:
            with tempfile.TemporaryDirectory() as aside:
                await self._load_adapter(None, lora.write_zero(folder, Path(aside) / "zero"))
        # As vLLM's own server does: its environment is read once and not for every token, and what
        # was loaded is not searched for garbage again and again.
        vllm.enable_envs_cache()
        gc.collect()
        gc.freeze()

    async def stop(self) -> None:
        client, self._client, self._handlers, self._adapters = self._client, None, {}, {}
        if client is not None:
            client.shutdown(timeout=SHUTDOWN_S)
            gc.unfreeze()

    def failure(self) -> str | None:
        if self._client is not None and self._client.errored:
            return str(self._client.dead_error)
        return None

    async def answer(
        self, kind: Kind, body: Body, adapter: str | None = None
    ) -> Body | AsyncGenerator[Chunk, None]:
        from pydantic import ValidationError
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse

        if not self._handlers:
            raise EngineRefused("The model is still loading.", status=503)
        request_type, handle = self._handlers[kind]
        if kind == "completions" and "prompt" not in body:
            body = body | {"prompt": self._text_start}
        if (asked := self._adapter(adapter)) is not None:
            body = body | {"model": asked.lora_name}
        task = asyncio.current_task()
        cancelled = task.cancelling() if task else 0
        try:
            # No raw request: its headers could choose ids, priorities and ranks.
            result = await handle(request_type.model_validate(body), None)
        except ValidationError as e:
            first = e.errors()[0]
            param = ".".join(str(part) for part in first["loc"][:1]) or None
            raise EngineRefused(first["msg"], param=param) from None
        except Exception as e:
            if self.failure() is not None:
                raise EngineRefused("The engine has stopped.", status=503) from e
            result = self._error_response(e)
        if isinstance(result, ErrorResponse):
            # vLLM makes a refusal of a cancellation, too.
            if task and task.cancelling() > cancelled:
                raise asyncio.CancelledError
            raise _refusal(kind, result.error)
        if isinstance(result, AsyncGenerator):
            return _chunks(result)
        parsed: Body = result.model_dump(mode="json")
        _check_is_whole(choice["finish_reason"] for choice in parsed["choices"])
        return parsed

    async def logprobs(self, token_ids: Sequence[int], adapter: str | None = None) -> list[float]:
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        self._probes += 1
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=0,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = TokensPrompt(prompt_token_ids=list(token_ids))
        outputs = self._client.generate(
            prompt, params, f"probe-{self._probes}", lora_request=self._adapter(adapter)
        )
        async with aclosing(outputs):
            async for output in outputs:
                positions = output.prompt_logprobs
        return [float(positions[i][token_ids[i]].logprob) for i in range(1, len(token_ids))]

    async def stage(self, folder: Path) -> None:
        await self._twin.stage(folder)

    async def receive(self, offer: Offer, bound_s: float) -> None:
        await self._twin.receive(offer, bound_s)

    async def swap(self) -> None:
        await self._twin.swap()

    async def discard(self) -> None:
        await self._twin.discard()

    async def load_adapter(self, name: str, folder: Path) -> None:
        await self._load_adapter(name, folder)

    async def _load_adapter(self, name: str | None, folder: Path) -> None:
        from vllm.lora.request import LoRARequest

        self._adapters_made += 1
        # A name that no model has: a model's own name would go before it.
        request = LoRARequest(f"{self._model}@{name or ''}", self._adapters_made, str(folder))
        try:
            await self._client.add_lora(request)
        except Exception as e:
            await self._client.remove_lora(request.lora_int_id)
            raise StagingFailed(f"the engine could not load the adapter {name}: {e}") from e
        self._adapters[name] = self._served_adapters[request.lora_name] = request

    async def unload_adapter(self, name: str) -> None:
        request = self._adapters.pop(name)
        del self._served_adapters[request.lora_name]
        await self._client.remove_lora(request.lora_int_id)

    def _adapter(self, name: str | None) -> Any:
        """vLLM's request for it; None without slots for adapters."""
        return self._adapters[name] if self._adapters else None


@dataclass(frozen=True)
class _Vllm:
    """The names of vLLM that the adapter needs after the start, from wherever this version keeps
    them.
    """

    enable_envs_cache: Any
    init_app_state: Any
    State: Any
    CompletionRequest: Any
    ChatCompletionRequest: Any


def _start_async_llm(arguments: list[str]) -> tuple[_Vllm, Any, Any]:
    """vLLM's names, the parsed arguments, and a running AsyncLLM."""
    from starlette.datastructures import State
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.envs import enable_envs_cache
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.async_llm import AsyncLLM

    parser = FlexibleArgumentParser()  # type: ignore[no-untyped-call]
    args = make_arg_parser(parser).parse_args(arguments)

    class Client(AsyncLLM):
        """Without the destructor: at the end of a process it finds half of vLLM gone, and says so.
        `stop` does what it would do.
        """

        def __del__(self) -> None:
            return

    client = Client.from_engine_args(AsyncEngineArgs.from_cli_args(args))
    names = (enable_envs_cache, init_app_state, State, CompletionRequest, ChatCompletionRequest)
    return _Vllm(*names), args, client


def _refusal(kind: Kind, error: Any) -> EngineRefused:
    """vLLM's error in the names of a request; it may say the value again after the message."""
    if "--tool-call-parser" in error.message:
        needs = "tools: expected tool_choice none, for this server has no tool_call_parser"
        return EngineRefused(needs, error.code, "tool_choice")
    message = re.sub(r" \(parameter=.*\)$", "", error.message, flags=re.DOTALL)
    prompt = "prompt" if kind == "completions" else "messages"
    param = prompt if error.param in ("input_text", "input_tokens") else error.param
    return EngineRefused(message, error.code, param)


async def _chunks(lines: Lines) -> AsyncGenerator[Chunk, None]:
    """vLLM's server-sent events as chunks, beside those that are. An error in mid-stream raises
    EngineRefused.
    """
    async with aclosing(lines):
        async for line in lines:
            if line == DONE:
                return
            chunk = line if isinstance(line, Chunk) else _read(line)
            _check_is_whole(choice.finish_reason for choice in chunk.choices)
            yield chunk


def _read(line: str) -> Chunk:
    said = line[6:]  # after "data: "; white space may follow
    try:
        return _chunk(said)
    except msgspec.ValidationError:
        error = msgspec.json.decode(said)["error"]
        raise EngineRefused(error["message"], error["code"], error.get("param")) from None


def _check_is_whole(finish_reasons: Iterable[str | None]) -> None:
    """An engine that is ended breaks answers off, and calls that a reason to finish."""
    if "abort" in finish_reasons:
        raise EngineRefused("The engine broke this answer off.", status=503)

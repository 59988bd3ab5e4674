"""Plain stream: a completion's chunks from the engine's outputs, with nothing in between.

vLLM's handler builds two pydantic models and a line of JSON for every token. Where it says no more
than text and token ids, that is said here as vLLM says it; all else is left to it.
"""

import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from serving.chunk import Choice, Chunk

log = logging.getLogger(__name__)

Lines = AsyncGenerator[str | Chunk, None]


def plainly(handler: Any) -> None:
    """Have vLLM's handler of completions tell plain streams so."""
    handler.completion_stream_generator = _teller(handler, handler.completion_stream_generator)


def _teller(handler: Any, vllms: Callable[..., Lines]) -> Callable[..., Lines]:
    def tell(
        request: Any,
        inputs: Sequence[Any],
        outputs: AsyncGenerator[tuple[int, Any], None],
        request_id: str,
        created: int,
        model: str,
        **others: Any,
    ) -> Lines:
        if request.echo or request.logprobs is not None:
            return vllms(request, inputs, outputs, request_id, created, model, **others)
        start = Chunk(request_id, "text_completion", created, model, [])
        return _chunks(handler, request, outputs, start)

    return tell


async def _chunks(
    handler: Any,
    request: Any,
    outputs: AsyncGenerator[tuple[int, Any], None],
    start: Chunk,
) -> Lines:
    """A chunk an output, then the usage; an error as vLLM's line. `start` has no choices."""
    choices = request.n or 1
    wants_ids = request.return_token_ids
    # Tokens of each prompt, and of each answer.
    prompts: dict[int, int] = {}
    answers: dict[int, int] = {}

    def chunk(of: list[Choice]) -> Chunk:
        return Chunk(start.id, start.object, start.created, start.model, of)

    try:
        async with aclosing(outputs):
            async for prompt, result in outputs:
                if result.prompt_token_ids is not None:
                    prompts[prompt] = len(result.prompt_token_ids)
                for output in result.outputs:
                    index = output.index + prompt * choices
                    handler._raise_if_error(output.finish_reason, start.id)  # noqa: SLF001
                    told = answers.get(index)
                    if not (output.text or output.token_ids or told):
                        continue  # the engine is still reading the prompt
                    answers[index] = (told or 0) + len(output.token_ids)
                    said = Choice(index, output.text, finish_reason=output.finish_reason)
                    if wants_ids:
                        said.token_ids = list(output.token_ids)
                        said.prompt_token_ids = result.prompt_token_ids if told is None else None
                    yield chunk([said])
        if request.stream_options and request.stream_options.include_usage:
            end, asked, answered = chunk([]), sum(prompts.values()), sum(answers.values())
            end.usage = {
                "prompt_tokens": asked,
                "total_tokens": asked + answered,
                "completion_tokens": answered,
            }
            yield end
    except Exception as e:  # noqa: BLE001  whatever the engine raises
        log.warning("a stream failed: %s", type(e).__name__)
        yield f"data: {handler.create_streaming_error_response(e)}\n\n"

"""Rows of the three sets, rendered as a model reads them, in batches.

Shapes: B sequences of T tokens, right-padded; R response tokens.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from contracts.dataset import SetName, Split
from contracts.errors import InvalidInput
from contracts.prompt import PLAIN_CHAT_TEMPLATE, ChatMessage


@dataclass(frozen=True)
class PromptRow:
    """A row of ppo.parquet: raw `text`, or chat `messages` where text is empty."""

    id: str
    user_id: str
    text: str
    messages: tuple[ChatMessage, ...]
    use_case: str


@dataclass(frozen=True)
class SftRow(PromptRow):
    response: str


@dataclass(frozen=True)
class RankedRow(PromptRow):
    """`ranks` are aligned with `responses`, 0 best, ties equal; `finished` is False where
    max_tokens cut.
    """

    rater_id: str
    responses: tuple[str, ...]
    finished: tuple[bool, ...]
    ranks: tuple[int, ...]


_ROW_OF: dict[SetName, type[PromptRow]] = {"sft": SftRow, "rm": RankedRow, "ppo": PromptRow}


def read_set(folder: Path, name: SetName, split: Split) -> list[Any]:
    """The rows of one set and split: PromptRow, SftRow or RankedRow, in the dataset's order."""
    row_type: Any = _ROW_OF[name]
    fields = list(row_type.__dataclass_fields__)
    table = pq.read_table(folder / f"{name}.parquet", columns=[*fields, "split"])
    rows = (r for r in table.to_pylist() if r.pop("split") == split)
    return [
        row_type(**{k: tuple(v) if isinstance(v, list) else v for k, v in r.items()}) for r in rows
    ]


def prompt_text(row: PromptRow) -> str:
    """The words of a prompt as a person reads them; of a conversation, its last turn."""
    return row.text.rstrip("\n") or row.messages[-1]["content"]


def render(tokenizer: PreTrainedTokenizerBase, row: PromptRow) -> list[int]:
    """The prompt's token ids exactly as the server feeds them to the model."""
    return render_all(tokenizer, [row])[0]


def render_all(tokenizer: PreTrainedTokenizerBase, rows: Sequence[PromptRow]) -> list[list[int]]:
    """`render` of many rows: a tokenizer takes many texts at once in a fraction of the time."""
    raw = iter(_token_ids(tokenizer, [row.text for row in rows if row.text], whole=True))
    chats = [_conversation(tokenizer, row) for row in rows if not row.text]
    rendered = iter(_token_ids(tokenizer, chats))
    return [next(raw if row.text else rendered) for row in rows]


def _conversation(tokenizer: PreTrainedTokenizerBase, row: PromptRow) -> str:
    text = tokenizer.apply_chat_template(
        [{"role": m["role"], "content": m["content"]} for m in row.messages],
        chat_template=tokenizer.chat_template or PLAIN_CHAT_TEMPLATE,
        tokenize=False,
        add_generation_prompt=True,
    )
    return str(text)


def encode_response(
    tokenizer: PreTrainedTokenizerBase, text: str, finished: bool = True
) -> list[int]:
    """The response's token ids; a finished one ends with end-of-text, a cut one does not."""
    [ids] = _token_ids(tokenizer, [text])
    return [*ids, tokenizer.eos_token_id] if finished else ids


def encode_responses(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> Iterator[list[int]]:
    """`encode_response` of many finished ones."""
    return ([*ids, tokenizer.eos_token_id] for ids in _token_ids(tokenizer, texts))


def _token_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, whole: bool = False
) -> list[list[int]]:
    """Of each text; a `whole` one has the special tokens that the tokenizer puts around it."""
    if not texts:
        return []
    found: list[list[int]] = tokenizer(list(texts), add_special_tokens=whole)["input_ids"]
    return found


def fits(
    prompt: Sequence[int], responses: Iterable[Sequence[int]], max_prompt: int, max_response: int
) -> bool:
    """Whether nothing would have to be cut: what is too long is dropped whole."""
    return 0 < len(prompt) <= max_prompt and all(0 < len(r) <= max_response for r in responses)


def pad(sequences: Sequence[Sequence[int]], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Right-padded tokens [B, T] and lengths [B]. What stands in the padding is never read."""
    lengths_B = torch.tensor([len(s) for s in sequences])
    tokens_BT = torch.full((len(sequences), int(lengths_B.max())), pad_id)
    for row_T, sequence in zip(tokens_BT, sequences, strict=True):
        row_T[: len(sequence)] = torch.tensor(sequence)
    return tokens_BT, lengths_B


def length_mask(lengths_B: Tensor, width: int | None = None) -> Tensor:
    """[B, R], True at real tokens."""
    return torch.arange(int(lengths_B.max()) if width is None else width) < lengths_B[:, None]


def shuffled_batches(count: int, size: int, rng: random.Random) -> list[list[int]]:
    """The indices 0..count-1 in a random order, in batches of `size`; the last may be smaller."""
    order = list(range(count))
    rng.shuffle(order)
    return [order[i : i + size] for i in range(0, count, size)]


def similar_lengths(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices in batches of `size` neighbours by length, so that little is padded. For inference
    only.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[i : i + size] for i in range(0, len(order), size)]


class Order:
    """The indices 0..count-1 drawn without end, each round of them in another random order."""

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed
        self._start()

    def _start(self) -> None:
        self._taken, self._indices = 0, self._draw(random.Random(self._seed))

    def _draw(self, rng: random.Random) -> Iterator[int]:
        while True:
            order = list(range(self._count))
            rng.shuffle(order)
            yield from order

    def take(self, count: int) -> list[int]:
        self._taken += count
        return list(islice(self._indices, count))

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._start()
        self.take(state["taken"])


class TokenStream:
    """Documents joined by the end-of-text token and cut into rows of `width` tokens, drawn without
    end.
    """

    def __init__(
        self, documents: Iterable[Sequence[int]], eos_id: int, width: int, seed: int
    ) -> None:
        flat = [t for d in documents for t in (*d, eos_id)]
        rows = len(flat) // width
        if rows == 0:
            raise InvalidInput(
                "pretraining text", f"at least {width} tokens", f"{len(flat)} tokens"
            )
        self.rows_NT = torch.tensor(flat[: rows * width]).view(rows, width)
        self.order = Order(rows, seed)

    def take(self, rows: int) -> Tensor:
        """The next rows, int64 [rows, width]."""
        return self.rows_NT[self.order.take(rows)]

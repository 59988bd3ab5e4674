"""Rows become tokens as the server makes them, and batches are the same for the same seed."""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from contracts.errors import InvalidInput
from contracts.prompt import ChatMessage
from tests import tiny_models
from training.data import (
    PromptRow,
    RankedRow,
    TokenStream,
    encode_response,
    fits,
    length_mask,
    pad,
    read_set,
    render,
    shuffled_batches,
    similar_lengths,
)

TALK: tuple[ChatMessage, ...] = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Which animal barks?"},
    {"role": "assistant", "content": "A dog."},
    {"role": "user", "content": "And meows?"},
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def row(text: str = "", messages: tuple[ChatMessage, ...] = ()) -> PromptRow:
    return PromptRow("p", "alice", text, messages, "chat")


def test_a_raw_prompt_is_its_text() -> None:
    tokenizer = tiny_models.tokenizer()
    assert (
        tokenizer.decode(render(tokenizer, row("Write about the sea."))) == "Write about the sea."
    )


def test_a_raw_prompt_gets_the_tokenizers_own_special_tokens() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_models.tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    ids = render(tokenizer, row("Write"))
    assert ids[0] == 0
    assert tokenizer.decode(ids[1:]) == "Write"
    # A chat template writes its special tokens itself, and a response has none in front.
    assert render(tokenizer, row(messages=TALK))[0] != 0
    assert encode_response(tokenizer, "Write", finished=False) == ids[1:]


def test_messages_without_a_chat_template_are_plain_lines() -> None:
    tokenizer = tiny_models.tokenizer()
    expected = "Be brief.\nWhich animal barks?\nA dog.<|endoftext|>And meows?\n"
    ids = render(tokenizer, row(messages=TALK))
    assert tokenizer.decode(ids) == expected
    assert ids.count(0) == 1  # the end-of-text token itself, not its letters


def test_messages_go_through_the_models_own_chat_template() -> None:
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    expected = (
        "<system>Be brief.</><user>Which animal barks?</>"
        "<assistant>A dog.</><user>And meows?</><assistant>"
    )
    assert tokenizer.decode(render(tokenizer, row(messages=TALK))) == expected


def test_only_a_finished_response_ends_with_end_of_text() -> None:
    tokenizer = tiny_models.tokenizer()
    cut = encode_response(tokenizer, " a dog", finished=False)
    assert tokenizer.decode(cut) == " a dog"
    assert encode_response(tokenizer, " a dog") == [*cut, tokenizer.eos_token_id]
    assert encode_response(tokenizer, "") == [tokenizer.eos_token_id]


def test_too_long_is_dropped_and_never_cut() -> None:
    assert fits([1, 2], [[3], [4, 5]], max_prompt=2, max_response=2)
    assert not fits([1, 2, 3], [[3]], max_prompt=2, max_response=2)
    assert not fits([1], [[3], [4, 5, 6]], max_prompt=2, max_response=2)
    assert not fits([], [[3]], max_prompt=2, max_response=2)
    assert not fits([1], [[]], max_prompt=2, max_response=2)


def test_pad_and_mask() -> None:
    tokens_BT, lengths_B = pad([[1, 2, 3], [4]], pad_id=9)
    assert tokens_BT.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert lengths_B.tolist() == [3, 1]
    assert length_mask(lengths_B).tolist() == [[True] * 3, [True, False, False]]
    assert length_mask(lengths_B, width=2).tolist() == [[True, True], [True, False]]


def test_batches_hold_everything_once() -> None:
    batches = shuffled_batches(7, 3, random.Random(0))
    assert [len(b) for b in batches] == [3, 3, 1]
    assert sorted(i for b in batches for i in b) == list(range(7))
    assert batches == shuffled_batches(7, 3, random.Random(0))
    assert batches != shuffled_batches(7, 3, random.Random(1))
    assert similar_lengths([5, 1, 4, 2], 2) == [[1, 3], [2, 0]]


def test_token_stream_shows_every_row_once_an_epoch() -> None:
    # 1 2 0 | 3 4 5 | 6 0 ... : seven tokens and two ends make three rows; the rest is left.
    stream = TokenStream([[1, 2], [3, 4, 5, 6], [7]], eos_id=0, width=3, seed=5)
    assert stream.rows_NT.tolist() == [[1, 2, 0], [3, 4, 5], [6, 0, 7]]
    first, second = stream.take(3).tolist(), stream.take(3).tolist()
    assert sorted(first) == sorted(second) == [[1, 2, 0], [3, 4, 5], [6, 0, 7]]
    again = TokenStream([[1, 2], [3, 4, 5, 6], [7]], eos_id=0, width=3, seed=5)
    assert again.take(6).tolist() == first + second
    assert stream.take(0).shape == (0, 3)


def test_token_stream_needs_a_row() -> None:
    with pytest.raises(
        InvalidInput, match="pretraining text: expected at least 8 tokens, got '3 tokens'"
    ):
        TokenStream([[1, 2]], eos_id=0, width=8, seed=0)


def test_read_set_gives_the_rows_of_one_split(tmp_path: Path) -> None:
    common = {"user_id": "alice", "use_case": "chat", "source": "api", "release_id": "r1"}
    ranked = {
        "rater_id": "bob",
        "responses": ["x", "y"],
        "finished": [True, False],
        "ranks": [1, 0],
    }
    rows = [
        {"id": "a", "text": "Hi", "messages": [], "split": "train", **common, **ranked},
        {"id": "b", "text": "", "messages": list(TALK), "split": "test", **common, **ranked},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rm.parquet")
    [got] = read_set(tmp_path, "rm", "test")
    assert got == RankedRow(
        "b", "alice", "", TALK, "chat", "bob", ("x", "y"), (True, False), (1, 0)
    )
    assert torch.tensor(got.ranks).tolist() == [1, 0]

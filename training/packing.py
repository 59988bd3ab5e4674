"""Sequences side by side without padding; the responses of one prompt share its tokens.

Shapes: N tokens of all trees in one row, Q of them as queries. In a group of trees of like shape:
G trees, K responses each, P tokens of a prompt and R of a response, padded to the longest.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

# Tokens of a pass through a model: what is alive at once, in training with its gradient.
PASS_TOKENS = 2048
# Trees share a group while its padded score matrices stay within this multiple of the real ones,
# and what the calls for a group of its own cost: as much as so many entries of a score matrix.
PADDED, CALLS = 1.2, 4000


@dataclass(frozen=True)
class Tree:
    """A prompt and what follows it: each response sees the prompt and itself. Without responses it
    is a plain sequence.
    """

    prompt: Sequence[int]
    responses: Sequence[Sequence[int]] = ()

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.responses))

    @property
    def shape(self) -> tuple[int, int, int]:
        """How many responses, how long the prompt, how long the longest response."""
        return len(self.responses), len(self.prompt), max(map(len, self.responses), default=0)

    @property
    def work(self) -> int:
        """Entries of its score matrices."""
        p = len(self.prompt)
        return p * p + sum(len(r) * (p + len(r)) for r in self.responses)


@dataclass(frozen=True)
class Block:
    """G sequences of equal padded length T, as indices into the row; where they ask, and what.

    A padded slot repeats a real token: as a key it is hidden by `hidden`, as a query never read.
    """

    count: int  # G
    keys: Tensor  # [G * T]
    key_slots: Tensor  # the padded keys that are real
    queries: Tensor  # [G * Tq], into the queries
    hidden: Tensor  # bool [G or 1, Tq, T], True at what a query must not see
    read: Tensor  # the padded queries that are real ...
    write: Tensor  # ... and which queries they are


@dataclass(frozen=True)
class Group:
    """Trees of like shape, whose attention is computed at once."""

    prompt: Block
    response: Block | None
    prompt_padding: Tensor | None  # bool [G, 1, P], True at padding; None where there is none


class Packed:
    """Trees in one row of N tokens, prompt first, then its responses, each from the prompt's end.

    `tokens_N`, `positions_N`; `starts` and `lengths` of every segment in the row, prompts and
    responses in the order given.
    """

    def __init__(self, trees: Sequence[Tree]) -> None:
        self.trees = tuple(trees)
        segments = [s for t in trees for s in (t.prompt, *t.responses)]
        offsets = [o for t in trees for o in (0, *[len(t.prompt)] * len(t.responses))]
        self.lengths = [len(s) for s in segments]
        self.starts = [0, *accumulate(self.lengths)][:-1]
        self.tokens_N = torch.tensor([token for s in segments for token in s])
        self.positions_N = torch.cat(
            [torch.arange(o, o + n) for o, n in zip(offsets, self.lengths, strict=True)]
        )

    def __len__(self) -> int:
        return len(self.tokens_N)

    @property
    def ends(self) -> Tensor:
        """Where each response ends in the row; where a tree has none, where its prompt does."""
        ends, segment = [], 0
        for tree in self.trees:
            inside = range(segment, segment + 1 + len(tree.responses))
            leaves = inside[1:] if tree.responses else inside
            ends += [self.starts[s] + self.lengths[s] - 1 for s in leaves]
            segment = inside.stop
        return torch.tensor(ends)

    def before(self, prompts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Of trees without responses: where the model stands when it predicts what follows the
        first `prompts[i]` tokens of tree i, and these tokens themselves. Both [M].
        """
        at_M = torch.cat(
            [
                torch.arange(start + prompt - 1, start + length - 1)
                for start, length, prompt in zip(self.starts, self.lengths, prompts, strict=True)
            ]
        )
        return at_M, self.tokens_N[at_M + 1]

    def into_responses(self) -> tuple[Tensor, Tensor]:
        """Where the model stands when it predicts each token of the responses, and these tokens.
        Both [M]; where a prompt ends, it predicts the first token of each of its responses.
        """
        at: list[int] = []
        targets: list[int] = []
        segment = 0
        for tree in self.trees:
            end = self.starts[segment] + self.lengths[segment] - 1
            for _ in tree.responses:
                segment += 1
                inside = range(self.starts[segment], self.starts[segment] + self.lengths[segment])
                at += [end, *inside[:-1]]
                targets += inside
            segment += 1
        return torch.tensor(at), self.tokens_N[targets]

    def rows(self) -> tuple[list[list[int]], Tensor, Tensor]:
        """Every sequence on its own, prompt and response; row and column, [N] each, of a token.

        A prompt's tokens are in several rows, of which the first is named.
        """
        rows: list[list[int]] = []
        row: list[int] = []
        column: list[int] = []
        for tree in self.trees:
            row += [len(rows)] * len(tree.prompt)
            column += range(len(tree.prompt))
            for response in tree.responses or [()]:
                row += [len(rows)] * len(response)
                column += range(len(tree.prompt), len(tree.prompt) + len(response))
                rows.append([*tree.prompt, *response])
        return rows, torch.tensor(row), torch.tensor(column)

    def segments(self) -> tuple[Tensor, Tensor]:
        """Of each token its segment, and that of the prompt that it sees: its own, in a prompt.
        Both [N].
        """
        own = torch.arange(len(self.lengths))
        prompt = [
            first
            for tree, first in zip(self.trees, self._first_segments(), strict=True)
            for _ in range(1 + len(tree.responses))
        ]
        lengths = torch.tensor(self.lengths)
        return own.repeat_interleave(lengths), torch.tensor(prompt).repeat_interleave(lengths)

    def groups(self, queries_Q: Tensor | None = None) -> list[Group]:
        """How to compute attention for the tokens at `queries_Q` (ascending), or for all."""
        rank_N = torch.full((len(self),), -1)
        asked = torch.arange(len(self)) if queries_Q is None else queries_Q
        rank_N[asked] = torch.arange(len(asked))
        return [self._group(members, rank_N) for members in _alike(self.trees)]

    def _group(self, members: list[int], rank_N: Tensor) -> Group:
        first = self._first_segments()
        responses = len(self.trees[members[0]].responses)
        prompts = [first[m] for m in members]
        answers = [first[m] + 1 + k for m in members for k in range(responses)]
        lengths_G = torch.tensor([self.lengths[s] for s in prompts])
        padding_GP = torch.arange(int(lengths_G.max())) >= lengths_G[:, None]
        return Group(
            prompt=self._block(prompts, rank_N),
            response=self._block(answers, rank_N) if answers else None,
            prompt_padding=padding_GP[:, None] if bool(padding_GP.any()) else None,
        )

    def _first_segments(self) -> list[int]:
        """Of each tree, its prompt's."""
        return [0, *accumulate(1 + len(t.responses) for t in self.trees)][:-1]

    def _block(self, segments: list[int], rank_N: Tensor) -> Block:
        starts_G = torch.tensor([self.starts[s] for s in segments])
        lengths_G = torch.tensor([self.lengths[s] for s in segments])
        column_T = torch.arange(int(lengths_G.max()))
        keys_GT = starts_G[:, None] + torch.minimum(column_T, lengths_G[:, None] - 1)
        asked_GT = (rank_N[keys_GT] >= 0) & (column_T < lengths_G[:, None])
        # The columns asked for in each segment, moved to the left.
        width = int(asked_GT.sum(1).max())
        column_GQ = asked_GT.int().argsort(dim=1, descending=True, stable=True)[:, :width]
        real_GQ = asked_GT.gather(1, column_GQ)
        query_GQ = rank_N[keys_GT.gather(1, column_GQ)].clamp(min=0)
        same = bool(real_GQ.all()) and bool((column_GQ == column_GQ[0]).all())
        column_GQ = column_GQ[:1] if same else column_GQ
        return Block(
            count=len(segments),
            key_slots=(column_T < lengths_G[:, None]).flatten().nonzero()[:, 0],
            keys=keys_GT.flatten(),
            queries=query_GQ.flatten(),
            hidden=column_T > column_GQ[:, :, None],
            read=real_GQ.flatten().nonzero()[:, 0],
            write=query_GQ[real_GQ],
        )


def _alike(trees: Sequence[Tree]) -> Iterator[list[int]]:
    """Trees with as many responses and similar lengths, as lists of indices."""
    members: list[int] = []
    work = longest = 0
    for i in sorted(range(len(trees)), key=lambda i: trees[i].shape):
        count, prompt, response = trees[i].shape
        longest, work = max(longest, response), work + trees[i].work
        padded = (prompt**2 + count * longest * (prompt + longest)) * (len(members) + 1)
        bound = PADDED * work + CALLS * len(members)
        if members and (count != trees[members[0]].shape[0] or padded > bound):
            yield members
            members, work, longest = [], trees[i].work, response
        members.append(i)
    if members:
        yield members


def passes(trees: Sequence[Tree], tokens: int) -> list[list[int]]:
    """Indices of `trees` in parts of similar shape, of up to `tokens` tokens or of one tree."""
    parts: list[list[int]] = []
    room = 0
    for i in sorted(range(len(trees)), key=lambda i: trees[i].shape):
        if not parts or len(trees[i]) > room:
            parts.append([])
            room = tokens
        parts[-1].append(i)
        room -= len(trees[i])
    return parts

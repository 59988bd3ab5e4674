"""Packed trees give what separate rows give, on every family of models, and nothing leaks."""

import random

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from tests.training.architectures import ARCHITECTURES, UNPACKABLE
from training import llama
from training.backbone import hidden_states, packs
from training.kernels import ranking_loss
from training.packing import Packed, Tree, passes
from training.reward_head import RewardModel

# Of float32: scores are near 1; a gradient is compared by the norm of the difference.
SCORES, GRADIENTS = 2e-5, 1e-4
EVERYTHING = ARCHITECTURES | UNPACKABLE


def backbone(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModel.from_config(EVERYTHING[name]()).eval()
    return model


def sequence(rng: random.Random, longest: int) -> list[int]:
    return [rng.randrange(1, 320) for _ in range(rng.randint(1, longest))]


def trees(counts: tuple[int, ...], seed: int = 0) -> list[Tree]:
    rng = random.Random(seed)
    return [Tree(sequence(rng, 9), [sequence(rng, 6) for _ in range(k)]) for k in counts]


def separately(model: PreTrainedModel, tree: Tree) -> Tensor:
    """The last hidden state of each response, each in a forward pass of its own."""
    rows = [[*tree.prompt, *response] for response in tree.responses or [()]]
    states = [model(input_ids=torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
    return torch.stack(states)


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest relative error of a parameter's gradient."""
    scale = max(float(g.norm()) for g in theirs)
    return max(float((a - b).norm()) / scale for a, b in zip(ours, theirs, strict=True))


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", EVERYTHING)
def test_packed_is_as_separate_in_states_and_gradients(name: str) -> None:
    model, batch = backbone(name), trees((2, 3, 4, 5, 6, 7, 8, 9, 4, 0, 0))
    packed = Packed(batch)
    ours = hidden_states(model, packed, packed.ends)
    theirs = torch.cat([separately(model, tree) for tree in batch])
    torch.testing.assert_close(ours, theirs, atol=SCORES, rtol=SCORES)
    direction = torch.randn(ours.shape)
    mine = gradients(model, (ours * direction).sum())
    assert difference(mine, gradients(model, (theirs * direction).sum())) < GRADIENTS


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_model_is_packed_only_where_that_is_the_same(name: str) -> None:
    assert packs(backbone(name)) == (name in ARCHITECTURES)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2"])
def test_our_llama_is_hugging_faces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, packed = backbone(name), Packed(trees((3, 0, 4)))
    everywhere = torch.arange(len(packed))
    assert llama.is_llama(model)
    ours = hidden_states(model, packed, everywhere)
    monkeypatch.setattr(llama, "is_llama", lambda _: False)
    torch.testing.assert_close(ours, hidden_states(model, packed, everywhere), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", EVERYTHING)
def test_another_response_changes_nothing(name: str) -> None:
    model, [tree] = backbone(name), trees((4,), seed=1)
    changed = Tree(tree.prompt, [*tree.responses[:2], [7, 7, 7, 7, 7, 7, 7], tree.responses[3]])
    with torch.no_grad():
        before, after = (
            hidden_states(model, packed, packed.ends)
            for packed in (Packed([tree]), Packed([changed]))
        )
    rows = [0, 1, 3]
    torch.testing.assert_close(after[rows], before[rows], atol=1e-5, rtol=0)
    assert (after[2] - before[2]).abs().max() > 1e-2  # so that the check above could have failed


def test_another_tree_changes_nothing_and_any_tokens_can_be_asked_for() -> None:
    model, batch = backbone("llama"), trees((3, 0, 2), seed=2)
    together = Packed(batch)
    states = hidden_states(model, together, torch.arange(len(together)))
    start = 0
    for tree in batch:
        alone = Packed([tree])
        every = hidden_states(model, alone, torch.arange(len(alone)))
        torch.testing.assert_close(every, states[start : start + len(tree)], atol=1e-5, rtol=0)
        some = torch.arange(0, len(alone), 3)
        torch.testing.assert_close(
            hidden_states(model, alone, some), every[some], atol=1e-5, rtol=0
        )
        start += len(tree)


@pytest.mark.parametrize("name", ["llama", "gpt2", "alibi"])
def test_the_ranking_loss_and_its_gradients_are_those_of_separate_rows(name: str) -> None:
    model = RewardModel(backbone(name))
    batch = trees((2, 9, 5), seed=3)
    packed = Packed(batch)
    mask_BK = torch.arange(9) < torch.tensor([2, 9, 5])[:, None]
    ranks_BK = torch.tensor(
        [[1, 0] + [0] * 7, [0, 1, 1, 2, 3, 3, 3, 4, 5], [2, 1, 0, 0, 3] + [0] * 4]
    )

    def loss(scores_C: Tensor) -> Tensor:
        scores_BK = torch.zeros(3, 9).masked_scatter(mask_BK, scores_C)
        return ranking_loss(scores_BK, ranks_BK, mask_BK)

    states = torch.cat([separately(model.backbone, tree) for tree in batch])
    ours, theirs = loss(model.scores(packed, packed.ends)), loss(model.head(states)[:, 0])
    assert ours.item() == pytest.approx(theirs.item(), abs=SCORES)
    mine = gradients(model, ours)
    assert difference(mine, gradients(model, theirs)) < GRADIENTS


def test_bf16_autocast_is_near_float32() -> None:
    model, packed = backbone("llama"), Packed(trees((4, 9, 2)))
    exact = hidden_states(model, packed, packed.ends).detach()
    with torch.autocast("cpu", torch.bfloat16):
        rough = hidden_states(model, packed, packed.ends).detach()
    assert 1e-4 < float((rough - exact).norm() / exact.norm()) < 2e-2


def test_a_row_is_prompt_then_responses_from_where_the_prompt_ended() -> None:
    packed = Packed([Tree([5, 6], [[7], [8, 9]]), Tree([4, 3])])
    assert packed.tokens_N.tolist() == [5, 6, 7, 8, 9, 4, 3]
    assert packed.positions_N.tolist() == [0, 1, 2, 2, 3, 0, 1]
    assert packed.ends.tolist() == [2, 4, 6]
    rows, row_N, column_N = packed.rows()
    assert rows == [[5, 6, 7], [5, 6, 8, 9], [4, 3]]
    assert [rows[r][c] for r, c in zip(row_N, column_N, strict=True)] == packed.tokens_N.tolist()


def test_passes_hold_every_tree_once_and_few_tokens() -> None:
    batch = trees((2, 9, 3, 3, 5, 0, 0, 9))
    parts = passes(batch, 40)
    assert sorted(i for part in parts for i in part) == list(range(len(batch)))
    assert all(sum(len(batch[i]) for i in part) <= 40 or len(part) == 1 for part in parts)
    assert len(parts) < len(batch)
    assert passes(batch, 1000) == [sorted(range(len(batch)), key=lambda i: batch[i].shape)]

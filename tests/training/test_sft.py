"""What demonstrations teach: the response's tokens, nothing else, the same for the same seed."""

from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from contracts.errors import InvalidInput
from tests import tiny_models
from tests.training.letters import SFT, World, demonstrations
from training import likelihood
from training.config import SftConfig
from training.evaluation.comparison import language_model_loss
from training.likelihood import accumulate_likelihood, accumulate_mixed_likelihood
from training.metrics import Metrics, read_metrics
from training.model import Pair, load_policy, response_logprobs
from training.optimizer import cosine_share
from training.sft import set_residual_dropout, train_sft

PAIRS: list[Pair] = [([5, 6, 7], [11, 12, 0]), ([8], [13, 0]), ([9, 4], [10, 11, 12, 13, 14, 0])]


def unpacked_loss(model: PreTrainedModel) -> torch.Tensor:
    """Of PAIRS, by Hugging Face on padded rows; -100 is what it leaves out: prompts, padding."""
    longest = max(len(p) + len(r) for p, r in PAIRS)
    rows = [[*p, *r, *[0] * longest][:longest] for p, r in PAIRS]
    labels = [[*[-100] * len(p), *r, *[-100] * longest][:longest] for p, r in PAIRS]
    logits_BTV = model(input_ids=torch.tensor(rows)).logits[:, :-1]
    return F.cross_entropy(logits_BTV.reshape(-1, 320), torch.tensor(labels)[:, 1:].reshape(-1))


def loss_of(model: PreTrainedModel, pairs: list[Pair]) -> float:
    return -torch.cat(response_logprobs(model, pairs)).mean().item()


def test_packed_loss_and_gradients_are_those_of_padded_rows_over_the_response_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_models.model(0, tied=True)
    expected = unpacked_loss(model)
    expected.backward()
    theirs = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    for tokens in (2048, 9):  # in one pass, and in several
        monkeypatch.setattr(likelihood, "PASS_TOKENS", tokens)
        model.zero_grad()
        loss = accumulate_likelihood(model, PAIRS, "fp32")
        assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
        ours = [p.grad for p in model.parameters() if p.grad is not None]
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


def test_two_sets_in_one_pass_are_each_weighted_by_their_own_mean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_models.model(0, tied=True)
    sets: list[tuple[list[Pair], float]] = [(PAIRS, 1.0), ([([3], [4, 5, 6]), ([7], [8])], 0.3)]
    apart = [accumulate_likelihood(model, pairs, "fp32", weight).item() for pairs, weight in sets]
    theirs = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    for tokens in (2048, 9):
        monkeypatch.setattr(likelihood, "PASS_TOKENS", tokens)
        model.zero_grad()
        means = accumulate_mixed_likelihood(model, sets, "fp32").tolist()
        assert means == pytest.approx(apart, abs=1e-5)
        ours = [p.grad for p in model.parameters() if p.grad is not None]
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


def test_another_demonstration_in_the_row_changes_nothing() -> None:
    model = tiny_models.model(0, tied=True)
    [alone] = response_logprobs(model, [PAIRS[1]])
    for beside in (PAIRS[0], PAIRS[2], ([3] * 9, [4] * 9)):
        together = response_logprobs(model, [beside, PAIRS[1]])[1]
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_training_packed_ends_where_training_unpacked_does() -> None:
    losses = []
    for packed in (True, False):
        model = tiny_models.model(0, tied=True)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for _ in range(5):
            if packed:
                accumulate_likelihood(model, PAIRS, "fp32")
            else:
                unpacked_loss(model).backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss_of(model, PAIRS))
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_residual_dropout_acts_in_training_mode_and_goes_away() -> None:
    model = tiny_models.model(0, tied=True)
    tokens_BT = torch.tensor([[5, 6, 7, 8]])

    def logits(training: bool) -> torch.Tensor:
        with torch.no_grad():
            got: torch.Tensor = model.train(training)(input_ids=tokens_BT).logits
        return got

    plain = logits(False)
    set_residual_dropout(model, 0.2)
    torch.manual_seed(0)
    assert torch.equal(logits(False), plain)
    assert not torch.equal(logits(True), plain)
    assert not torch.equal(logits(True), logits(True))
    set_residual_dropout(model, 0.0)
    assert torch.equal(logits(True), plain)


def test_residual_dropout_refuses_layers_that_it_does_not_know() -> None:
    model = tiny_models.model(0, tied=True)
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(InvalidInput, match="dropout"):
        set_residual_dropout(model, 0.2)


def test_sft_learns_and_leaves_the_parent_alone(world: World) -> None:
    rows = [r for r in read_metrics(world.sft.parent / "sft-metrics") if "loss" in r]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[0]["rate"] == SFT.learning_rate
    prompt_and_answer: list[Pair] = [([5, 6, 7], [11, 12, 0])]
    losses = {
        folder: loss_of(load_policy(folder), prompt_and_answer)
        for folder in (world.base, world.sft)
    }
    assert losses[world.base] != losses[world.sft]


def test_the_same_seed_gives_the_same_weights_bit_for_bit(world: World, tmp_path: Path) -> None:
    states = []
    for name, seed, dropout in (("a", 3, 0.2), ("b", 3, 0.2), ("c", 4, 0.2), ("d", 3, 0.0)):
        config = SftConfig(epochs=1, batch=8, learning_rate=1e-3, dropout=dropout, seed=seed)
        torch.rand(7)  # what was drawn before must not matter
        with closing(Metrics(tmp_path / f"{name}-metrics")) as metrics:
            train_sft(config, world.base, demonstrations(24, 5), [], tmp_path / name, metrics)
        states.append(load_policy(tmp_path / name).state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    for other in states[2:]:
        assert not all(torch.equal(states[0][k], other[k]) for k in other)


def test_demonstrations_that_are_all_too_long_are_refused(world: World, tmp_path: Path) -> None:
    config = SftConfig(max_response_tokens=1)
    expected = pytest.raises(InvalidInput, match="demonstrations: expected at least one within")
    with closing(Metrics(tmp_path / "metrics")) as metrics, expected:
        train_sft(config, world.base, demonstrations(4, 5), [], tmp_path / "a", metrics)
    assert not (tmp_path / "a").exists()


def test_the_rate_falls_along_a_cosine_to_a_tenth() -> None:
    assert cosine_share(0, 100, 0.1) == 1.0
    assert cosine_share(50, 100, 0.1) == pytest.approx(0.55)
    assert cosine_share(100, 100, 0.1) == pytest.approx(0.1)


def test_pretraining_text_in_the_mix_keeps_the_policy_writing(world: World, tmp_path: Path) -> None:
    texts = ["the cat sees the sea. " * 8] * 20
    losses = {}
    for name, pretraining in (("without", list[str]()), ("with", texts)):
        config = SftConfig(epochs=4, batch=8, learning_rate=2e-3, pretraining_row_tokens=16)
        with closing(Metrics(tmp_path / f"{name}-metrics")) as metrics:
            rows = demonstrations(24, 5)
            train_sft(config, world.base, rows, [], tmp_path / name, metrics, pretraining)
        losses[name] = language_model_loss(tmp_path / name, texts[:1], 32)
    assert losses["with"] < losses["without"] - 0.2

"""The maths against numbers worked out by hand or by another formula."""

from itertools import combinations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from training.config import PpoConfig
from training.kernels import (
    clipped,
    gae,
    kl_rewards,
    policy_losses,
    ranking_loss,
    value_losses,
    whiten,
)
from training.objectives import (
    KlController,
    explained_variance,
    group_normalised,
    leave_one_out,
    plackett_luce_loss,
)


def full(rows: list[list[float]]) -> Tensor:
    return torch.ones(len(rows), len(rows[0]), dtype=torch.bool)


def one_ranking(scores: list[float], ranks: list[int]) -> float:
    return ranking_loss(torch.tensor([scores]), torch.tensor([ranks]), full([scores])).item()


def test_a_tie_is_dropped_from_the_ranking_loss() -> None:
    # Gaps 1 and 2: -log sigmoid(1) = 0.3132617, -log sigmoid(2) = 0.1269280; the tied pair is not
    # there.
    expected = (0.3132617 + 0.1269280) / 2
    assert one_ranking([2.0, 1.0, 0.0], [0, 1, 1]) == pytest.approx(expected, abs=1e-6)
    # The order in which the answers stand does not matter.
    assert one_ranking([0.0, 2.0, 1.0], [1, 0, 1]) == pytest.approx(expected, abs=1e-6)


def test_ranking_loss_is_the_mean_over_all_pairs_of_a_prompt() -> None:
    torch.manual_seed(0)
    scores_K = torch.randn(7, dtype=torch.float64)
    pairs = [
        -torch.log(torch.sigmoid(scores_K[i] - scores_K[j])) for i, j in combinations(range(7), 2)
    ]
    assert len(pairs) == 21
    loss = ranking_loss(scores_K[None], torch.arange(7)[None], full([[0.0] * 7]))
    assert loss.item() == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-12)


def test_nine_answers_weigh_as_much_as_four() -> None:
    torch.manual_seed(1)
    four_K, nine_K = torch.randn(4), torch.randn(9)
    mask_BK = torch.tensor([[True] * 4 + [False] * 5, [True] * 9])
    # What stands in the padding must not count, so it is made large.
    scores_BK = torch.stack([torch.cat([four_K, torch.full((5,), 50.0)]), nine_K])
    both = ranking_loss(scores_BK, torch.arange(9).expand(2, 9), mask_BK).item()
    apart = [one_ranking(s.tolist(), list(range(len(s)))) for s in (four_K, nine_K)]
    assert both == pytest.approx(sum(apart) / 2, abs=1e-6)


def test_a_ranking_of_ties_alone_is_left_out() -> None:
    scores_BK = torch.tensor([[1.0, 0.0], [3.0, -2.0]])
    loss = ranking_loss(scores_BK, torch.tensor([[0, 1], [0, 0]]), full([[0.0, 0.0]] * 2))
    assert loss.item() == pytest.approx(0.3132617, abs=1e-6)


def test_ranking_gradient_of_equal_scores() -> None:
    # Each of the three pairs moves its two scores by sigmoid(0) / 3 = 1/6; the middle one is pulled
    # both ways.
    scores_BK = torch.zeros(1, 3, requires_grad=True)
    ranking_loss(scores_BK, torch.tensor([[0, 1, 2]]), full([[0.0] * 3])).backward()
    assert scores_BK.grad is not None
    assert scores_BK.grad[0].tolist() == pytest.approx([-1 / 3, 0.0, 1 / 3], abs=1e-7)


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        # log(1 + 1/e + 1/e^2) = 0.4076059 to be first of three, log(1 + 1/e) = 0.3132617 of two.
        ([0, 1, 2], (0.4076059 + 0.3132617) / 2),
        # Nothing is below the tied ones: a single choice.
        ([0, 1, 1], 0.4076059),
        # Tied ones do not compete: each is chosen before the last, log(1 + 1/e^2) = 0.1269280.
        ([0, 0, 1], (0.1269280 + 0.3132617) / 2),
    ],
)
def test_a_ranking_as_choices_by_hand(ranks: list[int], expected: float) -> None:
    scores_BK = torch.tensor([[2.0, 1.0, 0.0]])
    loss = plackett_luce_loss(scores_BK, torch.tensor([ranks]), full([[0.0] * 3]))
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_gradient_of_choices_among_equal_scores() -> None:
    # First of three: -2/3, 1/3, 1/3. Second of the other two: 0, -1/2, 1/2. Half of each.
    scores_BK = torch.zeros(1, 3, requires_grad=True)
    plackett_luce_loss(scores_BK, torch.tensor([[0, 1, 2]]), full([[0.0] * 3])).backward()
    assert scores_BK.grad is not None
    assert scores_BK.grad[0].tolist() == pytest.approx([-1 / 3, -1 / 12, 5 / 12], abs=1e-7)


def test_prompts_weigh_the_same_however_many_choices_they_hold() -> None:
    # A large score in the padding must not count; a prompt of ties alone is left out.
    scores_BK = torch.tensor([[2.0, 1.0, 0.0], [1.0, 0.0, 50.0], [3.0, -2.0, 9.0]])
    mask_BK = torch.tensor([[True] * 3, [True, True, False], [True] * 3])
    scores_BK.requires_grad_()
    loss = plackett_luce_loss(scores_BK, torch.tensor([[0, 1, 2], [0, 1, 2], [0, 0, 0]]), mask_BK)
    # The second prompt has one pair with a gap of 1, which a choice of two is: 0.3132617.
    expected = ((0.4076059 + 0.3132617) / 2 + 0.3132617) / 2
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    loss.backward()
    assert scores_BK.grad is not None
    assert scores_BK.grad[1, 2] == 0
    assert scores_BK.grad[2].tolist() == [0, 0, 0]


def test_kl_rewards_by_hand() -> None:
    mask_BR = torch.tensor([[True, True, True], [True, False, False]])
    logprobs_BR = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, 0.0, 0.0]])
    reference_BR = torch.tensor([[-2.0, -2.0, -1.0], [-3.0, 7.0, 7.0]])
    rewards_BR = kl_rewards(torch.tensor([5.0, -1.0]), logprobs_BR, reference_BR, mask_BR, beta=0.1)
    assert rewards_BR[0].tolist() == pytest.approx([-0.1, 0.0, 5.2], abs=1e-6)
    assert rewards_BR[1].tolist() == pytest.approx([-1.2, 0.0, 0.0], abs=1e-6)


def test_kl_rewards_sum_to_score_minus_beta_kl_and_are_zero_after_the_end() -> None:
    torch.manual_seed(2)
    mask_BR = torch.arange(6) < torch.tensor([1, 4, 6])[:, None]
    logprobs_BR, reference_BR, scores_B = -torch.rand(3, 6), -torch.rand(3, 6), torch.randn(3)
    rewards_BR = kl_rewards(scores_B, logprobs_BR, reference_BR, mask_BR, beta=0.3)
    kl_B = ((logprobs_BR - reference_BR) * mask_BR).sum(1)
    torch.testing.assert_close(rewards_BR.sum(1), scores_B - 0.3 * kl_B)
    assert (rewards_BR[~mask_BR] == 0).all()


@pytest.mark.parametrize(
    ("gamma", "advantages", "returns"),
    [
        # Deltas 0.5, 1.5, 0.5; each advantage adds half of the next one.
        (1.0, [1.375, 1.75, 0.5], [1.875, 2.75, 2.0]),
        # Deltas 0.4, 1.35, 0.5; each adds 0.45 of the next one.
        (0.9, [1.10875, 1.575, 0.5], [1.60875, 2.575, 2.0]),
    ],
)
def test_gae_by_hand(gamma: float, advantages: list[float], returns: list[float]) -> None:
    # A fourth token beyond the end.
    rewards_BR = torch.tensor([[0.0, 1.0, 2.0, 0.0]])
    values_BR = torch.tensor([[0.5, 1.0, 1.5, 0.0]])
    got_BR, returns_BR = gae(rewards_BR, values_BR, gamma, 0.5)
    assert got_BR[0].tolist() == pytest.approx([*advantages, 0.0], abs=1e-6)
    assert returns_BR[0].tolist() == pytest.approx([*returns, 0.0], abs=1e-6)


def test_gae_without_discount_is_what_is_still_to_come() -> None:
    torch.manual_seed(3)
    mask_BR = torch.arange(5) < torch.tensor([5, 2])[:, None]
    rewards_BR, values_BR = torch.randn(2, 5) * mask_BR, torch.randn(2, 5) * mask_BR
    advantages_BR, returns_BR = gae(rewards_BR, values_BR, 1.0, 1.0)
    to_come_BR = rewards_BR.flip(1).cumsum(1).flip(1) * mask_BR
    torch.testing.assert_close(returns_BR, to_come_BR)
    torch.testing.assert_close(advantages_BR, (to_come_BR - values_BR) * mask_BR)


def test_whitening_uses_the_biased_variance_of_the_real_tokens() -> None:
    # Mean 2, biased variance 4 (unbiased would be 8).
    values_BR, mask_BR = torch.tensor([[0.0, 4.0, 99.0]]), torch.tensor([[True, True, False]])
    assert whiten(values_BR, mask_BR)[0].tolist() == pytest.approx([-1.0, 1.0, 0.0], abs=1e-6)
    kept = whiten(values_BR, mask_BR, shift_mean=False)[0].tolist()
    assert kept == pytest.approx([1.0, 3.0, 0.0], abs=1e-6)


def test_policy_losses_clip_on_both_sides() -> None:
    # Ratio and advantage: 1.5, +1 > -1.2 (clipped); 1.5, -1 > 1.5; 0.5, +1 > -0.5; 0.5, -1 > 0.8
    # (clipped).
    ratios = torch.tensor([1.5, 1.5, 0.5, 0.5])
    logprobs = ratios.log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    losses = policy_losses(logprobs, torch.zeros(4), advantages, 0.2)
    assert losses.tolist() == pytest.approx([-1.2, 1.5, -0.5, 0.8], abs=1e-6)
    assert clipped(ratios, advantages, 0.2).tolist() == [True, False, False, True]
    losses.sum().backward()
    assert logprobs.grad is not None
    # d(ratio)/d(logprob) = ratio; nothing flows where it is clipped.
    assert logprobs.grad.tolist() == pytest.approx([0, 1.5, -0.5, 0], abs=1e-6)
    assert not clipped(torch.tensor([9.0]), torch.zeros(1), 0.2).any()


@pytest.mark.parametrize(
    ("value", "target", "expected"),
    [
        # Old value 0, clip 0.2: the clipped error (0.2 - 2)^2 = 3.24 is the larger one.
        (1.0, 2.0, 1.62),
        # (1 - 0)^2 = 1 is larger than (0.2 - 0)^2.
        (1.0, 0.0, 0.5),
        (0.1, 0.3, 0.02),
    ],
)
def test_value_loss_is_half_of_the_worse_error(
    value: float, target: float, expected: float
) -> None:
    [loss] = value_losses(torch.tensor([value]), torch.zeros(1), torch.tensor([target]), 0.2)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1.0, 2.0, 3.0, 4.0], 1.0), ([7.0] * 4, 0.0), ([1.0, 2.0, 3.0, 3.0], 0.85)],
)
def test_explained_variance(values: list[float], expected: float) -> None:
    # Returns 1..4 have variance 1.25; a miss of 1 on one of them leaves a variance of 0.1875.
    mask_BR = torch.tensor([[True] * 4 + [False]])
    got = explained_variance(
        torch.tensor([[*values, 9.0]]), torch.tensor([[1.0, 2.0, 3.0, 4.0, -9.0]]), mask_BR
    )
    assert got == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("kl", "episodes", "expected"),
    [
        # On target nothing moves. 10 % above it: 0.1 * (1 + 0.1 * 500 / 10000).
        (6.0, 500, 0.1),
        (6.6, 500, 0.1005),
        (5.4, 500, 0.0995),
        # Errors beyond 20 % count as 20 %.
        (60.0, 1000, 0.102),
        (0.0, 1000, 0.098),
    ],
)
def test_the_adaptive_controller_moves_beta_towards_its_target(
    kl: float, episodes: int, expected: float
) -> None:
    controller = KlController(PpoConfig(beta=0.1, kl_controller="adaptive"))
    controller.update(kl, episodes)
    assert controller.beta == pytest.approx(expected, rel=1e-9)
    again = KlController(PpoConfig(beta=0.5, kl_controller="adaptive"))
    again.load_state_dict(controller.state_dict())
    assert again.beta == controller.beta


def test_the_fixed_controller_keeps_beta() -> None:
    controller = KlController(PpoConfig(beta=0.1))
    controller.update(60.0, 512)
    assert controller.beta == 0.1


def test_an_adaptive_beta_can_neither_begin_at_nothing_nor_change_its_sign() -> None:
    with pytest.raises(ValidationError, match="beta: expected > 0"):
        PpoConfig(beta=0, kl_controller="adaptive")
    # An error of 20 % over 50 episodes and a horizon of 10 would multiply beta by 1 - 1.
    with pytest.raises(ValidationError, match=r"kl_horizon: expected more than 0\.2 of"):
        PpoConfig(kl_controller="adaptive", batch=50, kl_horizon=10)
    assert PpoConfig(kl_controller="adaptive", batch=50, kl_horizon=11).kl_horizon == 11


def test_a_baseline_is_the_mean_of_the_other_rewards() -> None:
    rewards_BK = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    assert leave_one_out(rewards_BK).tolist() == [[4.0, 3.5, 1.5], [1.5, 1.5, 0.0]]


def test_rewards_in_the_standard_deviations_of_their_prompt() -> None:
    rewards_BK = torch.tensor([[0.0, 0.0, 0.0, 4.0], [7.0, 7.0, 7.0, 7.0]])
    # The mean is 1, the biased variance 3.
    expected = [-(3**-0.5)] * 3 + [3**0.5]
    found_BK = group_normalised(rewards_BK)
    assert found_BK[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert found_BK[1].tolist() == [0.0] * 4

"""Episodes as tensors, and the engine in the trainer's process on the trainer's weights."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests import tiny_models
from training.model import load_policy, response_logprobs
from training.rollout import Sampled, Sampler, pack

PROMPTS = [[70, 71, 72, 73], [80], [90, 91, 92, 93, 94, 95]]


def test_episodes_are_packed_by_token_counts() -> None:
    # A token that means end-of-text inside the prompt, and one that looks like padding, are just
    # tokens.
    rollout = pack(
        [[5, 0, 6], [7]],
        [Sampled((8, 0), (-1.0, -2.0), True), Sampled((9, 10, 11), (-3.0, -4.0, -5.0), False)],
    )
    assert rollout.pairs == (([5, 0, 6], (8, 0)), ([7], (9, 10, 11)))
    assert rollout.mask_BR.tolist() == [[True, True, False], [True, True, True]]
    assert rollout.engine_logprobs_BR.tolist() == [[-1.0, -2.0, 0.0], [-3.0, -4.0, -5.0]]
    assert rollout.finished_B.tolist() == [True, False]
    assert len(rollout) == 2


def mismatch(model: PreTrainedModel, samples: list[list[Sampled]]) -> float:
    """The largest difference between what the engine and the trainer say of a sampled token."""
    rollout = pack(
        [p for p in PROMPTS for _ in samples[0]], [s for group in samples for s in group]
    )
    logprobs = torch.cat(response_logprobs(model, rollout.pairs))
    return float((logprobs - rollout.engine_logprobs_BR[rollout.mask_BR]).abs().max())


@pytest.mark.vllm
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_engine_and_trainer_agree_before_and_after_new_weights(tmp_path: Path, tied: bool) -> None:
    folders = [tiny_models.save(tmp_path / str(seed), seed, tied=tied) for seed in (0, 1)]
    sampler = Sampler(folders[0], max_tokens=64)
    old, new = (load_policy(folder) for folder in folders)

    before = sampler.sample(PROMPTS, 24, seed=5, samples=3)
    assert [len(group) for group in before] == [3, 3, 3]
    assert mismatch(old, before) < 1e-4
    assert len({s.token_ids for s in before[0]}) == 3
    for sample in (s for group in before for s in group):
        assert sample.finished == (sample.token_ids[-1] == 0)
        assert 0 not in sample.token_ids[:-1]
        assert sample.finished or len(sample.token_ids) == 24
    assert sampler.sample(PROMPTS, 24, seed=5, samples=3) == before

    # The same prompts again: nothing that was cached under the old weights may answer.
    sampler.load(new.state_dict())
    after = sampler.sample(PROMPTS, 24, seed=5, samples=3)
    assert mismatch(new, after) < 1e-4
    assert mismatch(old, after) > 0.1
    sampler.load(old.state_dict())
    assert mismatch(old, sampler.sample(PROMPTS, 24, seed=5, samples=3)) < 1e-4
    sampler.close()

"""Policies: log-probabilities and round trips, on several architectures."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    PreTrainedConfig,
)

from contracts.errors import InvalidInput
from serving import checkpoint
from tests import tiny_models
from tests.training.architectures import ARCHITECTURES, SIZES
from training.likelihood import accumulate_likelihood
from training.model import canary_of, load_policy, load_tokenizer, response_logprobs, save_policy
from training.reward_head import RewardModel
from training.sft import set_residual_dropout


def write(config: PreTrainedConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=ARCHITECTURES)
def policy_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(ARCHITECTURES[request.param](), tmp_path_factory.mktemp("policy") / "model")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return tiny_models.save(tmp_path / "tiny", 0, tied=True)


def test_response_logprobs_are_those_of_the_full_softmax(policy_folder: Path) -> None:
    model = load_policy(policy_folder)
    prompts, responses = [[5, 6, 7], [8], [9, 10]], [[11, 12], [13, 14, 15, 0], [16]]
    got = response_logprobs(model, list(zip(prompts, responses, strict=True)))
    for own, prompt, response in zip(got, prompts, responses, strict=True):
        # One row at a time, nothing packed.
        ids = prompt + response
        with torch.no_grad():
            all_TV = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = [all_TV[i - 1, ids[i]].item() for i in range(len(prompt), len(ids))]
        assert own.tolist() == pytest.approx(expected, abs=1e-5)


def test_one_sft_step_lowers_the_loss_on_every_architecture(policy_folder: Path) -> None:
    model = load_policy(policy_folder)
    pairs = [([5, 6, 7], [11, 12, 0]), ([8], [13, 0])]
    set_residual_dropout(model, 0.2)
    before = accumulate_likelihood(model, pairs, "fp32")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.02 * parameter.grad)
    assert accumulate_likelihood(model, pairs, "fp32") < before


def test_reward_backbone_is_the_policy_without_its_unembedding(policy_folder: Path) -> None:
    reward, policy = RewardModel.from_policy(policy_folder), load_policy(policy_folder)
    tokens_BT = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        ours = reward.backbone(input_ids=tokens_BT).last_hidden_state
        theirs = policy(input_ids=tokens_BT, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_a_soft_cap_on_the_logits_is_refused(tmp_path: Path) -> None:
    # Small logits hide a cap of 30: 30 * tanh(0.3 / 30) is 0.29999.
    folder = write(Gemma2Config(**SIZES, final_logit_softcapping=30.0), tmp_path / "gemma2")
    with pytest.raises(InvalidInput, match="a plain unembedding"):
        load_policy(folder)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="model folder"):
        load_policy(tmp_path)


def test_a_round_trip_keeps_every_weight_and_every_tokenizer_byte(
    policy_folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    save_policy(load_policy(policy_folder), load_tokenizer(policy_folder), copy)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (copy / name).read_bytes() == (policy_folder / name).read_bytes()
    assert sorted(p.name for p in copy.iterdir()) == sorted(p.name for p in policy_folder.iterdir())
    before, after = load_policy(policy_folder).state_dict(), load_policy(copy).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert canary_of(copy) == canary_of(policy_folder)


def test_the_canary_is_what_hugging_face_says(tiny: Path) -> None:
    canary, model = canary_of(tiny), load_policy(tiny)
    ids = list(canary.token_ids)
    loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    assert -sum(canary.logprobs) / len(canary.logprobs) == pytest.approx(loss, abs=1e-5)


def test_the_tokenizer_files_of_a_model_from_outside_stay_as_they_are(
    tiny: Path, tmp_path: Path
) -> None:
    """A server refuses a release whose tokenizer files differ from those of the running model."""
    settings = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (tiny / "tokenizer_config.json").write_text(
        json.dumps({**settings, "chat_template": "{{ 1 }}"})
    )
    (tiny / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}')
    (tiny / "merges.txt").write_text("#version: 0.2\n")
    save_policy(load_policy(tiny), load_tokenizer(tiny), tmp_path / "policy")
    RewardModel.from_policy(tiny).save(tmp_path / "reward", load_tokenizer(tiny))
    checkpoint.check_interchangeable(checkpoint.read(tiny), checkpoint.read(tmp_path / "policy"))
    for name in ("tokenizer_config.json", "special_tokens_map.json", "merges.txt"):
        assert (tmp_path / "reward" / name).read_bytes() == (tiny / name).read_bytes()
    assert not (tmp_path / "policy" / "chat_template.jinja").exists()

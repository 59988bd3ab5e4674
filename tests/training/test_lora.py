"""Adapters in training are peft's, change nothing else, and go on where they were."""

import math
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from contracts.errors import InvalidInput
from tests.training.architectures import ARCHITECTURES
from tests.training.letters import (
    TorchSampler,
    World,
    demonstrations,
    documents,
    prompts,
    rankings,
)
from tests.training.test_backbone import difference, trees
from training import lora
from training.backbone import hidden_states
from training.checkpoint import Checkpoint
from training.config import DpoConfig, LoraConfig, PpoConfig, RewardModelConfig, SftConfig
from training.dpo import train_dpo
from training.metrics import Metrics, read_metrics
from training.model import (
    backbone_of,
    load_policy,
    load_tokenizer,
    load_trainable,
    pack_pairs,
    packed_loss,
    save_policy,
    whole_weights,
)
from training.networks import load_networks
from training.packing import Packed
from training.ppo import train_ppo
from training.reward_head import RewardModel
from training.reward_model import mean_score, train_reward_model
from training.sft import train_sft

STATES, GRADIENTS = 2e-5, 1e-4
LORA = LoraConfig(rank=4, alpha=8)
FAMILIES = ("llama", "llama-tied", "qwen2", "qwen3", "gpt2", "gpt-neox")


def causal(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(ARCHITECTURES[name]()).eval()
    return model


def adapted(name: str) -> PreTrainedModel:
    """With numbers in B too, so that what is added is not 0."""
    model = causal(name)
    lora.adapt(model, LORA, seed=1)
    torch.manual_seed(2)
    with torch.no_grad():
        for n, x in model.named_parameters():
            if n.endswith(lora.B):
                x.normal_(std=0.1)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_states_and_gradients_are_those_of_pefts_own_forward_pass(name: str) -> None:
    model: Any = adapted(name)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=model.peft_config["default"].target_modules,
        fan_in_fan_out=name == "gpt2",
    )
    theirs: Any = peft.get_peft_model(causal(name), config).eval()
    own: dict[str, Any] = dict(model.named_parameters())
    names = [n for n, x in own.items() if x.requires_grad]
    with torch.no_grad():
        for n, x in theirs.named_parameters():
            x.copy_(own[n.removeprefix(lora.PREFIX)])
    batch = trees((2, 5, 0))
    packed = Packed(batch)
    rows = [[*t.prompt, *r] for t in batch for r in t.responses or [[]]]
    inside = theirs.base_model.model.base_model
    wanted = torch.stack([inside(torch.tensor([r])).last_hidden_state[0, -1] for r in rows])
    found = hidden_states(backbone_of(model), packed, packed.ends)
    torch.testing.assert_close(found, wanted, atol=STATES, rtol=STATES)
    direction = torch.randn(found.shape)
    (found * direction).sum().backward()
    (wanted * direction).sum().backward()
    other = dict(theirs.named_parameters())
    assert {n for n, x in other.items() if x.requires_grad} == {lora.PREFIX + n for n in names}
    pairs = [(own[n].grad, other[lora.PREFIX + n].grad) for n in names]
    assert difference([a for a, _ in pairs], [b for _, b in pairs]) < GRADIENTS
    assert all(x.grad is None for n, x in own.items() if n not in names)
    plain = hidden_states(backbone_of(causal(name)), packed, packed.ends)
    assert (found - plain).abs().max() > 1e-2  # so that the adapter was seen at all


def test_loss_over_a_frozen_unembedding_is_the_full_softmaxs() -> None:
    model: Any = adapted("llama")
    row = [5, 6, 7, 8, 9]
    loss, _ = packed_loss(model, *pack_pairs([(row[:2], row[2:])]), lambda x, _: -x)
    loss.backward()
    ours = [x.grad.clone() for x in model.parameters() if x.requires_grad]
    model.zero_grad()
    logits_TV = model(input_ids=torch.tensor([row])).logits[0, 1:-1]
    wanted = F.cross_entropy(logits_TV, torch.tensor(row[2:]), reduction="sum")
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert difference(ours, [x.grad for x in model.parameters() if x.requires_grad]) < GRADIENTS
    assert model.lm_head.weight.grad is None


@pytest.mark.parametrize("name", FAMILIES)
def test_merged_weights_compute_what_the_adapted_model_does(name: str) -> None:
    model, plain = adapted(name), causal(name)
    tokens_BT = torch.tensor([[5, 6, 7, 8]])
    wanted = model(input_ids=tokens_BT).logits
    weights = whole_weights(model)
    assert weights.keys() == plain.state_dict().keys()
    plain.load_state_dict(weights)
    torch.testing.assert_close(plain(input_ids=tokens_BT).logits, wanted, atol=1e-5, rtol=1e-5)


def test_weights_without_an_adapter_are_the_models_own() -> None:
    model = causal("llama")
    own = model.state_dict()
    assert all(whole_weights(model)[name].data_ptr() == x.data_ptr() for name, x in own.items())


def test_a_new_adapter_is_its_seeds_and_leaves_other_random_numbers_alone() -> None:
    drawn = []
    for seed, other in ((1, 5), (1, 6), (2, 5)):
        model = causal("llama")
        torch.manual_seed(other)
        lora.adapt(model, LORA, seed)
        assert torch.equal(
            torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(other))
        )
        drawn.append([x for x in model.parameters() if x.requires_grad])
    same, another = (
        [torch.equal(a, b) for a, b in zip(drawn[0], d, strict=True)] for d in drawn[1:]
    )
    assert all(same) and not all(another)


def test_layers_by_name_and_one_that_is_not_there() -> None:
    model = causal("llama")
    lora.adapt(model, LoraConfig(rank=2, target_modules=("q_proj", "v_proj")), seed=0)
    adapted_layers = {n.split(".")[-4] for n, x in model.named_parameters() if x.requires_grad}
    assert adapted_layers == {"q_proj", "v_proj"}
    with pytest.raises(InvalidInput, match=r"lora.target_modules: expected .*q_proj.* got 'w1'"):
        lora.adapt(causal("llama"), LoraConfig(target_modules=("q_proj", "w1")), seed=0)
    with pytest.raises(InvalidInput, match=r"lora.target_modules: .* got 'lm_head'"):
        lora.adapt(causal("llama"), LoraConfig(target_modules=("lm_head",)), seed=0)


def test_a_twin_shares_what_is_frozen_and_only_that() -> None:
    model = adapted("llama-tied")
    other = lora.twin(model)
    mine, its = dict(model.named_parameters()), dict(other.named_parameters())
    assert mine.keys() == its.keys()
    assert all((its[n] is x) == (not x.requires_grad) for n, x in mine.items())
    assert all(torch.equal(its[n], x) for n, x in mine.items())


def test_a_frozen_twin_computes_the_same_while_the_model_learns() -> None:
    tokens_BT = torch.tensor([[5, 6, 7, 8]])
    new = causal("llama")
    lora.adapt(new, LORA, seed=1)
    for model, off in ((adapted("llama"), False), (new, True)):
        before = model(input_ids=tokens_BT).logits.detach()
        other = lora.frozen_twin(model)
        layers = [layer for layer in other.modules() if hasattr(layer, "lora_B")]
        assert {layer.disable_adapters for layer in layers} == {off}
        assert not any(x.requires_grad for x in other.parameters())
        with torch.no_grad():
            for x in model.parameters():
                if x.requires_grad:
                    x.add_(0.1)
        assert torch.equal(other(input_ids=tokens_BT).logits, before)
        assert not torch.equal(model(input_ids=tokens_BT).logits, before)


def sft(world: World, parent: Path, folder: Path, config: LoraConfig | None = LORA) -> None:
    settings = SftConfig(epochs=1, batch=8, learning_rate=1e-2, dropout=0.0, lora=config)
    with closing(Metrics(folder.with_name(f"{folder.name}-metrics"))) as metrics:
        train_sft(settings, parent, demonstrations(24, 5), [], folder, metrics)


def test_saved_are_merged_weights_and_an_adapter_that_peft_reads(
    world: World, tmp_path: Path
) -> None:
    before = (world.base / "model.safetensors").read_bytes()
    sft(world, world.base, tmp_path / "sft")
    assert (world.base / "model.safetensors").read_bytes() == before
    assert lora.base_of(tmp_path / "sft") == world.base.resolve()
    adapter = lora.adapter_over(tmp_path / "sft", world.base)
    assert adapter is not None
    theirs: Any = peft.PeftModel.from_pretrained(load_policy(world.base), adapter).eval()
    base, saved = load_policy(world.base).state_dict(), load_policy(tmp_path / "sft")
    tokens_BT = torch.tensor([[5, 6, 7, 8]])
    wanted = theirs(input_ids=tokens_BT).logits
    torch.testing.assert_close(
        saved.eval()(input_ids=tokens_BT).logits, wanted, atol=1e-5, rtol=1e-5
    )
    changed = {n for n, x in saved.state_dict().items() if not torch.equal(x, base[n])}
    assert changed == {n for n in base if n.endswith("_proj.weight")}


def test_training_goes_on_from_the_adapter_or_starts_one_of_the_merged_weights(
    world: World, tmp_path: Path
) -> None:
    first, on, other, full = (tmp_path / n for n in ("first", "on", "other", "full"))
    sft(world, world.base, first)
    start = load_trainable(first, LORA, seed=3)
    found = load_file(lora._adapter(first) / lora.WEIGHTS)
    for name, x in start.named_parameters():
        if x.requires_grad:
            assert torch.equal(x, found[lora.PREFIX + name.replace(".default.", ".")])
    sft(world, first, on)
    assert lora.base_of(on) == world.base.resolve()
    for config in (LORA.model_copy(update={"rank": 2}), LORA.model_copy(update={"alpha": 4})):
        sft(world, first, other, config)
        assert lora.base_of(other) == first.resolve()
        assert lora.adapter_over(other, world.base) is None
        shutil.rmtree(other)
    sft(world, first, full, None)
    assert lora.base_of(full) is None


def test_an_adapter_that_servers_do_not_take_is_released_merged(
    world: World, tmp_path: Path
) -> None:
    """GPT-2's layers hold their weights as (in, out)."""
    base, folder = tmp_path / "base", tmp_path / "policy"
    save_policy(causal("gpt2"), load_tokenizer(world.base), base)
    save_policy(load_trainable(base, LORA, seed=1), load_tokenizer(base), folder)
    assert lora.base_of(folder) == base.resolve()
    assert lora.adapter_over(folder, base) is None


def test_a_checkpoint_holds_the_adapter_alone(tmp_path: Path) -> None:
    model = adapted("llama")
    checkpoint = Checkpoint(tmp_path / "a", SftConfig(checkpoint_every=1), [], {"model": model})
    checkpoint.save(1)
    names = FileSystemReader(checkpoint.saved()[-1]).read_metadata().state_dict_metadata
    trained = {f"model.{n}" for n, x in model.named_parameters() if x.requires_grad}
    assert {n for n in names if n.startswith("model.")} == trained


def test_dpo_trains_an_adapter_against_the_policy_it_began_as(world: World, tmp_path: Path) -> None:
    config = DpoConfig(epochs=3, prompts_per_batch=8, learning_rate=1e-2, lora=LORA)
    with closing(Metrics(tmp_path / "metrics")) as metrics:
        train_dpo(config, world.sft, rankings(48, seed=3), tmp_path / "dpo", metrics)
    rows = read_metrics(tmp_path / "metrics")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert sum(r["loss"] for r in rows[-3:]) / 3 < 0.6
    assert lora.adapter_over(tmp_path / "dpo", world.sft) is not None


def test_a_reward_model_learns_with_an_adapter_and_is_saved_whole(
    world: World, tmp_path: Path
) -> None:
    config = RewardModelConfig(epochs=6, prompts_per_batch=16, learning_rate=1e-2, lora=LORA)
    with closing(Metrics(tmp_path / "metrics")) as metrics:
        rows, zero = rankings(128, seed=3), demonstrations(32, seed=4)
        train_reward_model(config, world.sft, rows, zero, tmp_path / "reward", metrics)
    accuracy = [row["accuracy"] for row in read_metrics(tmp_path / "metrics")]
    assert sum(accuracy[-4:]) / 4 > 0.85
    model = RewardModel.load(tmp_path / "reward")
    assert mean_score(model, [[5, 6, 7]]) == mean_score(model, [[5, 6, 7]])
    assert load_policy(world.sft).state_dict().keys() - {"lm_head.weight"} == {
        f"model.{n}" for n in model.backbone.state_dict()
    }


PPO = PpoConfig(
    episodes=32 * 12,
    batch=32,
    minibatch=32,
    policy_rate=1e-2,
    value_rate=1e-2,
    warmup_iterations=0,
    beta=0.1,
    ptx_coefficient=0.5,
    ptx_examples_per_episode=1,
    ptx_row_tokens=16,
    ema=0.5,
    max_response_tokens=8,
    lora=LORA,
)


def test_ppo_with_an_adapter_raises_the_reward_over_an_untouched_base(
    world: World, tmp_path: Path
) -> None:
    sampler: Any = TorchSampler(world.sft)
    before = (world.sft / "model.safetensors").read_bytes()
    with closing(Metrics(tmp_path / "metrics")) as metrics:
        texts = documents(60, seed=20)
        train_ppo(
            PPO, world.sft, world.reward, prompts(40), texts, sampler, tmp_path / "ppo", metrics
        )
    rows = read_metrics(tmp_path / "metrics")
    assert rows[0]["kl"] == 0.0 and rows[0]["ratio_max"] == pytest.approx(1, abs=1e-6)
    assert max(row["logprob_mismatch_max"] for row in rows) < 1e-4
    first, last = (sum(r["reward"] for r in part) / 3 for part in (rows[:3], rows[-3:]))
    print("reward", first, last, "kl", rows[-1]["kl"])
    assert last > first + 0.5
    assert (world.sft / "model.safetensors").read_bytes() == before
    assert lora.adapter_over(tmp_path / "ppo", world.sft) is not None


def test_the_four_models_of_ppo_hold_two_bases_and_learn_in_adapters(world: World) -> None:
    nets = load_networks(world.sft, world.reward, adapter=LORA)
    assert nets.value is not None
    for trained, fixed in ((nets.policy, nets.reference), (nets.value, nets.reward)):
        its = dict(fixed.named_parameters())
        shared = {n for n, x in trained.named_parameters() if its[n] is x}
        learned = {n for n, x in trained.named_parameters() if x.requires_grad}
        assert shared == its.keys() - learned
        assert all(".lora_" in n or n.startswith("head.") for n in learned)
        assert not any(x.requires_grad for x in fixed.parameters())

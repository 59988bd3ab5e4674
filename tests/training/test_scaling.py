"""The formulas of docs/scaling.md, held to what real models take."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from contracts.errors import InvalidInput
from tests.docs.scaling import PLANS, SHAPES, TRAINED, Shape
from tests.training.letters import (
    PRETRAIN,
    TorchSampler,
    World,
    demonstrations,
    documents,
    prompts,
    rankings,
)
from training.backbone import hidden_states, recompute_layers
from training.config import PpoConfig, RewardModelConfig, SftConfig
from training.likelihood import accumulate_likelihood
from training.metrics import Metrics
from training.model import load_tokenizer, save_policy
from training.optimizer import adam
from training.packing import Packed, Tree
from training.ppo import train_ppo
from training.pretrain import pretrain
from training.reward_model import train_reward_model
from training.rollout import Sampler
from training.sft import set_residual_dropout, train_sft

SMALL = Shape(hidden=48, ffn=80, layers=3, heads=4, key_heads=2, head=12, vocab=300)


def model(shape: Shape) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        head_dim=shape.head,
    )
    made: LlamaForCausalLM = LlamaForCausalLM(config)
    return made


@pytest.mark.parametrize("size", SHAPES)
def test_weights_are_counted_exactly(size: str) -> None:
    with torch.device("meta"):
        large = model(SHAPES[size])
    assert sum(p.numel() for p in large.parameters()) == SHAPES[size].parameters


def test_a_trained_weight_is_sixteen_bytes() -> None:
    small = model(SMALL)
    optimizer = adam(small.parameters(), 1e-3)
    small(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimizer.step()
    tensors: list[Any] = [t for p in small.parameters() for t in (p, p.grad)]
    tensors += [t for s in optimizer.state.values() for t in s.values() if t.numel() > 1]
    taken = sum(t.numel() * t.element_size() for t in tensors)
    assert taken == TRAINED * SMALL.parameters


def kept(shape: Shape, tokens: int, recompute: bool = False) -> int:
    """Numbers that a forward pass over one sequence keeps for the backward pass, weights aside."""
    backbone = model(shape).model
    recompute_layers(backbone, recompute)
    weights = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
    found: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage
        return tensor

    packed = Packed([Tree(range(tokens))])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden_states(backbone, packed, torch.arange(tokens))
    held: int = sum(storage.nbytes() for storage in found.values())
    return held // 4


@pytest.mark.parametrize("tokens", [16, 33])
def test_what_a_layer_keeps_for_its_backward_pass(tokens: int) -> None:
    deeper = Shape(**{**vars(SMALL), "layers": SMALL.layers + 1})
    of_a_layer = kept(deeper, tokens) - kept(SMALL, tokens)
    assert of_a_layer == pytest.approx(tokens * SMALL.kept(scores=tokens), rel=0.01)


def test_a_recomputed_layer_keeps_its_input_alone() -> None:
    deeper = Shape(**{**vars(SMALL), "layers": SMALL.layers + 1})
    of_a_layer = kept(deeper, 16, recompute=True) - kept(SMALL, 16, recompute=True)
    assert of_a_layer == 16 * SMALL.hidden


def test_recomputed_layers_have_the_same_gradients_and_the_same_dropout() -> None:
    small, found = model(SMALL), []
    set_residual_dropout(small, 0.2)
    small.train()
    for recompute in (False, True):
        recompute_layers(small.model, recompute)
        torch.manual_seed(0)
        accumulate_likelihood(small, [([1, 2], [3, 4, 5]), ([6], [7])], "bf16")
        found.append([p.grad for p in small.parameters()])
        small.zero_grad()
    for ours, theirs in zip(*found, strict=True):
        assert ours is not None and theirs is not None and torch.equal(ours, theirs)


@pytest.mark.parametrize("training", [True, False])
def test_recomputing_repeats_random_numbers_where_there_is_dropout_and_else_leaves_them_alone(
    training: bool,
) -> None:
    small, drawn = model(SMALL).train(training), []
    recompute_layers(small.model, wanted=True)
    for layer in small.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda *_: drawn.append(torch.rand(1).item()))
    accumulate_likelihood(small, [([1, 2], [3, 4, 5])], "fp32")
    assert len(drawn) == 2 * SMALL.layers
    assert (len(set(drawn)) < len(drawn)) == training


def sft_of(folder: Path, world: World, metrics: Metrics) -> None:
    config, rows = SftConfig(recompute=True, dropout=0.0), demonstrations(4, 5)
    train_sft(config, folder, rows, [], folder / "new", metrics)


def reward_model_of(folder: Path, world: World, metrics: Metrics) -> None:
    config, rows = RewardModelConfig(recompute=True), rankings(4, seed=3)
    train_reward_model(config, folder, rows, demonstrations(4, 5), folder / "new", metrics)


def policy_of(folder: Path, world: World, metrics: Metrics) -> None:
    config, sampler = PpoConfig(recompute=True), cast("Sampler", TorchSampler(world.sft))
    rows, texts = prompts(4), documents(60, seed=20)
    train_ppo(config, folder, world.reward, rows, texts, sampler, folder / "new", metrics)


@pytest.mark.parametrize("stage", [sft_of, reward_model_of, policy_of])
def test_a_stage_refuses_to_recompute_layers_that_are_not_computed_here(
    stage: Callable[[Path, World, Metrics], None], world: World, tmp_path: Path
) -> None:
    sizes = GPT2Config(vocab_size=320, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    folder = tmp_path / "gpt2"
    save_policy(AutoModelForCausalLM.from_config(sizes), load_tokenizer(world.base), folder)
    refused = pytest.raises(InvalidInput, match="recompute: expected false for a GPT2Model")
    with closing(Metrics(tmp_path / "metrics")) as metrics, refused:
        stage(folder, world, metrics)


def test_pretraining_computes_its_layers_twice_where_it_should(tmp_path: Path) -> None:
    computed = []
    for recompute in (False, True):
        layers: list[LlamaMLP] = []
        hook = register_module_forward_pre_hook(
            lambda m, _, layers=layers: layers.append(m) if isinstance(m, LlamaMLP) else None
        )
        config = PRETRAIN.model_copy(update={"steps": 3, "recompute": recompute})
        with closing(Metrics(tmp_path / f"metrics-{recompute}")) as metrics:
            pretrain(config, documents(60, seed=0), tmp_path / str(recompute), metrics)
        hook.remove()
        computed.append(len(layers))
    assert computed == [3 * PRETRAIN.layers, 3 * 2 * PRETRAIN.layers]
    files = [tmp_path / str(recompute) / "model.safetensors" for recompute in (False, True)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_kv_cache_is_counted_exactly() -> None:
    cache = model(SMALL)(input_ids=torch.tensor([[1, 2, 3, 4, 5]]), use_cache=True).past_key_values
    held = sum(
        t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values)
    )
    assert held == 5 * SMALL.kv_cache(width=4)


def test_seventy_billion_weights_fit_on_sixty_four_gpus_and_not_on_eight() -> None:
    assert [name for name, plan in PLANS.items() if not plan.fits] == ["70B on 8"]
    # By hand: 40 bytes for each of 6.738 billion weights, over 8 GPUs.
    assert PLANS["7B on 8"].state == pytest.approx(33.69e9, rel=1e-3)
    # 6.738e9 weights less 131e6 of the embedding, twice, and 2 * 32 * 4096 * 512 for attention.
    assert SHAPES["7B"].forward(512) == pytest.approx(13.35e9, rel=2e-3)

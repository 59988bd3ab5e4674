"""The formulas of docs/scaling.md, held to what real models take."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.docs.scaling import PLANS, SHAPES, TRAINED, Shape
from training.backbone import hidden_states
from training.optimizer import adam
from training.packing import Packed, Tree

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


def kept(shape: Shape, tokens: int) -> int:
    """Numbers that a forward pass over one sequence keeps for the backward pass, weights aside."""
    backbone = model(shape).model
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

"""Hidden states of packed trees from any Hugging Face causal model.

Shapes: N tokens, M of them asked for, H width of the model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from contracts.errors import InvalidInput
from training import llama
from training.attention import attention, seen_by
from training.data import pad
from training.device import across, device_of
from training.packing import Packed, Tree

PACKED = "packed"
# What a model must give alike, packed and row by row, before it is trusted to be packed.
PROBE = Packed([Tree([1, 2, 3], [[4, 5], [6, 7, 8]]), Tree([2, 1, 4, 3])])
TOLERANCE = 1e-2


def hidden_states(backbone: PreTrainedModel, packed: Packed, at_M: Tensor) -> Tensor:
    """The last hidden states, [M, H], at the tokens `at_M` of `packed`, in any order. Both come on
    the processor, whatever the model is on.

    Every token goes through the model once, where the model can do so: its attention goes through
    Hugging Face's attention interface and knows nothing but a scale. Another model (ALiBi, soft
    caps, sliding windows, recurrence) sees each sequence as a padded row of its own.
    """
    asked, place_M = at_M.unique(return_inverse=True)
    if not torch.equal(asked, at_M):
        states = hidden_states(backbone, packed, asked)
        return states.index_select(0, across(place_M, states.device))
    if llama.is_llama(backbone):
        return llama.hidden_states(backbone, packed, at_M)
    if packs(backbone):
        states = _in_one_row(backbone, packed)
        return states.index_select(0, across(at_M, states.device))
    return _row_by_row(backbone, packed, at_M)


def recompute_layers(backbone: PreTrainedModel, wanted: bool) -> None:
    """Keep of each decoder layer its input alone for the backward pass, if `wanted`.

    Raises InvalidInput on a model whose layers are not computed here: without dropout its own would
    not do it.
    """
    if wanted and not llama.is_llama(backbone):
        raise InvalidInput("recompute", f"false for a {type(backbone).__name__}", wanted)
    if wanted:
        backbone.gradient_checkpointing_enable()


_PACKS: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def packs(backbone: PreTrainedModel) -> bool:
    """Whether the model gives the same hidden states packed as row by row; tried once a model."""
    if backbone not in _PACKS:
        training = backbone.training
        backbone.eval()
        _PACKS[backbone] = _try_packing(backbone)
        backbone.train(training)
    return _PACKS[backbone]


@torch.no_grad()
def _try_packing(backbone: PreTrainedModel) -> bool:
    if not backbone._supports_attention_backend:  # noqa: SLF001  the library's own flag
        return False
    at_N = torch.arange(len(PROBE))
    try:
        together, apart = _in_one_row(backbone, PROBE), _row_by_row(backbone, PROBE, at_N)
    except _CannotPackError:
        return False
    return bool((together - apart).norm() <= TOLERANCE * apart.norm())


def _in_one_row(backbone: PreTrainedModel, packed: Packed) -> Tensor:
    device = device_of(backbone)
    # A mask of four dimensions is left alone; what may be seen goes by `seen`.
    described = packed.tokens_N, packed.positions_N, torch.ones(1, 1, 1, 1)
    tokens_N, positions_N, mask = across(described, device)
    with _packed_attention(backbone):
        hidden: Tensor = backbone(
            input_ids=tokens_N[None],
            position_ids=positions_N[None],
            attention_mask=mask,
            use_cache=False,
            seen=seen_by(packed, None, device),
        ).last_hidden_state[0]
    return hidden


def _row_by_row(backbone: PreTrainedModel, packed: Packed, at_M: Tensor) -> Tensor:
    rows, row_N, column_N = packed.rows()
    described = pad(rows)[0], row_N[at_M], column_N[at_M]
    tokens_BT, row_M, column_M = across(described, device_of(backbone))
    hidden_BTH: Tensor = backbone(input_ids=tokens_BT, use_cache=False).last_hidden_state
    return hidden_BTH[row_M, column_M]


@contextmanager
def _packed_attention(backbone: PreTrainedModel) -> Iterator[None]:
    before = backbone.config._attn_implementation  # noqa: SLF001  there is no other way to it
    backbone.config._attn_implementation = PACKED  # noqa: SLF001
    try:
        yield
    finally:
        backbone.config._attn_implementation = before  # noqa: SLF001


class _CannotPackError(Exception):
    """The model's attention is more than a scaled softmax over all that came before."""


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Hugging Face's attention interface: [1, heads, N, D] in, [1, N, heads, D] out."""
    if any(settings.get(name) is not None for name in ("softcap", "s_aux", "sliding_window")):
        raise _CannotPackError
    scale = settings.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return attention(query[0], key[0], value[0], settings["seen"], scale)[None], None


AttentionInterface.register(PACKED, _attend)

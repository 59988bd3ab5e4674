"""TwinWeights: the methods that our engine adapter adds to vLLM's worker, to stage and swap
weights.

A twin is a second copy of the model's modules that never runs. It is filled in the background and
packed exactly as vLLM packs a model that it loads; a swap then exchanges the two sets of weights,
so that the twin holds the old ones and a second swap takes the first one back. Buffers, KV cache
and module objects of the live model stay where they are.
"""

import copy
import gc
import multiprocessing
import multiprocessing.process
import os
import threading
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.model_executor.model_loader.utils import (
    initialize_model,
    process_weights_after_loading,
)
from vllm.utils.torch_utils import set_default_torch_dtype

from contracts.errors import InstructloopError
from serving import checkpoint, push

Weights = Generator[tuple[str, torch.Tensor], None, None]

READY, STAGING = "ready", "staging"


def _end_with_parent(parent: multiprocessing.process.BaseProcess) -> None:
    """Wait for the server's process to end, however it does: killed, it takes no child with it."""
    parent.join()
    os._exit(1)


# vLLM imports this module in its child process once, before the model is loaded. In a process group
# of its own: Ctrl-C is for the server, which has answers to finish; vLLM would break them off.
if (_parent := multiprocessing.parent_process()) is not None:
    os.setpgrp()
    threading.Thread(target=_end_with_parent, args=(_parent,), daemon=True).start()


class TwinWeights:
    """Mixed into the worker by `worker_extension_cls`, so names must not clash with the worker's
    own.
    """

    # What the worker brings.
    vllm_config: Any
    model_runner: Any
    device: torch.device

    _twin: nn.Module | None = None
    _twin_state: str = ""

    def twin_stage(self, folder: str) -> None:
        """Build a twin and start to fill it from the safetensors files in `folder`; ask
        `twin_state` how it goes.
        """
        self._twin_begin(checkpoint.finite_tensors(Path(folder)))

    def twin_receive(self, offer: str, bound_s: float) -> None:
        """The same with what a trainer sends; `offer` is the JSON of a push.Offer."""
        offered = push.Offer.model_validate_json(offer)
        self._twin_begin(push.weights(offered, bound_s, self.device))

    def _twin_begin(self, weights: Weights) -> None:
        """Construction sets process-wide defaults (dtype, device, current config), so it happens
        here, between two steps of the engine; reading and packing touch the twin alone and run in
        a thread.
        """
        self.twin_discard()
        config = copy.copy(self.vllm_config)
        config.compilation_config = copy.copy(config.compilation_config)
        # Attention layers register themselves by name; in the live registry they would replace the
        # live ones.
        config.compilation_config.static_forward_context = {}
        config.compilation_config.static_all_moe_layers = []
        with set_default_torch_dtype(config.model_config.dtype), self.device:
            twin = initialize_model(config)
        self._twin, self._twin_state = twin, STAGING
        threading.Thread(target=self._twin_fill, args=(twin, weights), daemon=True).start()

    def twin_state(self) -> str:
        """`staging`, `ready`, or why it failed."""
        return self._twin_state

    def twin_swap(self) -> None:
        """Exchange the weights of the live model and of the twin."""
        if self._twin is None or self._twin_state != READY:
            raise RuntimeError(f"nothing to swap in: {self._twin_state or 'no twin'}")
        live = self.model_runner.get_model()
        if self.device.type == "cpu":
            _exchange_objects(live, self._twin)
        else:
            _exchange_values(live, self._twin)

    def twin_discard(self) -> None:
        """Free the twin and the weights that it holds."""
        self._twin, self._twin_state = None, ""
        gc.collect()

    @torch.no_grad()
    def _twin_fill(self, twin: nn.Module, weights: Weights) -> None:
        try:
            with closing(weights), _aside(self.device):
                twin.load_weights(weights)  # type: ignore[operator]
                for _ in weights:  # what the model did not ask for is checked all the same
                    pass
                process_weights_after_loading(twin, self.vllm_config.model_config, self.device)
            twin.eval()
            _check_same_layout(self.model_runner.get_model(), twin)
            state = READY
        except InstructloopError as e:
            state = str(e)
        except Exception as e:  # noqa: BLE001  reported to the swapper, which refuses the release
            state = f"{type(e).__name__}: {e}"
        if self._twin is twin:
            self._twin_state = state


@contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    """GPU: on a stream of its own, so that no step of the live model waits for a copy to the twin,
    or for a trainer. Everything is there when it ends.
    """
    if device.type != "cuda":
        yield
        return
    own = torch.cuda.Stream(device)
    own.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(own):
        yield
    own.synchronize()


def _check_same_layout(live: nn.Module, twin: nn.Module) -> None:
    """Both must share weights between the same modules, or an exchange by module would mix them."""
    if _layout(live) != _layout(twin):
        raise ValueError("expected the parameters of the running model, got another layout")


def _layout(model: nn.Module) -> list[tuple[str, str, tuple[int, ...], bool]]:
    """Parameter name, name of the first parameter that shares its tensor, shape, and whether it is
    packed.
    """
    first: dict[int, str] = {}
    rows = []
    for path, module in model.named_modules():
        packed = "cpu_linear" in vars(module)
        for adapted, parameter in module.named_parameters(path, recurse=False):
            name = adapted.replace(".base_layer.", ".")
            same_as = first.setdefault(id(parameter), name)
            rows.append((name, same_as, tuple(parameter.shape), packed))
    return rows


def _exchange_objects(live: nn.Module, twin: nn.Module) -> None:
    """CPU: linear layers keep their weights inside `cpu_linear`, packed for oneDNN, so objects
    change hands.
    """
    for ours, theirs in zip(_own_modules(live), _own_modules(twin), strict=True):
        ours._parameters, theirs._parameters = theirs._parameters, ours._parameters
        if "cpu_linear" in vars(ours):
            ours.cpu_linear, theirs.cpu_linear = theirs.cpu_linear, ours.cpu_linear


def _own_modules(model: nn.Module) -> list[nn.Module]:
    """Without those that vLLM puts around the live model's layers, so that adapters can add to
    them; a twin has none.
    """
    return [module for module in model.modules() if not isinstance(module, BaseLayerWithLoRA)]


@torch.no_grad()
def _exchange_values(live: nn.Module, twin: nn.Module) -> None:
    """GPU: captured graphs hold the addresses of the live tensors, so values change hands. Not run
    yet on a GPU.
    """
    for ours, theirs in zip(live.parameters(), twin.parameters(), strict=True):
        old = ours.clone()
        ours.copy_(theirs)
        theirs.copy_(old)

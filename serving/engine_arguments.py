"""How the adapter runs vLLM: the words of its command line, and its environment."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from contracts.prompt import PLAIN_CHAT_TEMPLATE
from serving import lora


@dataclass(frozen=True)
class EngineOptions:
    """How much the engine may use. `max_model_len` bounds prompt and answer together, in tokens;
    models that were made for less get less.
    """

    max_model_len: int = 1024
    max_num_seqs: int = 64
    kv_cache_gib: int = 1
    dtype: str = "float32"
    # Without compilation: a start is 10 to 100 s shorter, an answer about a fifth slower.
    enforce_eager: bool = True
    # vLLM's name of the parser for tool calls that the model writes by itself; empty for none.
    tool_call_parser: str = ""
    # Adapters that may be loaded at a time; with 0 the engine can load none, and computes nothing
    # for them. And the highest rank of one, of those that vLLM knows.
    adapter_slots: int = 0
    max_adapter_rank: int = 16


def engine_arguments(options: EngineOptions, folder: Path, model: str) -> list[str]:
    """The words of vLLM's command line with which it runs the model in `folder` as this adapter
    does.
    """
    arguments = {
        "--served-model-name": model,
        "--load-format": "safetensors",
        "--dtype": options.dtype,
        "--max-model-len": str(_context(folder, options.max_model_len)),
        "--max-num-seqs": str(options.max_num_seqs),
        "--worker-extension-cls": "serving.engine_worker.TwinWeights",
    }
    if not _brings_chat_template(folder):
        arguments["--chat-template"] = PLAIN_CHAT_TEMPLATE
    if options.tool_call_parser:
        arguments["--tool-call-parser"] = options.tool_call_parser
    pairs = [word for pair in arguments.items() for word in pair]
    eager = ["--enforce-eager"] if options.enforce_eager else []
    tools = ["--enable-auto-tool-choice"] if options.tool_call_parser else []
    return [*pairs, *eager, *tools, *_adapter_arguments(options, folder)]


def _adapter_arguments(options: EngineOptions, folder: Path) -> list[str]:
    if not options.adapter_slots:
        return []
    names = {layer.rpartition(".")[2] for layer in lora.linear_layers(folder)}
    slots = str(options.adapter_slots + 1)  # and the one that changes nothing
    rank = str(options.max_adapter_rank)
    bounds = ["--enable-lora", "--max-loras", slots, "--max-lora-rank", rank]
    return [*bounds, "--lora-target-modules", *sorted(names)]


def environment(options: EngineOptions) -> dict[str, str]:
    """What vLLM and its child processes read from their environment."""
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(options.kv_cache_gib),
        # Model and worker in one child process: the third process would import vLLM once more, 15
        # s.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(max(1, math.ceil((os.cpu_count() or 1) / 2))),
    }


def text_start(folder: Path) -> list[int]:
    """The token before a text: the model's first one or, where it has none, the one that ends a
    text.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    for name in ("bos_token_id", "eos_token_id"):
        token = config.get(name)
        if token is not None:
            return [int(token[0] if isinstance(token, list) else token)]
    return []


def _brings_chat_template(folder: Path) -> bool:
    """Whether the tokenizer has a template of its own, in any of the places where Hugging Face
    keeps one.
    """
    if any((folder / name).exists() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and bool(json.loads(config.read_text("utf-8")).get("chat_template"))


def _context(folder: Path, wanted: int) -> int:
    """Tokens that the model in `folder` was made for, at most `wanted`."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    known = (config.get(name) for name in ("max_position_embeddings", "n_positions"))
    return min([wanted, *(int(n) for n in known if n is not None)])

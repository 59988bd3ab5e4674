"""Named settings of the stages: InstructGPT's as it trained its policies, and those of a model of a
few million weights on two cores.
"""

from typing import Any, Literal

Preset = Literal["paper-1.3b", "paper-6b", "tiny"]
Sections = dict[str, dict[str, Any]]

# Every number of arXiv 2203.02155 that a stage takes; C.1 gives one set for 1.3B and 6B. The SFT is
# that which PPO starts from (C.3), 2 epochs with 10 % pretraining text; the defaults of SftConfig
# are of the SFT models that PPO was compared with (C.1), 16 epochs.
PAPER: Sections = {
    "sft": {
        "epochs": 2,
        "batch": 32,
        "learning_rate": 9.65e-6,
        "final_rate_share": 0.1,
        "dropout": 0.2,
        "pretraining_share": 0.1,
        "choose_by_reward": True,
        "max_prompt_tokens": 1024,
        "max_response_tokens": 1024,
    },
    "reward_model": {
        "epochs": 1,
        "prompts_per_batch": 64,
        "learning_rate": 9e-6,
        "final_rate_share": 0.1,
        "max_prompt_tokens": 1024,
        "max_response_tokens": 1024,
    },
    "ppo": {
        "episodes": 256_000,
        "batch": 512,
        "minibatch": 64,
        "inner_epochs": 1,
        "policy_rate": 9.65e-6,
        "value_rate": 9e-6,
        "warmup_iterations": 10,
        "clip": 0.2,
        "value_clip": 0.2,
        "gamma": 1.0,
        "lam": 0.95,
        "beta": 0.02,
        "ptx_coefficient": 27.8,
        "ptx_examples_per_episode": 8,
        "ema": 0.992,
        "max_prompt_tokens": 1024,
        "max_response_tokens": 1024,
    },
}

# What a Llama of 3.5 million weights learned with, from scratch, in minutes.
TINY: Sections = {
    "sft": {
        "epochs": 6,
        "batch": 32,
        "learning_rate": 1.5e-3,
        "dropout": 0.0,
        "precision": "auto",
        "max_prompt_tokens": 120,
        "max_response_tokens": 120,
    },
    "reward_model": {
        "epochs": 2,
        "prompts_per_batch": 16,
        "learning_rate": 2e-4,
        "precision": "auto",
        "max_prompt_tokens": 120,
        "max_response_tokens": 120,
    },
    "ppo": {
        "episodes": 3840,
        "batch": 128,
        "minibatch": 32,
        "policy_rate": 1e-4,
        "value_rate": 3e-4,
        "warmup_iterations": 5,
        "beta": 0.1,
        "ptx_coefficient": 0.5,
        "ptx_examples_per_episode": 1,
        "ptx_row_tokens": 96,
        "ema": 0.8,
        "max_prompt_tokens": 120,
        "max_response_tokens": 96,
    },
}

PRESETS: dict[str, Sections] = {"paper-1.3b": PAPER, "paper-6b": PAPER, "tiny": TINY}

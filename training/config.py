"""One frozen config per stage; the defaults are InstructGPT's numbers (arXiv 2203.02155), sections
in comments.
"""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from contracts.fields import at_odds
from training.device import Device, Precision, fastest_precision

RankingModel = Literal["bradley_terry", "plackett_luce"]
Advantage = Literal["gae", "rloo", "grpo"]
# The largest error, as a share of the target, that the adaptive KL controller acts on.
KL_ERROR = 0.2
# Widths of a head that vLLM's attention takes on a CPU.
HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


class StageConfig(BaseModel):
    """Refuses unknown keys and never changes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = 0
    # Handed down by the round. Where a stage runs is no part of what it is: one that was
    # interrupted goes on elsewhere.
    device: Device = Field(default="cpu", exclude=True)
    # bf16 runs the forward passes under autocast; weights and optimizer states stay float32. "auto"
    # is bf16 where the device multiplies it, and read as the one that it stands for.
    precision: Precision = "fp32"
    # A decoder layer keeps its input alone for the backward pass, which computes the rest again: a
    # third more time, for the room of all layers but one. For models of the Llama family.
    recompute: bool = False
    max_grad_norm: float = Field(default=1.0, gt=0)
    # Steps from one checkpoint to the next, 0 for none; of PPO, iterations.
    checkpoint_every: int = Field(default=100, ge=0)

    @field_validator("precision", mode="before")
    @classmethod
    def _as_the_device_likes(cls, given: object, others: ValidationInfo) -> object:
        return fastest_precision(others.data.get("device", "cpu")) if given == "auto" else given


class LoraConfig(BaseModel):
    """An adapter that is trained in place of the weights (Hu et al., arXiv 2106.09685)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Of both factors; servers take up to 16 unless they are told otherwise, and never more than
    # 256.
    rank: int = Field(default=16, ge=1, le=256)
    # What the factors add is multiplied by alpha / rank.
    alpha: int = Field(default=32, ge=1)
    # Last parts of the names of linear layers, such as q_proj; by default those of all that are in
    # the model's blocks (arXiv 2305.14314, 4: less does not reach full weights).
    target_modules: tuple[str, ...] = ()


class AdaptableConfig(StageConfig):
    """A stage that trains all weights or, with `lora`, an adapter of them."""

    lora: LoraConfig | None = None


class PretrainConfig(StageConfig):
    """A small Llama and its tokenizer from scratch, for those who bring no model. Sizes are ours,
    not the paper's.
    """

    vocab_size: int = Field(default=1024, ge=300)
    hidden_size: int = 256
    intermediate_size: int = 704
    layers: int = 4
    heads: int = Field(default=4, ge=1)
    context: int = Field(default=256, ge=8)
    steps: int = Field(default=600, ge=1)
    rows_per_step: int = Field(default=16, ge=1)
    row_tokens: int = Field(default=128, ge=8)
    learning_rate: float = Field(default=2e-3, gt=0)
    warmup_steps: int = 20

    @model_validator(mode="after")
    def _the_engine_takes_its_heads(self) -> "PretrainConfig":
        if self.hidden_size not in {self.heads * size for size in HEAD_SIZES}:
            expected = f"{self.heads} heads times one of {HEAD_SIZES}"
            raise at_odds("hidden_size", expected, self.hidden_size)
        return self


class SftConfig(AdaptableConfig):
    """Supervised fine-tuning on demonstrations (C.1)."""

    epochs: int = Field(default=16, ge=1)
    batch: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=9.65e-6, gt=0)
    # The rate falls along a cosine to this share of itself; no warm-up.
    final_rate_share: float = 0.1
    dropout: float = Field(default=0.2, ge=0, lt=1)
    # Pretraining examples per demonstration, and the weight of their loss (C.4: 10 %).
    pretraining_share: float = Field(default=0.1, ge=0, lt=1)
    pretraining_row_tokens: int = Field(default=128, ge=2)
    # Keep every epoch's checkpoint and let PPO start from the one whose answers to validation
    # prompts score best by the round's reward model (C.1), in place of the last.
    choose_by_reward: bool = False
    max_prompt_tokens: int = 1024
    max_response_tokens: int = 1024


class RewardModelConfig(AdaptableConfig):
    """Reward model on K-way rankings (C.2)."""

    # Folder of the model that it starts from; the SFT policy by default. Its tokenizer may differ.
    base: Path | None = None
    # What makes a ranking likely: every pair by itself, the paper's, or one choice after the other.
    ranking: RankingModel = "bradley_terry"
    # Reward models of other seeds beside it, it included: they show where its reward is a guess.
    ensemble: int = Field(default=1, ge=1)
    # Groups of labelers, each left out once, to see how well it does on new ones (C.2: 5); 0: none.
    folds: int = Field(default=0, ge=0)
    # Name to ids of its raters, * for any letters, ? for any one: each group has a head over the
    # one backbone, and an equal say in the reward. A rater is in the first group that fits.
    groups: dict[str, tuple[str, ...]] = {}
    epochs: int = Field(default=1, ge=1)
    prompts_per_batch: int = Field(default=64, ge=1)
    learning_rate: float = Field(default=9e-6, gt=0)
    final_rate_share: float = 0.1
    max_prompt_tokens: int = 1024
    max_response_tokens: int = 1024

    @model_validator(mode="after")
    def _a_group_has_another(self) -> "RewardModelConfig":
        if len(self.groups) == 1:
            raise at_odds("groups", "two or more, or none", [*self.groups])
        return self

    def group_of(self, rater_id: str) -> str | None:
        """The rater's group; None where no group fits."""
        fitting = (
            name
            for name, ids in self.groups.items()
            if any(fnmatchcase(rater_id, pattern) for pattern in ids)
        )
        return next(fitting, None)


class DpoConfig(AdaptableConfig):
    """DPO on K-way rankings; beta, rate and batch are those of its paper (arXiv 2305.18290, B)."""

    # Weight of the KL to the reference in what is maximised, in reward units per nat.
    beta: float = Field(default=0.1, gt=0)
    epochs: int = Field(default=1, ge=1)
    prompts_per_batch: int = Field(default=64, ge=1)
    learning_rate: float = Field(default=1e-6, gt=0)
    final_rate_share: float = 0.1
    max_prompt_tokens: int = 1024
    max_response_tokens: int = 1024


class PpoConfig(AdaptableConfig):
    """PPO with the pretraining mix (3.5, C.3, C.4)."""

    checkpoint_every: int = Field(default=10, ge=0)
    episodes: int = Field(default=256_000, ge=1)
    batch: int = Field(default=512, ge=1)
    minibatch: int = Field(default=64, ge=1)
    inner_epochs: int = Field(default=1, ge=1)
    # What a reward is compared with: a value network's prediction, the paper's, or the rewards of
    # the other responses to its prompt (arXiv 2402.14740, 2402.03300) and no value network.
    advantage: Advantage = "gae"
    # Responses to each prompt of a batch.
    samples_per_prompt: int = Field(default=1, ge=1)
    # While an iteration learns, the next one's responses are drawn, on the weights before.
    overlap: bool = False
    # Processes of this machine that draw responses, each on a device of its own; 0: the trainer's.
    engines: int = Field(default=0, ge=0)
    # Share of its GPU's memory that an engine takes at the start, for weights and cache; on the
    # trainer's the trainer has what is left. On a processor the cache is of a fixed size.
    engine_memory: float = Field(default=0.3, gt=0, lt=1)
    policy_rate: float = Field(default=9.65e-6, gt=0)
    value_rate: float = Field(default=9e-6, gt=0)
    # The rate rises from a tenth over this many iterations, then stays.
    warmup_iterations: int = 10
    # The value network alone learns for this many iterations first; the policy stands still
    # meanwhile.
    value_warmup_iterations: int = 0
    clip: float = 0.2
    value_clip: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    # Weight of the per-token KL penalty against the SFT policy, in reward units per nat.
    # With an adaptive controller, where it begins.
    beta: float = Field(default=0.02, ge=0)
    # Adaptive: beta moves until the mean KL to the SFT policy is `kl_target` nats per response, the
    # slower the more episodes `kl_horizon` counts (arXiv 1909.08593, 2.2).
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    kl_target: float = Field(default=6.0, gt=0)
    kl_horizon: int = Field(default=10_000, ge=1)
    # Stop when the mean KL of a batch to the SFT policy exceeds this many nats per response.
    kl_budget: float = Field(default=float("inf"), gt=0)
    # What a token adds to the policy loss counts by its probability for the trainer over that for
    # the engine that drew it, up to this; 0 leaves it out.
    importance_cap: float = Field(default=0.0, ge=0)
    # Multiplies the mean negative log-likelihood per pretraining token.
    ptx_coefficient: float = Field(default=27.8, ge=0)
    ptx_examples_per_episode: int = Field(default=8, ge=0)
    ptx_row_tokens: int = Field(default=128, ge=2)
    # Decay per iteration of the averaged weights; the average is what is evaluated and released.
    ema: float = Field(default=0.992, ge=0, lt=1)
    whiten_rewards: bool = True
    # Reward of a response that never stops, in place of its score.
    unfinished_reward: float = -1.0
    adam_eps: float = 1e-5
    max_prompt_tokens: int = 1024
    max_response_tokens: int = Field(default=1024, ge=1)

    @property
    def iterations(self) -> int:
        return max(1, self.episodes // self.batch)

    @model_validator(mode="after")
    def _responses_have_others(self) -> "PpoConfig":
        group = self.samples_per_prompt
        if self.advantage != "gae":
            if group == 1:
                raise at_odds("samples_per_prompt", f"2 or more for {self.advantage} to compare", 1)
            if warmup := self.value_warmup_iterations:
                raise at_odds("value_warmup_iterations", "0 without a value network", warmup)
            if self.gamma != 1:
                raise at_odds("gamma", f"1 for {self.advantage}", self.gamma)
        for name, size in (("batch", self.batch), ("minibatch", self.minibatch)):
            if size % group:
                raise at_odds(name, f"a multiple of {group} responses", size)
        return self

    @model_validator(mode="after")
    def _what_is_drawn_ahead_is_corrected(self) -> "PpoConfig":
        if self.overlap and self.importance_cap == 0:
            raise at_odds("importance_cap", "> 0 where rollouts overlap", 0)
        return self

    @model_validator(mode="after")
    def _beta_stays_positive(self) -> "PpoConfig":
        if self.kl_controller == "adaptive":
            if self.beta == 0:
                raise at_odds("beta", "> 0 for an adaptive controller to move", 0)
            if self.kl_horizon <= KL_ERROR * self.batch:
                expected = f"more than {KL_ERROR} of a batch of {self.batch} episodes"
                raise at_odds("kl_horizon", expected, self.kl_horizon)
        return self


class GateConfig(BaseModel):
    """What a policy must show before it is released."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Mean KL to the SFT policy, in nats per response.
    max_kl: float = Field(default=20.0, gt=0)
    # The lower end of the 95 % interval of the win rate must lie above this.
    min_win_rate: float = Field(default=0.5, ge=0, le=1)
    # Fewer people than this say nothing of the next one, however narrow the interval looks.
    min_people: int = Field(default=5, ge=1)
    # Which judge's win rate counts.
    judge: str = "reward_model"
    # Rise of the held-out language-modelling loss over the SFT policy's, in nats per token.
    max_lm_loss_rise: float = 0.1


class EvaluationConfig(BaseModel):
    """How a policy is compared with its parent."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples_per_prompt: int = Field(default=4, ge=1)
    max_prompts: int = Field(default=400, ge=1)
    seed: int = 0
    device: Device = Field(default="cpu", exclude=True)

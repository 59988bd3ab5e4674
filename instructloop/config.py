"""One round's configuration: a TOML file, refused where it holds a key that nobody reads."""

import importlib
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from contracts.errors import InvalidInput
from contracts.fields import at_odds, fault_in
from feedback.dataset.settings import RuleSettings
from training.config import (
    EvaluationConfig,
    GateConfig,
    PpoConfig,
    PretrainConfig,
    RewardModelConfig,
    SftConfig,
)
from training.device import Device
from training.presets import PRESETS, Preset

# Sections that a round's seed and device are handed down to.
STAGES = ("base", "sft", "reward_model", "ppo", "evaluation")


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Import(Section):
    """A public file that enters the log before the round; a second time adds nothing."""

    format: str
    path: str


class Plugin(Section):
    """Code that judges or measures answers: `function` is "module:name", called with `settings`,
    returns a callable.
    """

    function: str
    settings: dict[str, Any] = {}

    def load(self) -> Any:
        module, _, name = self.function.partition(":")
        try:
            factory = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as e:
            raise InvalidInput(
                "function", "module:name of something importable", self.function
            ) from e
        return factory(**self.settings)


class RoundConfig(Section):
    """Where a round reads and writes, and the settings of its stages."""

    # Named settings of the stages, in force where their sections say nothing else.
    preset: Preset | None = None
    # The name that clients ask for.
    model: str = "instructloop"
    # Folder of the run: its stages, figures and report.
    run: Path
    # Where events are, e.g. sqlite:///runs/demo/log.db.
    log: str
    registry: Path
    seed: int = 0
    # Where models learn and are measured: "cpu", "cuda", or "auto" for a GPU where there is one.
    # Another one is no other round: what was begun goes on.
    device: Device = Field(default="cpu", exclude=True)
    imports: tuple[Import, ...] = ()
    # Files (globs; plain or gzip) of plain text: for the base model, the pretraining mix and its
    # held-out part.
    text: tuple[str, ...] = ()
    # Without a released model to start from, one is trained from scratch. Demonstrations are part
    # of its text.
    base: PretrainConfig | None = None
    sft: SftConfig = SftConfig()
    rules: RuleSettings = RuleSettings()
    reward_model: RewardModelConfig = RewardModelConfig()
    # Share of the training raters who are kept for a second reward model, which only judges.
    judge_raters: float = Field(default=0.0, ge=0, lt=1)
    ppo: PpoConfig = PpoConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    gate: GateConfig = GateConfig()
    # name -> code that scores single answers; each gives a win rate.
    judges: dict[str, Plugin] = {}
    # name -> code that measures all answers of a policy at once.
    measures: dict[str, Plugin] = {}

    @model_validator(mode="before")
    @classmethod
    def _on_top_of_preset(cls, given: dict[str, Any]) -> dict[str, Any]:
        for stage in STAGES:
            _check_is_the_rounds(stage, given)
        # What is wrong with a name or a section is said when its field is looked at.
        sections = PRESETS.get(str(given.get("preset")), {})
        # A stage's precision may go by the device.
        device = {"device": given["device"]} if "device" in given else {}
        merged = {
            name: {**sections.get(name, {}), **given.get(name, {}), **device}
            for name in STAGES
            if name in {*sections, *given} and isinstance(given.get(name, {}), dict)
        }
        return {**given, **merged}

    def seeded(self) -> "RoundConfig":
        """The round's seed and device handed down to every stage."""
        ours = {"seed": self.seed, "device": self.device}
        stages = {
            name: getattr(self, name).model_copy(update=ours)
            for name in STAGES
            if getattr(self, name) is not None
        }
        return self.model_copy(update=stages)


def _check_is_the_rounds(stage: str, given: dict[str, Any]) -> None:
    """A stage's own seed or device would be written over."""
    section = given.get(stage)
    for name in ("seed", "device"):
        rounds = given.get(name, RoundConfig.model_fields[name].default)
        if isinstance(section, dict) and section.get(name, rounds) != rounds:
            raise at_odds(f"{stage}.{name}", f"that of the round, {rounds!r}", section[name])


def load_config(file: Path, data: Path | None = None, **overrides: Any) -> RoundConfig:
    """Read a TOML file; `{data}` in its strings stands for the data folder. Raises InvalidInput by
    field.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as e:
        raise InvalidInput("config", "a readable TOML file", str(file)) from e
    if "{data}" in text:
        if data is None or not data.is_dir():
            raise InvalidInput(
                "data", f"the folder that {file} reads from", str(data) if data else None
            )
        text = text.replace("{data}", data.resolve().as_posix())
    try:
        return RoundConfig.model_validate(tomllib.loads(text) | overrides).seeded()
    except tomllib.TOMLDecodeError as e:
        raise InvalidInput(str(file), "TOML", str(e)) from e
    except ValidationError as e:
        field, expected, got = fault_in(e)
        raise InvalidInput(f"{file}: {field}", expected, got) from e

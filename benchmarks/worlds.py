"""What ablations train on: the demo's tasks with simulated raters, the E2E data with human ones."""

import functools
import os
import random
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracts.artifact import ArtifactStore
from contracts.dataset import SETS, SPLITS, SetName, Split
from contracts.errors import InvalidInput
from contracts.prompt import ChatMessage
from demo import e2e
from demo.gold import gold_score
from demo.people import ERROR_RATE
from demo.raters import rank
from demo.round import gold_judge
from demo.tasks import Task, base_text, demonstration, make_task
from feedback.dataset.build import build_dataset
from feedback.importers import import_file
from feedback.vault import open_events
from instructloop.config import load_config
from instructloop.text import hold_out, read_documents
from instructloop.version import code_version
from training.data import PromptRow, RankedRow, SftRow, prompt_text, read_set
from training.device import Precision
from training.evaluation.comparison import Judge
from training.evaluation.reward_models import labeler_groups

QUICK = os.environ.get("QUICK", "") not in ("", "0")
# Of the generated world.
DOCUMENTS, DEMONSTRATIONS = (500, 1000) if QUICK else (2000, 8000)
PROMPTS, RANKED, TESTED = (100, 100, 40) if QUICK else (600, 1000, 150)
RATERS, K = 40, 5
# One rater of so many ranks for the final figure only.
RATER_GROUPS = 4
# Of the E2E world; its config's other books would be read, and most of them not reached.
BOOKS = ("alice_in_wonderland", "wizard_of_oz", "peter_pan")

# To each prompt some texts, and whether each came to its end.
Answers = Sequence[Sequence[tuple[str, bool]]]


@dataclass(frozen=True)
class World:
    """Data of one seed, and what its stages take: `epochs` of SFT, and so many times `shorter` runs
    of PPO than ablations.py has. No stage learns from `held_out` or `gold`, and neither a reward
    model nor PPO from `test`.

    `rankings` of K answers of the SFT policy to each of `asked` (in E2E of none: other systems'
    outputs were ranked) gives those to learn from, and those of other raters.
    """

    documents: list[str]
    held_out: list[str]
    demonstrations: list[SftRow]
    epochs: int
    shorter: int
    precision: Precision
    prompts: list[PromptRow]
    test: list[PromptRow]
    gold: Judge
    asked: list[PromptRow]
    rankings: Callable[[Answers], tuple[list[RankedRow], list[RankedRow]]]


def generated(seed: int) -> World:
    """Tasks of the demo; the raters rank what the SFT policy answers, with the demo's errors."""
    rng = random.Random(f"world:{seed}")
    documents, held_out = hold_out(list(base_text(rng, DOCUMENTS)))
    tasks = [make_task(rng) for _ in range(DEMONSTRATIONS)]
    rows = [_row(task.prompt) for task in _distinct(rng, PROMPTS + RANKED + TESTED)]
    asked = rows[PROMPTS:-TESTED]
    return World(
        documents,
        held_out,
        [SftRow(**vars(_row(t.prompt)), response=demonstration(t, rng)) for t in tasks],
        epochs=1,
        shorter=1,
        precision="bf16",
        prompts=rows[:PROMPTS],
        test=rows[-TESTED:],
        gold=gold_judge(),
        asked=asked,
        rankings=functools.partial(_simulated, asked, seed),
    )


def _distinct(rng: random.Random, count: int) -> list[Task]:
    """So many tasks, no two of the same prompt."""
    tasks: dict[str, Task] = {}
    while len(tasks) < count:
        task = make_task(rng)
        tasks.setdefault(task.prompt, task)
    return list(tasks.values())


def _row(prompt: str) -> PromptRow:
    message = ChatMessage(role="user", content=prompt)
    return PromptRow(id=prompt, user_id=prompt, text="", messages=(message,), use_case="")


def _simulated(
    rows: Sequence[PromptRow], seed: int, answers: Answers
) -> tuple[list[RankedRow], list[RankedRow]]:
    rng = random.Random(f"raters:{seed}")
    ranked = []
    for i, (row, group) in enumerate(zip(rows, answers, strict=True)):
        scores = [gold_score(prompt_text(row), text, done) for text, done in group]
        groups = rank(scores, rng, ERROR_RATE)
        place = {answer: n for n, tied in enumerate(groups) for answer in tied}
        ranked.append(
            RankedRow(
                **vars(row),
                rater_id=f"rater-{i % RATERS}",
                responses=tuple(text for text, _ in group),
                finished=tuple(done for _, done in group),
                ranks=tuple(place[k] for k in range(len(group))),
            )
        )
    return _by_rater(ranked, seed)


def human(seed: int) -> World:
    """E2E demonstrations and RankME's rankings, K = 5, of other systems' outputs; the gold judge
    counts slots. Rankings are split by rater, so those of a tested prompt are left out.
    """
    sets, documents = imported()
    documents, held_out = hold_out(documents)
    test = sets["ppo", "test"][:TESTED]
    tested = {prompt_text(row) for row in test}
    rankings = [*sets["rm", "train"], *sets["rm", "validation"]]
    ranked = [row for row in rankings if prompt_text(row) not in tested]
    return World(
        documents,
        held_out[:60],
        sets["sft", "train"][: DEMONSTRATIONS // 3],
        epochs=3,
        shorter=2,
        precision="fp32",
        prompts=sets["ppo", "train"],
        test=test,
        gold=e2e.slots(),
        asked=[],
        rankings=lambda _: _by_rater(ranked, seed),
    )


@functools.cache
def imported() -> tuple[dict[tuple[SetName, Split], list[Any]], list[str]]:
    """Rows of the dataset of demo/e2e.toml by set and split, and documents."""
    data = os.environ.get("INSTRUCTLOOP_DATA")
    if not data:
        expected = "the folder with demonstrations/, rankings/ and text/"
        raise InvalidInput("INSTRUCTLOOP_DATA", expected, data)
    config = load_config(Path("demo/e2e.toml"), Path(data))
    with tempfile.TemporaryDirectory() as folder:
        with closing(open_events(f"sqlite:///{folder}/log.db")) as log:
            for wanted in config.imports:
                import_file(wanted.format, Path(wanted.path), log)
            store = ArtifactStore(Path(folder) / "artifacts")
            dataset = store.path(build_dataset(log, store, config.rules, code_version()))
        sets = {(name, s): read_set(dataset, name, s) for name in SETS for s in SPLITS}
    books = [f"{data}/text/gutenberg_{book}.txt.gz" for book in BOOKS]
    return sets, list(dict.fromkeys(read_documents(books)))  # some stand in several books


def _by_rater(rows: Sequence[RankedRow], seed: int) -> tuple[list[RankedRow], list[RankedRow]]:
    out = labeler_groups((row.rater_id for row in rows), RATER_GROUPS, seed)[0]
    return [r for r in rows if r.rater_id not in out], [r for r in rows if r.rater_id in out]


WORLDS: dict[str, Callable[[int], World]] = {"generated": generated, "e2e": human}

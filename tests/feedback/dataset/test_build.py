import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from contracts.artifact import ArtifactStore
from contracts.dataset import PPO_COLUMNS, RM_COLUMNS, SFT_COLUMNS, DatasetManifest
from contracts.log import Log
from contracts.v1 import events_pb2 as pb
from feedback.dataset.build import build_dataset
from feedback.dataset.settings import RuleSettings
from feedback.log import open_log
from tests.feedback.samples import (
    STAMPER,
    completion,
    consent,
    demonstration,
    number,
    ranking,
)

EVERYONE_TRAINS = RuleSettings(train_fraction=1.0, validation_fraction=0.0)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    log = open_log(f"sqlite:///{tmp_path}/log.sqlite")
    yield log
    log.close()


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "artifacts")


def build(
    log: Log, store: ArtifactStore, rules: RuleSettings = EVERYONE_TRAINS
) -> tuple[DatasetManifest, dict[str, list[dict[str, object]]]]:
    digest = build_dataset(log, store, rules, "test")
    assert store.verify(digest).kind == "dataset"
    folder = store.path(digest)
    manifest = DatasetManifest.model_validate_json((folder / "dataset.json").read_bytes())
    return manifest, {
        s: pq.read_table(folder / f"{s}.parquet").to_pylist() for s in ("sft", "rm", "ppo")
    }


def one_round(log: Log) -> None:
    log.append(
        [
            consent("ann", at=1),
            consent("bob", at=1),
            completion("ann", "c1", "Name a bird.", ("owl", "cat", "jay"), n=1, at=2),
            completion("bob", "c2", "Name a fish.", ("cod", "eel"), n=2, at=2, finish="length"),
            ranking("ann", "c1", [[2, 0], [1]], n=3, at=3),
            ranking("bob", "c2", [[1], [0]], n=4, at=3),
            demonstration("bob", "Name a tree.", "Oak.", n=5, at=4),
        ]
    )


def test_events_become_rows_of_three_sets(log: Log, store: ArtifactStore) -> None:
    one_round(log)
    _, sets = build(log, store)
    prompt = {
        "messages": [],
        "use_case": "other",
        "use_case_by": "classifier",
        "language": "en",
        "masked": [],
        "split": "train",
    }
    assert sets["rm"][0] == prompt | {
        "id": number(3),
        "user_id": "ann",
        "text": "Name a bird.",
        "source": "api",
        "rater_id": "ann",
        "responses": ["owl", "cat", "jay"],
        "finished": [True, True, True],
        "releases": ["r0001-test"] * 3,
        "ranks": [0, 1, 0],
        "release_id": "r0001-test",
        "annotations": [],
    }
    assert (sets["rm"][1]["finished"], sets["rm"][1]["ranks"]) == ([False, False], [1, 0])
    assert sets["sft"] == [
        prompt
        | {
            "id": number(5),
            "user_id": "bob",
            "text": "Name a tree.",
            "source": "labeler",
            "response": "Oak.",
        }
    ]
    assert [(r["id"], r["text"]) for r in sets["ppo"]] == [
        (number(1), "Name a bird."),
        (number(2), "Name a fish."),
    ]


def test_only_ranked_outputs_are_in_a_row(log: Log, store: ArtifactStore) -> None:
    log.append([consent("ann", at=1), completion("ann", "c1", texts=("a", "b", "c", "d"), at=2)])
    log.append([ranking("ann", "c1", [[3], [1]], at=3)])
    _, sets = build(log, store)
    assert (sets["rm"][0]["responses"], sets["rm"][0]["ranks"]) == (["b", "d"], [1, 0])


def test_chat_prompts_and_use_cases_are_kept(log: Log, store: ArtifactStore) -> None:
    event = completion("ann", "c1", at=2, metadata={"use_case": "extract"})
    event.completion.prompt.CopyFrom(
        pb.Prompt(
            messages=[
                pb.Message(role="system", content="Be brief."),
                pb.Message(role="user", content="Hi"),
            ]
        )
    )
    log.append([consent("ann", at=1), event])
    _, sets = build(log, store)
    assert sets["ppo"][0]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]
    assert (sets["ppo"][0]["text"], sets["ppo"][0]["use_case"]) == ("", "extract")


def test_the_manifest_counts_rows_people_and_events(log: Log, store: ArtifactStore) -> None:
    one_round(log)
    manifest, _ = build(log, store)
    assert manifest.events == {
        "completions": {0: (0, 2)},
        "consents": {0: (0, 2)},
        "demonstrations": {0: (0, 1)},
        "rankings": {0: (0, 2)},
        "withdrawals": {0: (0, 0)},
    }
    assert manifest.rows == {
        "sft": {"train": 1, "validation": 0, "test": 0},
        "rm": {"train": 2, "validation": 0, "test": 0},
        "ppo": {"train": 2, "validation": 0, "test": 0},
    }
    assert manifest.people == {"ann": 2, "bob": 3}
    assert [r.rule for r in manifest.rules][:2] == ["completion_known", "consented"]


def test_what_is_masked_is_masked_in_every_text_of_its_row(log: Log, store: ArtifactStore) -> None:
    ranked = ranking("ann", "c1", n=3, at=3)
    ranked.ranking.metadata["why"] = "b@example.com says so"
    asked = completion("ann", "c1", "x", ("Mail a@example.com", "ok"), n=1, at=2)
    turn = pb.Message(role="user", content="I am at 203.0.113.7")
    asked.completion.prompt.CopyFrom(pb.Prompt(messages=[turn]))
    log.append([consent("ann", at=1), asked, ranked])
    manifest, sets = build(log, store)
    (row,) = sets["rm"]
    assert row["messages"] == [{"role": "user", "content": "I am at [IP]"}]
    assert row["responses"] == ["Mail [EMAIL]", "ok"]
    assert row["annotations"] == [{"name": "why", "value": "[EMAIL] says so"}]
    assert (row["masked"], sets["ppo"][0]["masked"]) == (["EMAIL", "IP"], ["IP"])
    assert manifest.lengths["rm"]["prompt"]["max"] == len("I am at [IP]")


def test_who_withdraws_is_in_no_set(log: Log, store: ArtifactStore) -> None:
    one_round(log)
    log.append([consent("bob", granted=False, at=9), consent("bob", at=10)])
    manifest, sets = build(log, store)
    assert manifest.people == {"ann": 2}
    assert {r["user_id"] for rows in sets.values() for r in rows} == {"ann"}
    assert sets["sft"] == []


def test_a_ranking_of_an_unknown_completion_or_output_is_counted_out(
    log: Log, store: ArtifactStore
) -> None:
    one_round(log)
    log.append([ranking("ann", "c9", at=3), ranking("ann", "c1", [[0], [3]], at=3)])
    manifest, _ = build(log, store)
    assert (manifest.rules[0].rows_in["rm"], manifest.rules[0].rows_out["rm"]) == (4, 2)


def test_the_same_events_and_rules_give_the_same_digest(log: Log, store: ArtifactStore) -> None:
    one_round(log)
    digest = build_dataset(log, store, EVERYONE_TRAINS, "test")
    assert build_dataset(log, store, EVERYONE_TRAINS, "test") == digest
    assert build_dataset(log, store, RuleSettings(max_prompt_chars=3), "test") != digest
    log.append([consent("cat")])
    assert build_dataset(log, store, EVERYONE_TRAINS, "test") != digest


@pytest.mark.parametrize(
    ("set_", "columns"), [("sft", SFT_COLUMNS), ("rm", RM_COLUMNS), ("ppo", PPO_COLUMNS)]
)
def test_an_empty_log_gives_empty_sets_with_their_columns(
    log: Log, store: ArtifactStore, set_: str, columns: Sequence[str]
) -> None:
    folder = store.path(build_dataset(log, store, RuleSettings(), "test"))
    table = pq.read_table(folder / f"{set_}.parquet")
    assert (tuple(table.column_names), table.num_rows) == (columns, 0)
    assert json.loads((folder / "dataset.json").read_text())["people"] == {}


def test_a_completion_that_was_taken_back_is_in_no_set(log: Log, store: ArtifactStore) -> None:
    one_round(log)
    # Another person's word about it counts for nothing.
    mine, others = pb.Withdrawal(completion_id="c1"), pb.Withdrawal(completion_id="c2")
    log.append([STAMPER.event("ann", mine), STAMPER.event("ann", others)])
    manifest, sets = build(log, store)
    assert [row["id"] for row in sets["rm"]] == [number(4)]
    assert [row["text"] for row in sets["ppo"]] == ["Name a fish."]
    notes = manifest.rules[0].notes
    assert notes["withdrawn"] == 2 and sum(notes.values()) == 2
    assert manifest.events["withdrawals"] == {0: (0, 2)}

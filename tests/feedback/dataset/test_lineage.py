import datetime as dt
from collections.abc import Iterator
from pathlib import Path

import pytest

from contracts.errors import InvalidInput, NotFound
from contracts.log import follow
from contracts.release import Canary, Release, ReleaseRegistry
from contracts.v1 import events_pb2 as pb
from feedback.dataset.build import build_dataset
from feedback.dataset.lineage import diff, explain, manifest_of
from feedback.dataset.review import Reviews, Waiting, review
from feedback.dataset.settings import RuleSettings
from feedback.log import open_log
from feedback.rights import Rights
from feedback.vault import open_events
from feedback.vault.sealed import SealedLog
from tests.feedback.samples import completion, consent, demonstration, number, ranking

RULES = RuleSettings(train_fraction=1.0, validation_fraction=0.0)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[SealedLog]:
    log = open_events(f"sqlite:///{tmp_path}/log.db")
    log.append(
        [
            consent("ann", at=1),
            consent("bob", at=1),
            completion("ann", "cmpl-1", "Name a bird of prey, please.", n=1, at=2),
            completion("bob", "cmpl-2", "Which fish live in rivers?", n=2, at=2),
            ranking("ann", "cmpl-1", n=3, at=3),
            demonstration("bob", "Name a tree.", "Oak.", n=4, at=4),
        ]
    )
    yield log
    log.close()


@pytest.fixture
def registry(tmp_path: Path) -> ReleaseRegistry:
    return ReleaseRegistry(tmp_path / "registry")


def publish(
    registry: ReleaseRegistry, id: str, dataset: str | None = None, parent: str | None = None
) -> str | None:
    """A release of that name; returns its reward model's digest."""
    folder = registry.root.parent / "model" / id
    folder.mkdir(parents=True)
    (folder / "weights").write_text(id)
    policy = registry.artifacts.put("policy", folder)
    reward = registry.artifacts.put("reward_model", folder) if dataset else None
    registry.publish(
        Release(
            id=id,
            model="m",
            created=dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
            artifact=policy,
            canary=Canary(token_ids=(1, 2), logprobs=(-1.0,)),
            parent=parent,
            dataset=dataset,
            reward_model=reward,
            code_version="test",
        )
    )
    return reward


def build(log: SealedLog, registry: ReleaseRegistry, rules: RuleSettings = RULES) -> str:
    decisions = Reviews(registry).decisions()
    return build_dataset(log, registry.artifacts, rules, "test", decisions=decisions)


def test_a_public_id_leads_to_rows_models_and_releases(
    log: SealedLog, registry: ReleaseRegistry
) -> None:
    digest = build(log, registry)
    publish(registry, "r1")
    reward = publish(registry, "r2", digest, parent="r1")
    publish(registry, "r3", parent="r2")
    found = explain(registry, "cmpl-1")
    (use,) = found["datasets"]
    assert [(r["set"], r["id"], r["split"]) for r in use["rows"]] == [
        ("ppo", number(1), "train"),
        ("rm", number(3), "train"),
    ]
    assert (use["dataset"], use["reward_models"]) == (digest, (reward,))
    assert (use["releases"], use["inherited_by"], found["served"]) == (("r2",), ("r3",), "r3")
    assert [r["set"] for r in explain(registry, number(4))["datasets"][0]["rows"]] == ["sft"]


def test_a_release_leads_back_to_its_rows(log: SealedLog, registry: ReleaseRegistry) -> None:
    digest = build(log, registry)
    publish(registry, "r1")
    publish(registry, "r2", digest, parent="r1")
    publish(registry, "r3", parent="r2")
    for release in ("r2", "r3"):
        (trained,) = explain(registry, release)["trained_on"]
        assert (trained["release"], trained["dataset"]) == ("r2", digest)
        assert {row["completion_id"] for row in trained["rows"]} == {"cmpl-1", "cmpl-2", ""}
    assert explain(registry, "r1")["trained_on"] == []


def test_what_no_dataset_knows_is_not_found(log: SealedLog, registry: ReleaseRegistry) -> None:
    build(log, registry)
    with pytest.raises(NotFound, match="cmpl-9"):
        explain(registry, "cmpl-9")
    with pytest.raises(NotFound):
        manifest_of(registry, "0" * 64)


def test_the_same_range_is_the_same_dataset_though_more_was_said(
    log: SealedLog, registry: ReleaseRegistry, tmp_path: Path
) -> None:
    digest = build(log, registry)
    until = {
        t: {p: e for p, (_, e) in of.items()}
        for t, of in manifest_of(registry, digest).events.items()
    }
    log.append([completion("ann", "cmpl-3", "And one more?", at=5)])
    assert build(log, registry) != digest
    again = build_dataset(log, registry.artifacts, RULES, "test", until=until)
    assert again == digest
    # On another machine: other keys, another file, the same events.
    copy = open_log(f"sqlite:///{tmp_path}/copy/log.db")
    for topic in ("consents", "completions", "rankings", "demonstrations"):
        copy.append([r.event for r in follow(log, topic, {})])
    elsewhere = ReleaseRegistry(tmp_path / "elsewhere").artifacts
    assert build_dataset(copy, elsewhere, RULES, "test", until=until) == digest
    copy.close()


def test_diff_names_what_changed(log: SealedLog, registry: ReleaseRegistry) -> None:
    before = build(log, registry)
    log.append([consent("bob", granted=False, at=9)])
    after = build(log, registry)
    found = diff(registry, before, after)
    assert found["rows_removed"] == [f"ppo {number(2)}", f"sft {number(4)}"]
    assert found["rows_added"] == []
    assert found["changed"]["people.bob"] == [2, None]
    assert found["changed"]["rules.consented.notes.people_left_out"] == [0, 1]
    assert diff(registry, before, before) == {
        "changed": {}, "rows_removed": [], "rows_added": [],
    }  # fmt: skip


def test_a_withdrawal_names_what_used_the_data(log: SealedLog, registry: ReleaseRegistry) -> None:
    digest = build(log, registry)
    publish(registry, "r1")
    reward = publish(registry, "r2", digest, parent="r1")
    report = Rights(log, log, registry).withdraw("ann")
    (use,) = report["datasets"]
    assert (use["dataset"], use["rows"], use["texts_erased"]) == (digest, 2, False)
    assert (use["reward_models"], use["releases"], report["served"]) == ((reward,), ("r2",), "r2")
    assert report["purposes"] == []
    assert "ann" not in manifest_of(registry, build(log, registry)).people
    assert Rights(log, log, registry).report("nobody")["datasets"] == []


def test_erasure_takes_the_texts_out_of_every_dataset_and_leaves_the_account(
    log: SealedLog, registry: ReleaseRegistry
) -> None:
    digest = build(log, registry)
    publish(registry, "r1", digest)
    report = Rights(log, log, registry).withdraw("ann", erase=True)
    assert report["datasets"][0]["texts_erased"] and report["served"] == "r1"
    folder = registry.artifacts.path(digest)
    assert {p.name for p in folder.iterdir()} == {
        "artifact.json", "dataset.json", "forgotten.json", "rows.parquet",
    }  # fmt: skip
    registry.artifacts.verify(digest)
    assert explain(registry, "cmpl-1")["datasets"][0]["releases"] == ("r1",)
    # The same again, as after a crash half way.
    Rights(log, log, registry).withdraw("ann", erase=True)
    rebuilt = manifest_of(registry, build(log, registry))
    assert set(rebuilt.people) == {"bob"}
    assert rebuilt.rules[0].notes["completions_not_readable"] == 1
    last = [r.event.consent for r in follow(log, "consents", {})][-1]
    assert last.erased


def test_an_export_holds_all_of_one_person_and_nothing_of_others(
    log: SealedLog, registry: ReleaseRegistry
) -> None:
    build(log, registry)
    held = Rights(log, log, registry).export("bob")
    assert {t: len(e) for t, e in held["events"].items()} == {
        "completions": 1, "rankings": 0, "demonstrations": 1, "consents": 1, "releases": 0,
        "ratings": 0, "edits": 0, "comments": 0, "withdrawals": 0,
    }  # fmt: skip
    assert held["use"]["datasets"][0]["rows"] == 2
    assert "Which fish" in str(held) and "bird" not in str(held) and "ann" not in str(held)


def test_erasure_needs_a_log_with_keys(tmp_path: Path) -> None:
    class Plain:
        def append(self, events: object) -> None:
            raise AssertionError("nothing may be written")

    with pytest.raises(InvalidInput, match="under keys"):
        Rights(Plain(), open_log(f"sqlite:///{tmp_path}/l.db"), None).withdraw("ann", erase=True)


def test_a_person_confirms_what_was_masked(log: SealedLog, registry: ReleaseRegistry) -> None:
    log.append([completion("ann", "cmpl-3", "Write to jo@example.com about owls", n=8, at=5)])
    rules = RULES.model_copy(update={"review": "masked"})
    digest = build(log, registry, rules)
    (row,) = Reviews(registry).waiting(digest)
    assert row == Waiting(number(8), "ppo", ("EMAIL",), "Write to [EMAIL] about owls", ())
    assert review(Reviews(registry), [row], lambda _: None, "eve", lambda: 7.0) == 0
    assert review(Reviews(registry), [row], lambda _: True, "eve", lambda: 7.0) == 1
    assert Reviews(registry).waiting(digest) == []
    assert build(log, registry, rules) == digest
    Reviews(registry).decide(number(8), False, "eve", 8.0)
    assert number(8) not in str(explain(registry, number(1))["datasets"][-1]["rows"])
    assert manifest_of(registry, build(log, registry, rules)).rows["ppo"]["train"] == 2
    assert "example.com" not in (registry.root / "reviews.jsonl").read_text()


def test_nobody_reads_what_may_not_be_read(log: SealedLog, registry: ReleaseRegistry) -> None:
    less = consent("ann", granted=False, at=0.5)
    less.consent.purposes.append(pb.PURPOSE_READING)
    log.append([less])
    rules = RULES.model_copy(update={"review": "all"})
    waiting = Reviews(registry).waiting(build(log, registry, rules))
    assert {row.prompt for row in waiting} == {"Which fish live in rivers?", "Name a tree."}


def test_without_the_setting_nothing_waits(log: SealedLog, registry: ReleaseRegistry) -> None:
    assert Reviews(registry).waiting(build(log, registry)) == []

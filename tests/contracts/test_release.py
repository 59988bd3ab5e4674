import datetime as dt
from pathlib import Path

import pytest
from pydantic import ValidationError

from contracts.errors import CorruptArtifact, InvalidInput, NotFound
from contracts.release import Canary, Release, ReleaseRegistry


@pytest.fixture
def registry(tmp_path: Path) -> ReleaseRegistry:
    return ReleaseRegistry(tmp_path / "registry")


@pytest.fixture
def artifact(registry: ReleaseRegistry, tmp_path: Path) -> str:
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "model.safetensors").write_bytes(b"weights")
    return registry.artifacts.put("policy", tmp_path / "policy")


def release(
    id: str, artifact: str, parent: str | None = None, dataset: str | None = None
) -> Release:
    return Release(
        id=id,
        model="small",
        created=dt.datetime(2025, 1, 1, tzinfo=dt.UTC),
        artifact=artifact,
        canary=Canary(token_ids=(1, 2), logprobs=(-0.5,)),
        parent=parent,
        dataset=dataset,
        code_version="test",
    )


def test_a_new_registry_serves_nothing(registry: ReleaseRegistry) -> None:
    assert registry.current() is None
    assert registry.history() == []
    with pytest.raises(NotFound, match="nothing is released"):
        registry.rollback()


def test_what_is_published_is_current(registry: ReleaseRegistry, artifact: str) -> None:
    first, second = release("r0001", artifact), release("r0002", artifact, parent="r0001")
    registry.publish(first)
    assert registry.current() == first
    registry.publish(second)
    assert registry.current() == second
    assert registry.get("r0001") == first
    assert registry.history() == ["r0001", "r0002"]


def test_what_is_added_is_known_and_not_current_and_needs_no_artifact(
    registry: ReleaseRegistry, artifact: str
) -> None:
    registry.publish(release("r0001", artifact))
    pushed = release("r0002", "0" * 64, parent="r0001")
    registry.add(pushed)
    registry.add(pushed)
    assert registry.get("r0002") == pushed and registry.history() == ["r0001"]
    with pytest.raises(InvalidInput, match="an id that is not taken"):
        registry.add(release("r0002", artifact))
    with pytest.raises(NotFound):
        registry.publish(pushed)
    assert registry.swap_to("r0002") == pushed
    assert registry.rollback().id == "r0001"


def test_rollback_goes_to_the_parent_and_history_keeps_both(
    registry: ReleaseRegistry, artifact: str
) -> None:
    registry.publish(release("r0001", artifact))
    registry.publish(release("r0002", artifact, parent="r0001"))
    assert registry.rollback().id == "r0001"
    assert registry.current_id() == "r0001"
    assert registry.history() == ["r0001", "r0002", "r0001"]
    with pytest.raises(NotFound, match="no parent"):
        registry.rollback()


def test_publishing_again_changes_nothing(registry: ReleaseRegistry, artifact: str) -> None:
    registry.publish(release("r0001", artifact))
    registry.publish(release("r0001", artifact))
    assert registry.history() == ["r0001"]


def test_a_taken_id_is_refused(registry: ReleaseRegistry, artifact: str) -> None:
    registry.publish(release("r0001", artifact))
    with pytest.raises(InvalidInput, match="not taken"):
        registry.publish(release("r0001", artifact, parent="r0000"))
    assert registry.get("r0001").parent is None


def test_a_release_without_its_artifacts_is_not_published(
    registry: ReleaseRegistry, artifact: str
) -> None:
    for wrong in (release("r0001", "0" * 64), release("r0001", artifact, dataset="0" * 64)):
        with pytest.raises(NotFound, match="no artifact"):
            registry.publish(wrong)
    assert registry.current() is None


@pytest.mark.parametrize("id", ["", "../r0001", ".hidden", "a/b", "a\0b", "a\n", "a" * 101])
def test_an_id_that_is_no_name_is_refused(
    registry: ReleaseRegistry, artifact: str, id: str
) -> None:
    with pytest.raises(InvalidInput, match="without slashes"):
        registry.publish(release(id, artifact))


def test_ids_count_up(registry: ReleaseRegistry, artifact: str) -> None:
    assert registry.next_id(artifact) == f"r0001-{artifact[:8]}"
    registry.publish(release("r0001", artifact))
    assert registry.next_id(artifact) == f"r0002-{artifact[:8]}"


def test_an_adapter_names_its_base_and_is_not_a_whole_release_of_it(
    registry: ReleaseRegistry, artifact: str, tmp_path: Path
) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"delta")
    delta = registry.artifacts.put("adapter", tmp_path / "adapter")
    registry.publish(release("r0001", artifact))
    adapted = release("r0002", delta).model_copy(update={"base": artifact})
    registry.publish(adapted)
    assert registry.get("r0002").base == artifact
    assert registry.whole(artifact).id == "r0001"
    for digest in (delta, "0" * 64):
        with pytest.raises(NotFound, match="no release of the policy"):
            registry.whole(digest)
    with pytest.raises(NotFound, match="no artifact"):
        registry.publish(release("r0003", delta).model_copy(update={"base": "0" * 64}))


def test_shares_are_kept_and_name_known_releases(registry: ReleaseRegistry, artifact: str) -> None:
    assert registry.shares().parts == {}
    for name in ("r0001", "r0002"):
        registry.publish(release(name, artifact))
    registry.share("r0001", 0.25)
    assert registry.share("r0002", 0.5).parts == {"r0001": 0.25, "r0002": 0.5}
    assert ReleaseRegistry(registry.root).shares().parts == {"r0001": 0.25, "r0002": 0.5}
    with pytest.raises(NotFound, match="r0009"):
        registry.share("r0009", 0.1)
    with pytest.raises(InvalidInput, match="share"):
        registry.share("r0001", 0.6)
    assert registry.share("r0002", 0).parts == {"r0001": 0.25}
    (registry.root / "shares.json").write_text('{"parts": {"r0001": 2}}')
    with pytest.raises(CorruptArtifact, match=r"shares\.json"):
        registry.shares()


@pytest.mark.parametrize("figure", [float("nan"), float("inf")])
def test_a_figure_that_is_no_number_is_refused_before_it_makes_a_record_unreadable(
    artifact: str, figure: float
) -> None:
    said = release("r0001", artifact).model_dump() | {"evaluation": {"kl": figure}}
    with pytest.raises(ValidationError, match=r"evaluation\.kl"):
        Release.model_validate(said)

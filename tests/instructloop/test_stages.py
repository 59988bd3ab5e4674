from pathlib import Path

import pytest

from instructloop.stages import Stages


def stages(folder: Path, **identity: int) -> Stages:
    return Stages(folder, identity or {"seed": 1}, lambda _: None)


def test_a_stage_is_done_once(tmp_path: Path) -> None:
    calls = []

    def work(folder: Path) -> dict[str, int]:
        calls.append(folder)
        (folder / "out.txt").write_text("x")
        return {"rows": 3}

    first = stages(tmp_path / "run").run("build", work)
    again = stages(tmp_path / "run").run("build", work)
    assert len(calls) == 1
    assert first == again
    assert again["rows"] == 3
    assert again["seconds"] >= 0
    assert (tmp_path / "run" / "build" / "out.txt").read_text() == "x"


def test_an_interrupted_stage_leaves_nothing_and_starts_over(tmp_path: Path) -> None:
    def interrupted(folder: Path) -> dict[str, int]:
        (folder / "half.txt").write_text("half")
        raise KeyboardInterrupt

    run = stages(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        run.run("build", interrupted)
    assert not run.done("build")

    def whole(folder: Path) -> dict[str, int]:
        assert list(folder.iterdir()) == []
        return {}

    stages(tmp_path / "run").run("build", whole)
    assert stages(tmp_path / "run").done("build")


def test_an_interrupted_stage_finds_its_checkpoint(tmp_path: Path) -> None:
    def interrupted(folder: Path) -> dict[str, int]:
        (folder / "checkpoint").mkdir()
        (folder / "checkpoint" / "model.pt").write_text("half the way")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages(tmp_path / "run").run("build", interrupted)

    def whole(folder: Path) -> dict[str, int]:
        assert (folder / "checkpoint" / "model.pt").read_text() == "half the way"
        return {}

    stages(tmp_path / "run").run("build", whole)
    assert [p.name for p in (tmp_path / "run" / "build").iterdir()] == ["result.json"]


def test_another_configuration_starts_over(tmp_path: Path) -> None:
    stages(tmp_path / "run", seed=1).run("build", lambda _: {"seed": 1})
    other = stages(tmp_path / "run", seed=2)
    assert not other.done("build")
    assert other.run("build", lambda _: {"seed": 2})["seed"] == 2


def test_a_folder_that_is_not_a_run_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="expected an empty folder"):
        stages(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_seconds_are_in_the_order_of_the_stages(tmp_path: Path) -> None:
    run = stages(tmp_path / "run")
    for name in ("sft", "base", "ppo"):
        run.run(name, lambda _: {})
    assert list(run.seconds()) == ["sft", "base", "ppo"]

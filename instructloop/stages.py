"""Steps of a run, each done once: what is finished stays, what was interrupted starts over or goes
on from its checkpoint.
"""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from contracts.artifact import write_text_durably
from training.checkpoint import CHECKPOINTS

RESULT, IDENTITY = "result.json", "identity.json"
Say = Callable[[str], None]


class Stages:
    """A run below `folder`: one folder a stage, written aside and renamed when the stage is done.

    `identity` is what the run depends on (configuration, code). A folder of another identity is
    emptied, since its
    stages would not be those of this run.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], say: Say) -> None:
        self.folder, self._say = folder, say
        wanted = json.dumps(identity, sort_keys=True, indent=1)
        mark = folder / IDENTITY
        if folder.exists() and (not mark.exists() or mark.read_text(encoding="utf-8") != wanted):
            if mark.exists():
                say(f"{folder} holds a run of another configuration or code: starting over")
            elif any(folder.iterdir()):
                raise FileExistsError(
                    f"{folder}: expected an empty folder or a run's, choose another or empty it"
                )
            shutil.rmtree(folder)
        write_text_durably(mark, wanted)

    def done(self, name: str) -> bool:
        return (self.folder / name / RESULT).is_file()

    def path(self, name: str) -> Path:
        """The folder of a finished stage."""
        return self.folder / name

    def result(self, name: str) -> dict[str, Any]:
        """The figures of a finished stage."""
        figures: dict[str, Any] = json.loads(
            (self.folder / name / RESULT).read_text(encoding="utf-8")
        )
        return figures

    def run(self, name: str, work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """`work(folder)` fills a folder and returns its figures (JSON); skipped if the stage is
        done. What it left in the folder's `checkpoint` when it was interrupted is there again.

        The figures come back with `seconds` added, from disk if the stage was done before.
        """
        if not self.done(name):
            self._say(f"{name} ...")
            aside = self.folder / f".{name}"
            _empty(aside)
            started = time.perf_counter()
            figures = work(aside)
            figures = {**figures, "seconds": round(time.perf_counter() - started, 2)}
            shutil.rmtree(aside / CHECKPOINTS, ignore_errors=True)
            write_text_durably(aside / RESULT, json.dumps(figures, indent=1))
            aside.rename(self.folder / name)
        result = self.result(name)
        self._say(f"{name}: done in {result['seconds']:.0f} s")
        return result

    def seconds(self) -> dict[str, dict[str, float]]:
        """Time of every finished stage, in the order in which they were finished."""
        results = sorted(self.folder.glob(f"*/{RESULT}"), key=lambda p: p.stat().st_mtime)
        return {
            p.parent.name: {"seconds": json.loads(p.read_text(encoding="utf-8"))["seconds"]}
            for p in results
        }


def _empty(folder: Path) -> None:
    """A folder with nothing in it but its checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name == CHECKPOINTS:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

"""A program under torchrun: rank 0's, with jobs that all ranks do together."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from instructloop.crew import alone, cards_for
from tests import tiny_models
from tests.instructloop.crew_program import teach


@pytest.mark.vllm
def test_a_program_under_torchrun_runs_once_and_its_jobs_on_every_rank(tmp_path: Path) -> None:
    base = tiny_models.save(tmp_path / "base", 0, tied=True)
    two, one = tmp_path / "two", tmp_path / "one"
    two.mkdir()
    program = ["-m", "tests.instructloop.crew_program", str(base), str(two)]
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *program]
    subprocess.run(run, check=True, timeout=500, cwd=Path(__file__).parents[2])
    [told] = [json.loads(line) for line in (two / "told.jsonl").read_text().splitlines()]

    figures = alone(teach, base, one / "sft")
    for ours, theirs in zip(told["sft"], figures, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    weights = load_file(one / "sft/model.safetensors")
    for name, found in load_file(two / "sft/model.safetensors").items():
        torch.testing.assert_close(found, weights[name], atol=1e-4, rtol=0)

    # Each rank's engine drew on the weights of all, before and after a step.
    first, second = told["ppo"]
    assert max(first["logprob_mismatch_max"], second["logprob_mismatch_max"]) < 1e-4
    assert first["kl"] == 0.0 < abs(second["kl"])
    between = {"group": False, "told": False, "ranks": 1, "drew": True}
    assert [told["alone"], told["again"]] == [between, between]


@pytest.mark.parametrize(
    ("seen", "count", "own"),
    [
        (None, 2, ["0", "1"]),
        # Then the one that no rank has.
        (None, 3, ["0,2", "1,2"]),
        ("2,GPU-5e1f", 2, ["2", "GPU-5e1f"]),
        # Fewer than ranks: nobody has one.
        (None, 1, ["", ""]),
        ("7", 1, ["", ""]),
    ],
)
def test_each_rank_of_a_machine_has_a_card_of_its_own(
    seen: str | None, count: int, own: list[str]
) -> None:
    told = {"LOCAL_WORLD_SIZE": "2"} | ({} if seen is None else {"CUDA_VISIBLE_DEVICES": seen})
    assert [cards_for(told | {"LOCAL_RANK": str(rank)}, count) for rank in range(2)] == own

import pytest

from benchmarks import gemm


def test_a_run_at_half_the_rate_has_half_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny Llama has 3,211,264 weights in its layers: 4 x (4 x 256 x 256 + 3 x 256 x 704)."""
    monkeypatch.setattr(gemm, "peak", lambda precision: 3_211_264 * (6 * 10 + 2 * 5))
    runs = [{"cpu": 2.0, "wall": 9.0}, {"cpu": 4.0, "wall": 9.0}]
    update = gemm.Update("sft", "tiny", lambda: runs[0], trained=10, evaluated=5)
    share = gemm.gemm_share(update, runs, "fp32")
    assert (share.figure, share.min, share.max) == ("sft_fp32_gemm_share", 0.25, 0.5)


def test_every_update_of_the_table_is_there() -> None:
    assert [u.name for u in gemm.updates("fp32")] == ["sft", "k4", "k9", "ppo", "ppo_ptx"]

import pytest

from benchmarks import gemm


def test_a_run_at_half_the_rate_has_half_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny Llama has 3,211,264 weights in its layers: 4 x (4 x 256 x 256 + 3 x 256 x 704)."""
    monkeypatch.setattr(gemm, "peak", lambda precision: 3_211_264 * (6 * 10 + 2 * 5))
    runs = [{"cpu": 2.0, "wall": 9.0}, {"cpu": 4.0, "wall": 9.0}]
    share = gemm.gemm_share("sft", runs, "fp32", "tiny", trained=10, evaluated=5)
    assert (share.figure, share.min, share.max) == ("sft_gemm_share", 0.25, 0.5)

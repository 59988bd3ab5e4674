"""The page of a round: whole, alone, escaped, and honest about a bad round."""

import json
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from instructloop.report import page, write_report
from instructloop.round import machine

EVIL = "<script>alert('x')</script> & $\\frac{"
# Tags that need no closing one; those inside the SVG are closed or self-closing.
VOID = {"meta"}


def sample(**changes: Any) -> dict[str, Any]:
    report: dict[str, Any] = {
        "seed": 7,
        "created": "2026-11-21T10:00:00Z",
        "machine": {"cpu": "2 cores", "memory_gib": 24},
        "release": {"before": "r0001-aaaa", "after": "r0002-bbbb"},
        "gate": {"passed": True, "reasons": ["win rate 0.71 is above 0.55", "KL 9.1 is below 15"]},
        "reward_model": {
            "accuracy": 0.842,
            "ci95": [0.815, 0.866],
            "ceiling": 0.87,
            "pairs": 1820,
            "disagreement": 0.21,
            "folds": [{"accuracy": a, "labelers": 3} for a in (0.8, 0.74, None)],
            "groups": {"customers": {"accuracy": 0.713, "own_accuracy": 0.741, "pairs": 90}},
            "calibration": [
                {"gap": g, "predicted": p, "observed": o, "pairs": n}
                for g, p, o, n in (
                    (0.2, 0.55, 0.57, 300),
                    (0.8, 0.69, 0.66, 420),
                    (1.6, 0.83, 0.85, 600),
                    (3.0, 0.95, 0.93, 500),
                )
            ],
        },
        "policy": {
            "gold_win_rate": 0.713,
            "gold_win_rate_ci95": [0.671, 0.752],
            "reward_win_rate": 0.781,
            "reward_win_rate_ci95": [0.74, 0.817],
            "kl_to_sft": 9.13,
            "lm_loss_before": 2.31,
            "lm_loss_after": 2.36,
        },
        "ppo": [
            {
                "iteration": i,
                "reward": -0.4 + 0.06 * i - 0.0009 * i * i,
                "gold": 0.42 + 0.012 * i,
                "kl": 0.35 * i,
                "length": 24 + 0.1 * i,
                "eos_rate": 0.9 + 0.003 * i,
                "clip_fraction": 0.08 if i % 3 else 0.05,
                "explained_variance": float("nan") if i == 0 else 0.7 - 0.5 / (i + 1),
                "logprob_mismatch": 0.002,
            }
            for i in range(25)
        ],
        "swap": {
            "pause_ms": 41.5,
            "drain_ms": 380.0,
            "stage_ms": 912.0,
            "requests_during": 160,
            "failed": 0,
            "unstamped": 0,
            "mixed": 0,
            "latencies": [
                {
                    "at": 1_763_700_000 + 0.1 * i,
                    "seconds": 0.2 + 0.01 * (i * 7 % 13) + (0.4 if 76 <= i < 80 else 0.0),
                    "release": "r0001-aaaa" if i < 80 else "r0002-bbbb",
                }
                for i in range(160)
            ],
        },
        "consent": {"leaked_events": 0, "markers_searched": 240, "bytes_searched": 5_242_880},
        "dataset": {
            "rules": [
                {
                    "rule": "consent",
                    "rows_in": {"sft": 600, "rm": 900, "ppo": 1500},
                    "rows_out": {"sft": 600, "rm": 871, "ppo": 1432},
                },
                {
                    "rule": "dedupe",
                    "rows_in": {"sft": 600, "rm": 871, "ppo": 1432},
                    "rows_out": {"sft": 588, "rm": 871, "ppo": 1301},
                },
            ],
            "rows": {"rm": {"train": 700, "test": 171}, "ppo": {"train": 1301}},
        },
        "by_use_case": {
            "generation": {"before": 0.44, "after": 0.81, "prompts": 60},
            "closed_qa": {"before": 0.52, "after": 0.77, "prompts": 55},
            "extract": {"before": 0.61, "after": 0.8, "prompts": 58},
        },
        "samples": [
            {
                "use_case": "extract",
                "prompt": f"Name the colours in: a red hat, a blue door. {EVIL}",
                "before": f"red {EVIL}",
                "after": "red, blue",
                "before_score": 0.5,
                "after_score": 1.0,
            }
        ],
        "stages": {
            "base_model": {"seconds": 92.4},
            "sft": {"seconds": 61.0},
            "ppo": {"seconds": 218.7},
        },
    }
    return report | changes


class Outline(HTMLParser):
    """The tags of a page; fails on one that is closed out of order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_is_written_as_json_and_as_a_page(tmp_path: Path) -> None:
    write_report(sample(), tmp_path)
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["policy"]["gold_win_rate_ci95"] == [0.671, 0.752]
    assert report["ppo"][0]["explained_variance"] is None
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page(report)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]


@pytest.fixture(scope="module")
def html() -> str:
    return page(sample())


def test_headline_figures_are_readable(html: str) -> None:
    text = Outline(html).text
    for figure in (
        "71.3%",
        "95 %: 67.1% to 75.2%",
        "84.2%",
        "ceiling 87.0%",
        "other seeds differ by 0.21",
        "77.0% on new labelers in 2 folds",
        "71.3% of customers, 74.1% by a head of their own",
        "41.5 ms",
        "0 failed, 0 unstamped, 0 mixed",
        "LM loss 2.31 → 2.36",
        "900 → 871",
        "6 min 12 s",  # 92.4 + 61.0 + 218.7 = 372.1 s
        "240 marked texts",
    ):
        assert figure in text


def test_no_text_of_the_report_becomes_markup() -> None:
    evil = sample(
        release={"before": EVIL, "after": EVIL},
        gate={"passed": True, "reasons": [EVIL]},
        machine={EVIL: EVIL},
        stages={EVIL: {"seconds": 1.0}},
        by_use_case={EVIL: {"before": 0.1, "after": 0.2, "prompts": 3}},
        dataset={
            "rules": [{"rule": EVIL, "rows_in": {EVIL: 2}, "rows_out": {EVIL: 1}}],
            "rows": {EVIL: 1},
        },
        swap={"latencies": [{"at": 0, "seconds": 1, "release": EVIL}], "requests_during": EVIL},
    )
    outline = Outline(page(evil))
    assert "script" not in outline.tags
    assert outline.open == []
    assert outline.text.count(EVIL) >= 8


def test_the_page_asks_nothing_of_the_network(html: str) -> None:
    outline = Outline(html)
    assert outline.tags.count("svg") == 6
    assert all(link.startswith("#") for link in outline.links)
    assert "url(http" not in html and "@import" not in html
    for svg in html.split("<svg ")[1:]:
        ET.fromstring("<svg " + svg.split("</svg>")[0] + "</svg>")


def test_the_same_round_gives_the_same_bytes(html: str) -> None:
    assert page(sample()) == html


def test_a_refused_or_faulty_round_does_not_look_good() -> None:
    report = sample(gate={"passed": False, "reasons": ["KL 31 is over the budget of 15"]})
    report["swap"] = {"requests_during": 9, "failed": 1, "unstamped": 0, "mixed": 0}
    report["consent"] = {"leaked_events": 2}
    html = page(report)
    text = Outline(html).text
    assert "refused the new policy; r0001-aaaa stays" in text
    assert "KL 31 is over the budget of 15" in text
    assert html.count('class="tile bad"') == 2
    assert 'class="verdict bad"' in html


# Those that other sections read as well.
@pytest.mark.parametrize("missing", ["release", "gate", "policy", "reward_model", "stages"])
def test_a_missing_section_is_left_out(missing: str) -> None:
    drawn_from_one = {"ppo", "by_use_case", "swap"}
    report = {k: v for k, v in sample().items() if k != missing and k not in drawn_from_one}
    assert Outline(page(report)).open == []


def test_a_round_that_stopped_early_still_has_a_page() -> None:
    outline = Outline(page({"seed": 1, "stages": {"base_model": {"seconds": 3.0}}}))
    assert "3.0 s" in outline.text
    assert outline.tags.count("svg") == 0


def test_figures_that_could_not_be_worked_out_are_left_out(tmp_path: Path) -> None:
    nan = float("nan")
    report = sample(
        policy={"gold_win_rate": nan, "gold_win_rate_ci95": [nan, nan], "kl_to_sft": nan},
        by_use_case={"rewrite": {"before": nan, "after": 0.5, "prompts": 0}},
        swap={"latencies": [{"at": 1.0, "seconds": None, "release": None}], "pause_ms": None},
    )
    report["reward_model"] = {
        "accuracy": nan,
        "calibration": [{"gap": 0.1, "predicted": 0.5, "observed": nan, "pairs": 0}],
    }
    write_report(report, tmp_path)
    outline = Outline((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert outline.tags.count("svg") == 2  # learning and its health
    assert "nan" not in outline.text.lower()


def test_a_report_names_the_gpu_that_a_round_learned_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    assert machine("cuda") == {**machine("cpu"), "gpu": "NVIDIA H100"}
    assert "gpu" not in machine("cpu")

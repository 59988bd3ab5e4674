"""Plots of the report and of docs: rows of figures in, SVG text out, the same bytes for the same
rows.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = Mapping[str, Any]

INK, MUTED, LINE = "#22252a", "#5f6368", "#dedad2"
AFTER, BEFORE = "#12655c", "#c4622d"
RELEASES = (BEFORE, AFTER, "#5b4a9e", "#8a6d00")

# matplotlib types its keys as literals.
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    # Release names are text: a dollar sign in one is not the start of a formula.
    "text.parse_math": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#efece6",
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "svg.fonttype": "path",
}

# Key of a PPO row and its title, in the order in which they are drawn.
LEARNING = (("reward", "Reward"), ("kl", "KL to the SFT policy, nats per answer"))
HEALTH = (
    ("length", "Answer length, tokens"),
    ("eos_rate", "Ended by itself"),
    ("clip_fraction", "Clip fraction"),
    ("explained_variance", "Explained variance"),
    ("logprob_mismatch", "Engine/trainer log-prob gap"),
)


@dataclass(frozen=True)
class Sweep:
    """One figure at each value of a setting: the least, the median and the greatest of several
    runs.
    """

    title: str
    setting: str
    values: Sequence[str]
    spreads: Sequence[tuple[float, float, float]]


def iterations(rows: Sequence[Row], panels: Sequence[tuple[str, str]]) -> str:
    """One small panel for each key that the rows have, against the iteration."""
    panels = [
        (key, title) for key, title in panels if any(row.get(key) is not None for row in rows)
    ]
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 2.5 * lines), layout="constrained")
        for place, (key, title) in enumerate(panels, 1):
            axes = figure.add_subplot(lines, columns, place)
            axes.set_title(title)
            axes.set_xlabel("iteration")
            _line(axes, rows, key, AFTER, "reward model")
            if key == "reward" and any(row.get("gold") is not None for row in rows):
                _line(axes, rows, "gold", BEFORE, "true taste")
                axes.legend()
        return _svg(figure, "-".join(key for key, _ in panels))


def win_rates(rates: Sequence[tuple[str, float, tuple[float, float]]]) -> str:
    """(name, rate, 95 % interval) each; the lines are a coin's rate and the goal."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.4, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for y, (name, rate, (low, high)) in enumerate(reversed(rates)):
            axes.plot([low, high], [y, y], color=AFTER, linewidth=3, solid_capstyle="round")
            axes.plot([rate], [y], "o", color=AFTER, markersize=9)
            axes.annotate(
                f"{name}  {rate:.1%}", (rate, y), (0, 10), textcoords="offset points", ha="center"
            )
        axes.axvline(0.5, color=MUTED, linewidth=1, linestyle=":")
        axes.axvline(0.55, color=BEFORE, linewidth=1, linestyle="--")
        top = len(rates) - 0.35
        axes.text(0.495, top, "a coin 0.5", ha="right", va="top", color=MUTED, fontsize=8)
        axes.text(0.555, top, "goal 0.55", ha="left", va="top", color=BEFORE, fontsize=8)
        axes.set(
            xlim=(min([0.38, *(low - 0.05 for _, _, (low, _) in rates)]), 1.0),
            ylim=(-0.5, top + 0.05),
        )
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("preferred over the release before")
        return _svg(figure, "win-rates")


def calibration(bins: Sequence[Row]) -> str:
    """How often the answer that the reward model prefers was preferred, against how sure it was."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.4, 3.2), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=":")
        predicted, observed = ([float(b[key]) for b in bins] for key in ("predicted", "observed"))
        pairs = [float(b.get("pairs") or 1) for b in bins]
        axes.plot(predicted, observed, color=AFTER, linewidth=1, alpha=0.5)
        axes.scatter(
            predicted,
            observed,
            s=[30 + 170 * n / max(pairs) for n in pairs],
            color=AFTER,
            linewidth=0,
        )
        low = max(0.0, min([0.5, *predicted, *observed]) - 0.05)
        axes.set(xlim=(low, 1.03), ylim=(low, 1.03), xlabel="predicted", ylabel="observed")
        return _svg(figure, "calibration")


def latencies(requests: Sequence[Row]) -> str:
    """A dot for each request around the swap, coloured by the release that answered."""
    start = min(float(r["at"]) for r in requests)
    releases = list(
        dict.fromkeys(str(r["release"]) for r in sorted(requests, key=lambda r: float(r["at"])))
    )
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 2.8), layout="constrained")
        axes = figure.add_subplot()
        for i, release in enumerate(releases):
            own = [r for r in requests if str(r["release"]) == release]
            axes.scatter(
                [float(r["at"]) - start for r in own],
                [float(r["seconds"]) for r in own],
                s=14,
                color=RELEASES[i % len(RELEASES)],
                alpha=0.75,
                linewidth=0,
                label=f"{release} ({len(own)})",
            )
        axes.set(xlabel="seconds since the first request", ylabel="seconds to the answer")
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside upper left", ncols=len(releases))
        return _svg(figure, "latencies")


def use_cases(scores: Mapping[str, Row]) -> str:
    """Score before and after for each use case, as two dots on a line."""
    names = sorted(scores, key=lambda name: float(scores[name]["after"]))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 0.9 + 0.36 * len(names)), layout="constrained")
        axes = figure.add_subplot()
        for y, name in enumerate(names):
            before, after = float(scores[name]["before"]), float(scores[name]["after"])
            axes.plot([before, after], [y, y], color=LINE, linewidth=3, zorder=1)
            axes.plot([before], [y], "o", color=BEFORE, label="before" if y == 0 else None)
            axes.plot([after], [y], "o", color=AFTER, label="after" if y == 0 else None)
        labels = [f"{n.replace('_', ' ')} ({scores[n]['prompts']})" for n in names]
        axes.set_yticks(range(len(names)), labels, color=INK)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_xlabel("mean score")
        figure.legend(loc="outside upper right", ncols=2)
        return _svg(figure, "use-cases")


def sweeps(rows: Sequence[Sequence[Sweep]]) -> str:
    """A small panel for each sweep, a row of panels for each setting; values are evenly apart."""
    with mpl.rc_context(_STYLE):
        columns = max(map(len, rows))
        figure = Figure(figsize=(2.9 * columns, 2.3 * len(rows)), layout="constrained")
        for line, row in enumerate(rows):
            for column, sweep in enumerate(row, 1):
                axes = figure.add_subplot(len(rows), columns, line * columns + column)
                low, middle, high = zip(*sweep.spreads, strict=True)
                places = range(len(sweep.values))
                axes.fill_between(places, low, high, color=AFTER, alpha=0.2, linewidth=0)
                axes.plot(places, middle, color=AFTER, marker="o", markersize=3.5, linewidth=1.8)
                axes.set_xticks(places, sweep.values, fontsize=8)
                axes.set_title(sweep.title)
                axes.set_xlabel(sweep.setting)
        return _svg(figure, "-".join(sweep.title for row in rows for sweep in row))


def _line(axes: Axes, rows: Sequence[Row], key: str, color: str, label: str) -> None:
    points = [(row["iteration"], row[key]) for row in rows if row.get(key) is not None]
    marker = "o" if len(points) <= 30 else ""
    axes.plot(
        [x for x, _ in points],
        [y for _, y in points],
        color=color,
        marker=marker,
        markersize=3.5,
        linewidth=1.8,
        label=label,
    )


def _svg(figure: Figure, name: str) -> str:
    # Ids inside an SVG are hashes with this salt: unique among the plots of one page, and the same
    # in every run.
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(
            text, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    svg = text.getvalue()
    return svg[svg.index("<svg") :].replace("<svg ", '<svg aria-hidden="true" ', 1)

"""Plots of docs say what they are given."""

import re

import pytest

from instructloop.plots import Sweep, sweeps

MIX = Sweep("Text loss", "coefficient", ["0", "0.5", "2"], [(0.1, 0.2, 0.3), (0, 0, 0), (-1, 0, 1)])
LENGTH = Sweep("KL", "episodes", ["512", "1024"], [(0.0, 0.5, 1.0), (1.0, 2.0, 2.5)])


def markers(svg: str) -> list[tuple[float, float]]:
    """Where the medians stand, in the order in which they are drawn."""
    found = re.findall(
        r'<use xlink:href="#m\w+" x="([\d.]+)" y="([\d.]+)" style="fill: #12655c; stroke: #12655c',
        svg,
    )
    return [(float(x), float(y)) for x, y in found]


def test_a_sweep_has_a_panel_with_its_medians() -> None:
    svg = sweeps([[MIX, LENGTH], [LENGTH]])
    assert svg.startswith("<svg ") and len(re.findall(r'id="axes_\d+"', svg)) == 3
    mix, length = markers(svg)[:3], markers(svg)[3:5]
    # Evenly apart; what is greater is higher, so that its y is less.
    assert mix[1][0] - mix[0][0] == pytest.approx(mix[2][0] - mix[1][0])
    assert mix[0][1] < mix[1][1] == mix[2][1]
    assert length[0][1] > length[1][1]
    # Both panels of one row are level, and the next row is lower.
    assert markers(svg)[5][1] > max(y for _, y in mix + length)


def test_the_same_figures_are_drawn_by_the_same_bytes() -> None:
    assert sweeps([[MIX]]) == sweeps([[MIX]]) != sweeps([[LENGTH]])

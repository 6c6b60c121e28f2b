"""One look for all figures: a colour per policy that colour-blind readers can tell apart, readable at column width.

Colours are Okabe and Ito's set and Paul Tol's muted set. Where policies share a planner they share its colour and
differ in line style, marker and hatch, so that no figure depends on colour alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

#: Inches. A figure of COLUMN width reads at 8 pt in a paper's column and on a phone.
COLUMN = 3.5
WIDE = 7.2

#: Ink and grid; a page replaces them by its own colours (light or dark), so nothing else may use them.
INK = "#1a1b1c"
GRID = "#d4d6d9"

POLICY_COLOURS = {
    "static": "#66696d",
    "eplb": "#e69f00",
    "eplb-hierarchical": "#a6761d",
    "moeless": "#0072b2",
    "elastic": "#009e73",
    "elastic-ahead": "#00513b",
    "metro": "#56b4e9",
    "llep": "#d55e00",
    "craft": "#882255",
    "milp": "#5a4fcf",
    "oracle": "#cc79a7",
}
#: For things that are no policy: layers, models, distances, predictors.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#66696d")
#: For policies that are not built in.
STRANGERS = ("#999933", "#44aa99", "#aa4499", "#88ccee")
LINES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.2, 1.4)), (0, (5, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "////", "....", "xxxx", "----")

#: Sequential and diverging maps, both perceptually even.
SEQUENTIAL = "cividis"

RC = {
    "figure.dpi": 100,
    "figure.facecolor": "white",
    "axes.facecolor": "none",
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.linewidth": 0.6,
    "grid.color": GRID,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "hatch.linewidth": 0.6,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True)
class Look:
    """How one policy or series is drawn."""

    colour: str
    line: Any
    marker: str
    hatch: str


def looks(policies: Sequence[str]) -> dict[str, Look]:
    """A look for each policy (``planner[:predictor[:distance]]``), in the order given."""
    chosen: dict[str, Look] = {}
    used: dict[str, int] = {}
    strangers: dict[str, str] = {}
    for policy in policies:
        planner = policy.partition(":")[0].partition(" ")[0]
        if planner in POLICY_COLOURS:
            colour = POLICY_COLOURS[planner]
        else:
            colour = strangers.setdefault(planner, STRANGERS[len(strangers) % len(STRANGERS)])
        order = used.get(planner, 0)
        used[planner] = order + 1
        marker = MARKERS[
            list(dict.fromkeys(p.partition(":")[0].partition(" ")[0] for p in policies)).index(planner) % len(MARKERS)
        ]
        chosen[policy] = Look(colour, LINES[order % len(LINES)], marker, HATCHES[order % len(HATCHES)])
    return chosen


def series(names: Sequence[str]) -> dict[str, Look]:
    """A look for each of a few series that are no policies."""
    return {
        name: Look(SERIES[i % len(SERIES)], LINES[i % len(LINES)], MARKERS[i % len(MARKERS)], HATCHES[i % len(HATCHES)])
        for i, name in enumerate(names)
    }


@contextmanager
def drawing() -> Iterator[Any]:
    """``matplotlib.pyplot`` under this style, without a display."""
    import matplotlib as mpl

    mpl.use("Agg", force=False)
    import matplotlib.pyplot as plt

    with mpl.rc_context(RC):
        yield plt


@contextmanager
def canvas(rows: int = 1, columns: int = 1, **options: Any) -> Iterator[tuple[Any, Any]]:
    """A new figure and its axes under this style; ``options`` are those of ``matplotlib.pyplot.subplots``."""
    with drawing() as plt:
        figure, axes = plt.subplots(rows, columns, layout="constrained", **options)
        yield figure, axes
        plt.close(figure)


def heading(figure: Any, text: str) -> None:
    """The heading of a figure of several panels."""
    figure.suptitle(text, x=0.01, ha="left", fontsize=8.5, fontweight="bold")


def horizontal(axes: Any) -> None:
    """The grid of horizontal bars: lines for their values, none for their names."""
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")

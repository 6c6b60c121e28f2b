"""Line figures with confidence bands, for anything measured over layers, distances or thresholds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from moeless.report import style


@dataclass(frozen=True)
class Line:
    """Points of one series; ``low`` and ``high`` bound each point where known.

    ``left`` and ``right`` bound it along x instead, as for the percentiles of a distribution.
    """

    x: ArrayLike
    y: ArrayLike
    low: ArrayLike | None = None
    high: ArrayLike | None = None
    left: ArrayLike | None = None
    right: ArrayLike | None = None


def lines(
    series: Mapping[str, Line],
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    policies: bool = False,
    whole_x: bool = False,
    reference: float | None = None,
    reference_label: str = "",
    ylim: tuple[float | None, float | None] = (None, None),
    log_x: bool = False,
    log_y: bool = False,
    height: float = 2.4,
) -> Any:
    """Draw every series with its band; the legend stands below, so that it never covers data."""
    names = list(series)
    look = style.looks(names) if policies else style.series(names)
    legend = [*names, reference_label] if reference_label else names
    columns = legend_columns(legend or [""])
    # the legend's rows add to the height, so that they never squeeze the axes
    height += 0.16 * max(0, -(-len(legend) // columns) - 1)
    with style.drawing() as plt:
        figure, axes = plt.subplots(figsize=(style.COLUMN, height), layout="constrained")
        for name, line in series.items():
            _draw(axes, name, line, look[name])
        if reference is not None:
            axes.axhline(
                reference, color=style.INK, linewidth=0.8, linestyle=(0, (4, 2)), label=reference_label or None
            )
        axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
        axes.set_ylim(*ylim)
        _scales(axes, log_x, log_y, whole_x)
        if not log_y:
            _room(axes, ylim, reference)
        if len(names) > 1 or reference_label:
            figure.legend(loc="outside lower center", ncols=columns)
        plt.close(figure)
    return figure


def panels(
    grid: Mapping[str, Mapping[str, Line]],
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    policies: bool = False,
    whole_x: bool = False,
    columns: int = 3,
    log_x: bool = False,
    share_y: bool = True,
) -> Any:
    """Small multiples: one panel per key of ``grid``, one look per series over all panels."""
    names = list(dict.fromkeys(name for panel in grid.values() for name in panel))
    look = style.looks(names) if policies else style.series(names)
    # four panels stand two by two
    columns = min(2 if len(grid) == 4 else columns, len(grid))
    rows = -(-len(grid) // columns)
    width = style.COLUMN if columns == 1 else style.WIDE
    # the legend's rows add to the height, so that they never squeeze the axes
    below = 0.16 * (-(-len(names) // legend_columns(names or [""], width)) - 1)
    with style.drawing() as plt:
        figure, axes_YX = plt.subplots(
            rows,
            columns,
            figsize=(width, 0.6 + 1.85 * rows + below),
            layout="constrained",
            sharey=share_y,
            squeeze=False,
        )
        flat = axes_YX.ravel()
        for axes, (panel, series) in zip(flat, grid.items(), strict=False):
            for name, line in series.items():
                _draw(axes, name, line, look[name])
            axes.set_title(panel, fontweight="normal")
            _scales(axes, log_x, False, whole_x)
        for axes in flat[len(grid) :]:
            axes.set_axis_off()
        for axes in axes_YX[-1]:
            axes.set_xlabel(xlabel)
        figure.supylabel(ylabel, fontsize=8)
        figure.suptitle(title, x=0.01, ha="left", fontsize=8.5, fontweight="bold")
        handles: dict[str, Any] = {}
        for axes in flat:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        if len(handles) > 1:
            figure.legend(
                handles.values(),
                handles.keys(),
                loc="outside lower center",
                ncols=legend_columns(list(handles), width),
            )
        plt.close(figure)
    return figure


def _draw(axes: Any, name: str, line: Line, look: style.Look) -> None:
    x, y = np.asarray(line.x, np.float64), np.asarray(line.y, np.float64)
    few = len(x) <= 40
    axes.plot(x, y, color=look.colour, linestyle=look.line, marker=look.marker if few else None, label=name)
    if line.low is not None and line.high is not None:
        low, high = np.asarray(line.low, np.float64), np.asarray(line.high, np.float64)
        axes.fill_between(x, low, high, color=look.colour, alpha=0.18, linewidth=0)
    if line.left is not None and line.right is not None:
        left, right = np.asarray(line.left, np.float64), np.asarray(line.right, np.float64)
        axes.fill_betweenx(y, left, right, color=look.colour, alpha=0.18, linewidth=0)


def _scales(axes: Any, log_x: bool, log_y: bool, whole_x: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    if log_x:
        axes.set_xscale("log")
        _few_log_ticks(axes.xaxis)
    if log_y:
        axes.set_yscale("log")
    if whole_x and not log_x:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))


def _room(axes: Any, ylim: tuple[float | None, float | None], reference: float | None) -> None:
    """Lines do not run along the upper edge, and noise below a per cent does not look like a finding."""
    axes.ticklabel_format(axis="y", useOffset=False)
    if ylim == (0, None) and axes.dataLim.ymax > 0:
        axes.set_ylim(0, 1.08 * axes.dataLim.ymax)
    low, high = axes.get_ylim()
    least = 0.02 * abs(reference or 0.0)
    if ylim == (None, None) and high - low < least:
        middle = (low + high) / 2
        axes.set_ylim(middle - least / 2, middle + least / 2)


def _few_log_ticks(axis: Any) -> None:
    """Labels that do not run into each other: powers of ten, or round numbers where there are too few powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_minor_formatter(NullFormatter())
    low, high = axis.get_view_interval()
    if low > 0 and high / low < 100:
        axis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=5))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def legend_columns(names: Sequence[str], width: float = style.COLUMN) -> int:
    """How many legend entries fit beside each other, at 8 pt in ``width`` inches."""
    longest = max(map(len, names))
    return max(1, min(len(names), int(width / (0.45 + 0.068 * longest))))

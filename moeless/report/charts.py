"""Charts of plain numbers: lines with bands, bars with whiskers, heat maps, the trials of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from moeless.contracts import FloatArray, IntArray
from moeless.report import style

#: A bar so many times the shortest scale leaves the others invisible: then the axis is logarithmic.
_WIDE = 20.0


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
) -> Any:
    """Draw every series with its band; the legend stands below, so that it never covers data."""
    names = list(series)
    look = style.looks(names) if policies else style.series(names)
    legend = [*names, reference_label] if reference_label else names
    columns = legend_columns(legend or [""])
    # the legend's rows add to the height, so that they never squeeze the axes
    height = 2.4 + 0.16 * max(0, -(-len(legend) // columns) - 1)
    with style.canvas(figsize=(style.COLUMN, height)) as (figure, axes):
        for name, line in series.items():
            _draw(axes, name, line, look[name])
        if reference is not None:
            axes.axhline(
                reference, color=style.INK, linewidth=0.8, linestyle=(0, (4, 2)), label=reference_label or None
            )
        axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
        axes.set_ylim(*ylim)
        _scales(axes, log_x, whole_x)
        _room(axes, ylim, reference)
        if len(names) > 1 or reference_label:
            figure.legend(loc="outside lower center", ncols=columns)
    return figure


def layer_imbalance(imbalance_SL: Mapping[str, ArrayLike], title: str) -> Any:
    """One line per series over MoE layers; 1 is balanced."""
    series = {name: Line(np.arange(np.size(value_L)), value_L) for name, value_L in imbalance_SL.items()}
    return lines(series, xlabel="MoE layer", ylabel="imbalance (max ÷ mean)", title=title, whole_x=True, reference=1.0)


def panels(
    grid: Mapping[str, Mapping[str, Line]],
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    policies: bool = False,
    log_x: bool = False,
) -> Any:
    """Small multiples: one panel per key of ``grid``, one look per series over all panels."""
    names = list(dict.fromkeys(name for panel in grid.values() for name in panel))
    look = style.looks(names) if policies else style.series(names)
    # four panels stand two by two
    columns = min(2 if len(grid) == 4 else 3, len(grid))
    rows = -(-len(grid) // columns)
    width = style.COLUMN if columns == 1 else style.WIDE
    # the legend's rows add to the height, so that they never squeeze the axes
    below = 0.16 * (-(-len(names) // legend_columns(names or [""], width)) - 1)
    size = (width, 0.6 + 1.85 * rows + below)
    with style.canvas(rows, columns, figsize=size, sharey=True, squeeze=False) as (figure, axes_YX):
        flat = axes_YX.ravel()
        handles: dict[str, Any] = {}
        for axes, (panel, series) in zip(flat, grid.items(), strict=False):
            for name, line in series.items():
                handles.setdefault(name, _draw(axes, name, line, look[name]))
            axes.set_title(panel, fontweight="normal")
            _scales(axes, log_x)
        for axes in flat[len(grid) :]:
            axes.set_axis_off()
        for axes in axes_YX[-1]:
            axes.set_xlabel(xlabel)
        figure.supylabel(ylabel, fontsize=8)
        style.heading(figure, title)
        if len(handles) > 1:
            columns = legend_columns(list(handles), width)
            figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)
    return figure


def _draw(axes: Any, name: str, line: Line, look: style.Look) -> Any:
    """Draw a line with its bands; returns its handle for a legend."""
    x, y = np.asarray(line.x, np.float64), np.asarray(line.y, np.float64)
    marker = look.marker if len(x) <= 40 else None
    (handle,) = axes.plot(x, y, color=look.colour, linestyle=look.line, marker=marker, label=name)
    band = {"color": look.colour, "alpha": 0.18, "linewidth": 0}
    if line.low is not None and line.high is not None:
        axes.fill_between(x, np.asarray(line.low, np.float64), np.asarray(line.high, np.float64), **band)
    if line.left is not None and line.right is not None:
        axes.fill_betweenx(y, np.asarray(line.left, np.float64), np.asarray(line.right, np.float64), **band)
    return handle


def _whole(axis: Any, ticks: int) -> None:
    """Whole numbers at so many ticks at most."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=ticks, integer=True))


def _scales(axes: Any, log_x: bool, whole_x: bool = False) -> None:
    if log_x:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axes.set_xscale("log")
        # labels must not run into each other: powers of ten, or round numbers where there are too few powers
        axes.xaxis.set_minor_formatter(NullFormatter())
        low, high = axes.xaxis.get_view_interval()
        if low > 0 and high / low < 100:
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=5))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    elif whole_x:
        _whole(axes.xaxis, 8)


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


def legend_columns(names: Sequence[str], width: float = style.COLUMN) -> int:
    """How many legend entries fit beside each other, at 8 pt in ``width`` inches."""
    return max(1, min(len(names), int(width / (0.45 + 0.068 * max(map(len, names))))))


@dataclass(frozen=True)
class Bars:
    """One series: a bar per name; ``low`` and ``high`` end the whiskers (NaN: none).

    ``colours`` is one colour or one per bar; ``alpha`` makes a paler series of the same colours.
    """

    values: ArrayLike
    low: ArrayLike | None = None
    high: ArrayLike | None = None
    colours: str | Sequence[str] = style.SERIES[0]
    alpha: float = 1.0


def bars(
    names: Sequence[str],
    series: Mapping[str, Bars],
    *,
    xlabel: str,
    title: str,
    digits: int = 2,
    reference: float | None = 1.0,
    legend: bool = True,
) -> Any:
    """Grouped bars, names from top to bottom; each bar's value stands at the right."""
    inner = 0.24 if len(series) == 1 else 0.19 * len(series) + 0.06
    with style.canvas(figsize=(style.COLUMN, 0.85 + inner * len(names))) as (figure, axes):
        y, height = np.arange(len(names))[::-1], 0.8 / len(series)
        wide = max(float(np.nanmax(np.asarray(one.values, np.float64))) for one in series.values()) > _WIDE
        # on a logarithmic axis a bar has to start somewhere
        start = 0.5 if wide else 0.0
        for order, (label, one) in enumerate(series.items()):
            value_N = np.asarray(one.values, np.float64)
            place = y + ((len(series) - 1) / 2 - order) * height
            look = {"color": one.colours, "alpha": one.alpha, "label": label}
            axes.barh(place, value_N - start, height * 0.9, left=start, **look)
            if one.low is not None and one.high is not None:
                whiskers(axes, value_N, place, one.low, one.high, horizontal=True)
            for at, value in zip(place, value_N, strict=True):
                # beside the axes: behind the bars the figures would run into lines and whiskers
                beside(axes, at, f"{value:.{digits}f}", fontsize=6.5)
        if wide:
            axes.set_xscale("log")
        if reference is not None:
            axes.axvline(reference, color=style.INK, linewidth=0.7)
        axes.set_yticks(y, names)
        style.horizontal(axes)
        axes.margins(x=0.04)
        axes.set(xlabel=xlabel, title=title)
        if legend and len(series) > 1:
            figure.legend(loc="outside lower center", ncols=2)
    return figure


def beside(axes: Any, place: float, text: str, *, fontsize: float) -> None:
    """Text at the right of the axes, at the height of a bar."""
    axes.text(1.01, place, text, transform=axes.get_yaxis_transform(), va="center", fontsize=fontsize)


def policy_bars(
    axes: Any, policies: Sequence[str], value_N: FloatArray, span_N2: FloatArray, *, height: float = 0.8
) -> IntArray:
    """Horizontal bars in the policies' looks, with whiskers where ``span_N2`` is known; returns their places on y."""
    y, look = np.arange(len(policies))[::-1], style.looks(policies)
    for place, value, policy in zip(y, value_N, policies, strict=True):
        one = look[policy]
        axes.barh(place, value, height, color=one.colour, hatch=one.hatch, edgecolor="white", linewidth=0)
    whiskers(axes, value_N, y, span_N2[:, 0], span_N2[:, 1], horizontal=True)
    style.horizontal(axes)
    axes.locator_params(axis="x", nbins=4)
    return y


def whiskers(axes: Any, value: ArrayLike, place: ArrayLike, low: ArrayLike, high: ArrayLike, horizontal: bool) -> None:
    """Thin whiskers from ``low`` to ``high`` at bars' ends, where both are known."""
    every_4N = np.stack([np.asarray(each, np.float64) for each in (value, place, low, high)])
    value_N, place_N, low_N, high_N = every_4N[:, np.isfinite(every_4N).all(0)]
    # a bootstrap interval may end a hair beside its own mean
    span = np.stack([np.maximum(value_N - low_N, 0.0), np.maximum(high_N - value_N, 0.0)])
    look = {"fmt": "none", "ecolor": style.INK, "elinewidth": 0.8, "capsize": 1.6, "capthick": 0.8}
    if horizontal:
        axes.errorbar(value_N, place_N, xerr=span, **look)
    else:
        axes.errorbar(place_N, value_N, yerr=span, **look)


def _heat(figure: Any, axes: Any, value: FloatArray, label: str, **look: Any) -> None:
    image = axes.imshow(value, interpolation="nearest", **look)
    axes.grid(False)
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label(label)
    bar.outline.set_visible(False)


def popularity(load_LE: ArrayLike, title: str = "Expert popularity") -> Any:
    """Heat map of each layer's load per expert; 1 is an even share.

    Args:
        load_LE: tokens assigned, ``[L, E]``.
    """
    load = np.asarray(load_LE, np.float64)
    total = load.sum(1, keepdims=True)
    share = np.divide(load * load.shape[1], total, out=np.zeros_like(load), where=total > 0)
    height = float(np.clip(0.9 + 0.085 * load.shape[0], 1.7, 5.0))
    with style.canvas(figsize=(style.COLUMN, height)) as (figure, axes):
        _heat(figure, axes, share, "load ÷ even share", aspect="auto", cmap=style.SEQUENTIAL, vmin=0)
        axes.set(xlabel=f"expert   (n = {int(total[0, 0]):,} assignments a layer)", ylabel="MoE layer", title=title)
        _whole(axes.xaxis, 9)
        _whole(axes.yaxis, 7)
    return figure


def coactivation(ratio_EE: FloatArray, layer: int) -> Any:
    """Heat map of pairs of experts; 1 is independence."""
    log = np.log2(np.where(ratio_EE > 0, ratio_EE, np.nan))
    finite = np.abs(log[np.isfinite(log)])
    limit = max(0.5, float(np.quantile(finite, 0.98))) if len(finite) else 1.0
    with style.canvas(figsize=(style.COLUMN, 3.0)) as (figure, axes):
        _heat(figure, axes, log, "log2 (observed ÷ independent)", cmap="PuOr_r", vmin=-limit, vmax=limit)
        axes.set(xlabel="expert", ylabel="expert", title=f"Experts used together, MoE layer {layer}")
    return figure


def expert_bars(load_SE: Mapping[str, ArrayLike], title: str) -> Any:
    """Load per expert as bars, one panel for each named load vector; the line marks the even share."""
    look, size = style.series(list(load_SE)), (style.COLUMN, 0.55 + 1.05 * len(load_SE))
    with style.canvas(len(load_SE), 1, figsize=size, sharex=True, squeeze=False) as (figure, grid):
        for axes, (name, load_E) in zip(grid[:, 0], load_SE.items(), strict=True):
            load = np.asarray(load_E, np.float64)
            share = 100.0 * load / max(load.sum(), 1.0)
            axes.bar(np.arange(len(load)), share, color=look[name].colour, width=0.8)
            axes.axhline(100.0 / len(load), color=style.INK, linewidth=0.8, linestyle=(0, (4, 2)))
            axes.set_title(f"{name}   max ÷ mean {share.max() * len(load) / 100:.2f}", fontweight="normal")
            axes.set_ylabel("load (%)")
            _whole(axes.xaxis, 9)
        grid[-1, 0].set_xlabel("expert")
        style.heading(figure, title)
    return figure


def pareto(
    values_NM: FloatArray,
    front_N: Sequence[int],
    labels: Sequence[str],
    *,
    default: int | None = None,
    knee: int | None = None,
    title: str = "",
) -> Any:
    """Trials in the plane of the first two objectives, with the front joined.

    Args:
        values_NM: objectives of each finished trial.
        front_N: rows of ``values_NM`` on the front.
        labels: of the objectives.
        default, knee: rows of the untuned policy and of the recommended one.
    """
    colour = style.SERIES
    others = np.setdiff1d(np.arange(len(values_NM)), front_N)
    front = values_NM[list(front_N)]
    front = front[np.argsort(front[:, 0])]
    with style.canvas(figsize=(style.COLUMN, 2.6)) as (figure, axes):
        axes.scatter(*values_NM[others, :2].T, s=14, color=colour[7], alpha=0.5, linewidth=0, label="trial")
        axes.plot(front[:, 0], front[:, 1], color=colour[0], marker="o", label="Pareto front")
        for row, mark, name, shade in ((default, "s", "default", colour[1]), (knee, "D", "knee", colour[2])):
            if row is not None:
                axes.scatter(*values_NM[row, :2], s=46, marker=mark, color=shade, zorder=3, label=name)
        axes.set(xlabel=labels[0], ylabel=labels[1], title=title)
        axes.grid(axis="x")
        figure.legend(loc="outside lower center", ncols=4)
    return figure


def progress(value_N: FloatArray, label: str, *, maximise: bool = False, title: str = "") -> Any:
    """Each trial's value and the best so far; trials without a value are NaN."""
    best = (np.fmax if maximise else np.fmin).accumulate(value_N)
    trial = np.arange(len(value_N))
    with style.canvas(figsize=(style.COLUMN, 2.4)) as (figure, axes):
        axes.scatter(trial, value_N, s=14, color=style.SERIES[7], alpha=0.6, linewidth=0, label="trial")
        axes.step(trial, best, where="post", color=style.SERIES[0], label="best so far")
        axes.set(xlabel="trial", ylabel=label, title=title)
        figure.legend(loc="outside lower center", ncols=2)
    return figure

"""Horizontal bars with whiskers: variants of one system beside each other, relative to one of them."""

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
    with style.drawing() as plt:
        figure, axes = plt.subplots(figsize=(style.COLUMN, 0.85 + inner * len(names)), layout="constrained")
        y, height = np.arange(len(names))[::-1], 0.8 / len(series)
        largest = max(float(np.nanmax(np.asarray(one.values, np.float64))) for one in series.values())
        wide = largest > _WIDE
        # on a logarithmic axis a bar has to start somewhere
        start = 0.5 if wide else 0.0
        for order, (label, one) in enumerate(series.items()):
            value_N = np.asarray(one.values, np.float64)
            place = y + ((len(series) - 1) / 2 - order) * height
            axes.barh(
                place,
                value_N - start,
                height * 0.9,
                left=start,
                color=one.colours,
                alpha=one.alpha,
                label=label,
            )
            if one.low is not None and one.high is not None:
                low_N, high_N = np.asarray(one.low, np.float64), np.asarray(one.high, np.float64)
                known = np.isfinite(low_N) & np.isfinite(high_N)
                whiskers(axes, value_N[known], place[known], low_N[known], high_N[known], horizontal=True)
            for at, value in zip(place, value_N, strict=True):
                # beside the axes: behind the bars the figures would run into lines and whiskers
                axes.text(
                    1.01, at, f"{value:.{digits}f}", transform=axes.get_yaxis_transform(), va="center", fontsize=6.5
                )
        if wide:
            axes.set_xscale("log")
        if reference is not None:
            axes.axvline(reference, color=style.INK, linewidth=0.7)
        axes.set_yticks(y, names)
        axes.grid(True, axis="x")
        axes.grid(False, axis="y")
        axes.margins(x=0.04)
        axes.set(xlabel=xlabel, title=title)
        if legend and len(series) > 1:
            figure.legend(loc="outside lower center", ncols=2)
        plt.close(figure)
    return figure


def policy_bars(
    axes: Any, policies: Sequence[str], value_N: FloatArray, span_N2: FloatArray, *, height: float = 0.8
) -> IntArray:
    """Horizontal bars in the policies' looks, with whiskers where ``span_N2`` is known; returns their places on y."""
    y, look = np.arange(len(policies))[::-1], style.looks(policies)
    for place, value, policy in zip(y, value_N, policies, strict=True):
        one = look[policy]
        axes.barh(place, value, height, color=one.colour, hatch=one.hatch, edgecolor="white", linewidth=0)
    known = np.isfinite(span_N2).all(1)
    low_N, high_N = span_N2[known].T
    whiskers(axes, value_N[known], y[known], low_N, high_N, horizontal=True)
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    axes.locator_params(axis="x", nbins=4)
    return y


def whiskers(axes: Any, value: ArrayLike, place: ArrayLike, low: ArrayLike, high: ArrayLike, horizontal: bool) -> None:
    """Thin whiskers from ``low`` to ``high`` at bars' ends."""
    value_N, low_N, high_N = (np.asarray(each, np.float64) for each in (value, low, high))
    # a bootstrap interval may end a hair beside its own mean
    span = np.stack([np.maximum(value_N - low_N, 0.0), np.maximum(high_N - value_N, 0.0)])
    look = {"fmt": "none", "ecolor": style.INK, "elinewidth": 0.8, "capsize": 1.6, "capthick": 0.8}
    if horizontal:
        axes.errorbar(value_N, place, xerr=span, **look)
    else:
        axes.errorbar(place, value_N, yerr=span, **look)

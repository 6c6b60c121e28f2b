"""Figures of a tuning study: its front, or its progress where there is one objective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moeless.contracts import FloatArray
from moeless.report import style


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
    with style.drawing() as plt:
        figure, axes = plt.subplots(figsize=(style.COLUMN, 2.6), layout="constrained")
        colour = style.SERIES
        others = np.setdiff1d(np.arange(len(values_NM)), front_N)
        axes.scatter(*values_NM[others, :2].T, s=14, color=colour[7], alpha=0.5, linewidth=0, label="trial")
        front = values_NM[list(front_N)]
        front = front[np.argsort(front[:, 0])]
        axes.plot(front[:, 0], front[:, 1], color=colour[0], marker="o", label="Pareto front")
        for row, mark, name, shade in ((default, "s", "default", colour[1]), (knee, "D", "knee", colour[2])):
            if row is not None:
                axes.scatter(*values_NM[row, :2], s=46, marker=mark, color=shade, zorder=3, label=name)
        axes.set(xlabel=labels[0], ylabel=labels[1], title=title)
        axes.grid(axis="x")
        figure.legend(loc="outside lower center", ncols=4)
        plt.close(figure)
    return figure


def progress(value_N: FloatArray, label: str, *, maximise: bool = False, title: str = "") -> Any:
    """Each trial's value and the best so far; trials without a value are NaN."""
    best = np.fmax.accumulate(value_N) if maximise else np.fmin.accumulate(value_N)
    trial = np.arange(len(value_N))
    with style.drawing() as plt:
        figure, axes = plt.subplots(figsize=(style.COLUMN, 2.4), layout="constrained")
        axes.scatter(trial, value_N, s=14, color=style.SERIES[7], alpha=0.6, linewidth=0, label="trial")
        axes.step(trial, best, where="post", color=style.SERIES[0], label="best so far")
        axes.set(xlabel="trial", ylabel=label, title=title)
        figure.legend(loc="outside lower center", ncols=2)
        plt.close(figure)
    return figure

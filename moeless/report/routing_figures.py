"""Figures of what was routed where, drawn from arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from moeless.report import style


def popularity(load_LE: ArrayLike, title: str = "Expert popularity") -> Any:
    """Heat map of each layer's load per expert; 1 is an even share.

    Args:
        load_LE: tokens assigned, ``[L, E]``.
    """
    load = np.asarray(load_LE, np.float64)
    total = load.sum(1, keepdims=True)
    share = np.divide(load * load.shape[1], total, out=np.zeros_like(load), where=total > 0)
    with style.drawing() as plt:
        height = float(np.clip(0.9 + 0.085 * load.shape[0], 1.7, 5.0))
        figure, axes = plt.subplots(figsize=(style.COLUMN, height), layout="constrained")
        image = axes.imshow(share, aspect="auto", cmap=style.SEQUENTIAL, vmin=0, interpolation="nearest")
        axes.grid(False)
        axes.set(xlabel=f"expert   (n = {int(total[0, 0]):,} assignments a layer)", ylabel="MoE layer", title=title)
        _whole_ticks(axes)
        bar = figure.colorbar(image, ax=axes, pad=0.02)
        bar.set_label("load ÷ even share")
        bar.outline.set_visible(False)
        plt.close(figure)
    return figure


def layer_imbalance(
    values: Mapping[str, ArrayLike],
    ylabel: str = "imbalance (max ÷ mean)",
    title: str = "Imbalance per layer",
    bands: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    policies: bool = False,
) -> Any:
    """One line per series over MoE layers, with an optional band of low and high values."""
    names = list(values)
    look = style.looks(names) if policies else style.series(names)
    with style.drawing() as plt:
        figure, axes = plt.subplots(figsize=(style.COLUMN, 2.3), layout="constrained")
        for name in names:
            y = np.asarray(values[name], np.float64)
            x = np.arange(len(y))
            axes.plot(
                x,
                y,
                color=look[name].colour,
                linestyle=look[name].line,
                marker=look[name].marker,
                label=name,
                markevery=max(1, len(y) // 12),
            )
            if bands and name in bands:
                low, high = (np.asarray(part, np.float64) for part in bands[name])
                axes.fill_between(x, low, high, color=look[name].colour, alpha=0.18, linewidth=0)
        axes.axhline(1.0, color=style.INK, linewidth=0.7)
        axes.set(xlabel="MoE layer", ylabel=ylabel, title=title)
        _whole_ticks(axes, y=False)
        if len(names) > 1:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.24), ncols=min(3, len(names)))
        plt.close(figure)
    return figure


def expert_bars(load_SE: Mapping[str, ArrayLike], title: str, counts: Sequence[int] | None = None) -> Any:
    """Load per expert as bars, one panel for each named load vector; the line marks the even share."""
    names = list(load_SE)
    look = style.series(names)
    with style.drawing() as plt:
        figure, grid = plt.subplots(
            len(names), 1, figsize=(style.COLUMN, 0.55 + 1.05 * len(names)), layout="constrained", sharex=True
        )
        for axes, name in zip(np.atleast_1d(grid), names, strict=True):
            load = np.asarray(load_SE[name], np.float64)
            share = 100.0 * load / max(load.sum(), 1.0)
            axes.bar(np.arange(len(load)), share, color=look[name].colour, width=0.8)
            axes.axhline(100.0 / len(load), color=style.INK, linewidth=0.8, linestyle=(0, (4, 2)))
            axes.set_title(f"{name}   max ÷ mean {share.max() * len(load) / 100:.2f}", fontweight="normal")
            axes.set_ylabel("load (%)")
            _whole_ticks(axes, y=False)
        np.atleast_1d(grid)[-1].set_xlabel("expert")
        figure.suptitle(title, x=0.01, ha="left", fontsize=8.5, fontweight="bold")
        plt.close(figure)
    return figure


def _whole_ticks(axes: Any, y: bool = True) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
    if y:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))

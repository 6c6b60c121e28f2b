"""A result file on a page: three sentences, tables per cost model, figures of layer time and bills, warnings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moeless.contracts import FloatArray
from moeless.metrics import catalogue
from moeless.metrics.result import Cell, Result
from moeless.report import style
from moeless.report.charts import legend_columns, policy_bars
from moeless.report.page import Figure, Section, Table, Text
from moeless.tracking.run import Run, slug

_GROUND = {
    "measured": "measured by running it",
    "simulated": "simulated from recorded routing",
    "synthetic": "simulated from synthetic routing",
    "stated": "stated by a paper",
}


def groups(result: Result) -> dict[tuple[str, str, str], list[Cell]]:
    """Cells that may be compared with each other: one model, one cluster, one cost model."""
    found: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in result.cells:
        found.setdefault((cell.model, cell.cluster, cell.costs), []).append(cell)
    return found


def baseline(cells: Sequence[Cell], cell: Cell | None = None) -> Cell | None:
    """Static EP among ``cells``: the one with ``cell``'s settings where there is one."""
    static = [other for other in cells if other.policy.partition(":")[0] == "static"]
    if cell is not None:
        same = [other for other in static if other.settings == cell.settings]
        static = same or static
    return static[0] if static else None


def _than_static(percent: float | None) -> str:
    if percent is None:
        return "with no static EP to compare with"
    if abs(percent) < 0.05:
        return "the same as static EP"
    return f"{abs(percent):.1f} % {'below' if percent < 0 else 'above'} static EP"


def _time(milliseconds: float) -> str:
    return f"{milliseconds * 1e3:.3g} µs" if milliseconds < 1 else f"{milliseconds:.3g} ms"


def summarise(result: Result) -> list[str]:
    """The three sentences; lossy policies are never called the best."""
    if not result.cells:
        return ["The run ended without a result."]
    policies = list(dict.fromkeys(cell.policy for cell in result.cells))
    models = " and ".join(dict.fromkeys(cell.model for cell in result.cells))
    clusters = " and ".join(dict.fromkeys(cell.cluster for cell in result.cells))
    ground = " and ".join(_GROUND[kind] for kind in dict.fromkeys(cell.evidence for cell in result.cells))
    plural = "policies" if len(policies) > 1 else "policy"
    first = f"{len(policies)} {plural} served the same work of {models} on {clusters}, {ground}."
    return [first, _latency(result), _bill(result)]


def _best(cells: Sequence[Cell]) -> Cell | None:
    exact = [cell for cell in cells if not cell.lossy]
    return min(exact, key=lambda cell: cell.layer.mean_ms, default=None)


def _latency(result: Result) -> str:
    parts, found = [], groups(result)
    for (model, cluster, costs), cells in found.items():
        best = _best(cells)
        if best is None:
            continue
        static, time = baseline(cells, best), _time(best.layer.mean_ms)
        where = f"for {model} on {cluster} " if len({key[:2] for key in found}) > 1 else ""
        where += f"under the {costs} costs " if len(found) > 1 else ""
        if best is static:
            parts.append(f"{where}no policy was faster than static EP ({time} a layer)")
        else:
            saving = _than_static(catalogue.change(catalogue.BY_KEY["layer.mean_ms"], best, static))
            parts.append(f"{where}**{best.policy}** had the lowest mean MoE-layer time, {time}, {saving}")
    return _sentence("; ".join(parts))


def _bill(result: Result) -> str:
    parts, found = [], groups(result)
    for (_, _, costs), cells in found.items():
        best = _best(cells)
        static = baseline(cells, best)
        if best is None or static is None or best is static:
            continue
        name = f"{best.policy} ({costs} costs)" if len(found) > 1 else best.policy
        told = [f"{_than_static(catalogue.change(bill, best, static))} by {bill.rule}" for bill in catalogue.BILLS]
        parts.append(f"{name}: {', '.join(told)}")
    return _sentence("the bills of the fastest, " + "; ".join(parts)) if parts else "No policy's bill can be compared."


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "." if text else ""


COST_NOTES = {
    "paper": "The paper's linear costs: time proportional to tokens, the slowest replica counts, control is free.",
    "roofline": "Physical costs: an expert takes the longer of its arithmetic and its weight read, a GPU the sum over "
    "its replicas, and control is charged.",
    "measured": "Costs interpolated from a hardware profile.",
}


def result_sections(run: Run, result: Result, label: str = "") -> list[Section]:
    """One section per (model, cluster, cost model); figures are saved into the run folder.

    Args:
        label: shown on every figure, for example ``bundled model``.
    """
    found = groups(result)
    several = len({key[:2] for key in found}) > 1
    sections = []
    for (model, cluster, costs), cells in found.items():
        title = f"Latency and cost, {costs} costs" + (f": {model} on {cluster}" if several else "")
        blocks: list[Text | Table | Figure] = []
        if costs in COST_NOTES:
            blocks.append(Text(COST_NOTES[costs]))
        blocks += [layer_table(cells), billing_table(cells)]
        if any(cell.request is not None for cell in cells):
            blocks.append(_table("request page", cells, "Request latency"))
        blocks += _figures(run, cells, slug(f"{costs}-{model}-{cluster}") if several else costs, label)
        sections.append(Section(title, blocks))
    return sections


def warnings(result: Result) -> list[str]:
    """Every cell's warnings once, with the policies they concern where these are not all."""
    owners: dict[str, list[str]] = {}
    for cell in result.cells:
        for warning in cell.warnings:
            owners.setdefault(warning, []).append(cell.policy)
    everyone = {cell.policy for cell in result.cells}
    return [
        text if set(policies) == everyone else f"{', '.join(dict.fromkeys(policies))}: {text}"
        for text, policies in owners.items()
    ]


def layer_table(cells: Sequence[Cell]) -> Table:
    """Layer latency, balance and copies, one row per policy."""
    table = _table("layer page", cells, "MoE-layer time over all iterations and layers")
    rows = [[*row, cell.evidence] for row, cell in zip(table.rows, cells, strict=True)]
    return Table([*table.columns, "evidence"], rows, table.caption)


def billing_table(cells: Sequence[Cell]) -> Table:
    """The three bills and their difference to static EP."""
    held = "while it is in memory, and whole GPUs while they are held"
    return _table("billing page", cells, f"Three bills: an expert while its own layer runs (paper's rule), {held}")


def _table(view: catalogue.View, cells: Sequence[Cell], text: str) -> Table:
    rows: list[list[Any]] = []
    for name, cell in zip(names(cells), cells, strict=True):
        static = baseline(cells, cell)
        rows.append([name, *catalogue.values(view, cell, None if static is cell else static)])
    return Table(["policy", *catalogue.headings(view)], rows, _caption(cells, text))


def _figures(run: Run, cells: Sequence[Cell], stem: str, label: str) -> list[Figure]:
    drawings: list[tuple[bool, str, Callable[[Sequence[Cell]], Any], str]] = [
        (
            any(cell.layer.parts_ms for cell in cells),
            "parts",
            layer_time_parts,
            "Where a MoE layer's time goes, by policy; shorter is better",
        ),
        (
            any(cell.layer.cdf_ms for cell in cells),
            "cdf",
            layer_time_cdf,
            "Distribution of MoE-layer time; further left is better",
        ),
        (True, "bills", bills, "The same work billed by three rules; a saving under one rule can vanish under another"),
    ]
    made = []
    for known, name, draw, text in drawings:
        if known:
            caption = _caption(cells, text)
            path = run.figure(f"{name}-{stem}", draw(cells), caption=caption)
            made.append(Figure(path, caption, cells[0].evidence, label, wide=name == "bills"))
    return made


def _caption(cells: Sequence[Cell], text: str) -> str:
    lossy = " † changes the model's outputs; a yardstick, not a policy." if any(cell.lossy for cell in cells) else ""
    return f"{text}.{lossy}"


#: Part of a layer's time to its name and colour, in the order of the stack.
PARTS = {
    "expert": ("experts", "#0072b2"),
    "all_to_all": ("all-to-all", "#56b4e9"),
    "misc": ("other", "#b8bcc2"),
    "control": ("control", "#e69f00"),
    "stall": ("waiting for weights", "#d55e00"),
}
#: Billing rule to the label of its axis.
BILLS = {metric.key.partition(".")[2]: metric.columns["billing page"].label for metric in catalogue.BILLS}


def names(cells: Sequence[Cell]) -> list[str]:
    """Policies as shown: a lossy one carries a mark, repeated ones carry what sets them apart."""
    shown = [cell.policy + (" †" if cell.lossy else "") for cell in cells]
    if len(set(shown)) == len(shown):
        return shown
    varying = [
        key
        for key in dict.fromkeys(key for cell in cells for key in cell.settings)
        if len({str(cell.settings.get(key)) for cell in cells}) > 1
    ]
    details = [", ".join(f"{key} {cell.settings.get(key)}" for key in varying) for cell in cells]
    return [f"{name} ({detail})" if detail else name for name, detail in zip(shown, details, strict=True)]


def layer_time_parts(cells: Sequence[Cell], title: str = "Mean MoE-layer time") -> Any:
    """Stacked horizontal bars, one per policy: where a layer's time goes."""
    scale, unit = _time_unit(max(cell.layer.mean_ms for cell in cells))
    left, y = np.zeros(len(cells)), np.arange(len(cells))[::-1]
    with style.canvas(figsize=(style.COLUMN, 1.05 + 0.27 * len(cells))) as (figure, axes):
        for part, (label, colour) in PARTS.items():
            width = np.array([cell.layer.parts_ms.get(part, 0.0) for cell in cells]) * scale
            if width.any():
                axes.barh(y, width, left=left, color=colour, label=label, height=0.68)
                left += width
        for place, cell in zip(y, cells, strict=True):
            mean = cell.layer.mean_ms * scale
            axes.text(mean, place, f" {mean:.3g}", va="center", fontsize=7)
        axes.set_yticks(y, names(cells))
        style.horizontal(axes)
        axes.margins(x=0.12)
        axes.set(xlabel=f"mean time of one MoE layer ({unit})", title=f"{title}  ({_samples(cells)})")
        figure.legend(loc="outside lower center", ncols=3)
    return figure


def layer_time_cdf(
    cells: Sequence[Cell],
    title: str = "MoE-layer time, distribution",
    bands: Sequence[tuple[FloatArray, FloatArray]] = (),
) -> Any:
    """Cumulative distribution of layer time, one line per policy that kept its percentiles.

    ``bands`` are the low and high percentiles of each such cell, milliseconds.
    """
    kept = [cell for cell in cells if cell.layer.cdf_ms]
    shown, look = names(kept), style.looks([cell.policy for cell in kept])
    scale, unit = _time_unit(max((cell.layer.mean_ms for cell in kept), default=1.0))
    with style.canvas(figsize=(style.COLUMN, 2.5)) as (figure, axes):
        for cell, name in zip(kept, shown, strict=True):
            x, one = np.asarray(cell.layer.cdf_ms) * scale, look[cell.policy]
            axes.plot(x, np.linspace(0, 100, len(x)), color=one.colour, linestyle=one.line, label=name)
        for cell, (low, high) in zip(kept, bands, strict=False):
            y = np.linspace(0, 100, len(low))
            axes.fill_betweenx(y, low * scale, high * scale, color=look[cell.policy].colour, alpha=0.18, linewidth=0)
        spread = [value for cell in kept for value in cell.layer.cdf_ms if value > 0]
        if spread and max(spread) > 30 * min(spread):
            axes.set_xscale("log")
        axes.set(
            xlabel=f"time of one MoE layer ({unit})", ylabel="layers at most that slow (%)", ylim=(0, 101), title=title
        )
        figure.legend(loc="outside lower center", ncols=legend_columns(shown or [""]))
    return figure


def bills(
    cells: Sequence[Cell],
    title: str = "Three bills for the same work",
    spans: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> Any:
    """One panel per billing rule; a policy's bar has one colour in all of them.

    ``spans`` are each cell's low and high by a rule; a whisker shows them.
    """
    policies, unknown = [cell.policy for cell in cells], [(np.nan, np.nan)] * len(cells)
    size = (style.WIDE, 0.95 + 0.24 * len(cells))
    with style.canvas(1, 3, figsize=size, sharey=True) as (figure, grid):
        for axes, (rule, label) in zip(grid, BILLS.items(), strict=True):
            value_N = np.array([getattr(cell.billing, rule) for cell in cells])
            span_N2 = np.array((spans or {}).get(rule, unknown))
            y = policy_bars(axes, policies, value_N, span_N2)
            for place, value, high in zip(y, value_N, span_N2[:, 1], strict=True):
                axes.text(np.nanmax([value, high]), place, f" {_short(value)}", va="center", fontsize=7)
            axes.margins(x=0.22)
            axes.set_xlabel(label)
        grid[0].set_yticks(y, names(cells))
        style.heading(figure, title)
    return figure


def _samples(cells: Sequence[Cell]) -> str:
    counts = {cell.layer.samples for cell in cells}
    return f"n = {min(counts):,}" + ("" if len(counts) == 1 else f"–{max(counts):,}")


def _time_unit(largest_ms: float) -> tuple[float, str]:
    """Factor from milliseconds, and the unit, that keep numbers between 1 and 1000."""
    return (1e3, "µs") if largest_ms < 1.0 else (1.0, "ms") if largest_ms < 1e3 else (1e-3, "s")


def _short(value: float) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if suffix == 'k' else limit):.3g}{suffix}"
    return f"{value:,.0f}" if abs(value) >= 1e3 else f"{value:.3g}"

"""The claims as a document: what we find, relative to each baseline, and what would have to be true for the paper's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moeless.experiments import serving
from moeless.metrics import Cell
from moeless.spec import preset

#: The paper's mean changes, per cent (arXiv 2603.06350, abstract and evaluation).
STATED = {
    "latency vs Megatron-LM": -43.19,
    "latency vs EPLB": -21.89,
    "cost vs Megatron-LM": -92.68,
    "cost vs Oracle": -84.06,
    "cost vs EPLB": -95.11,
}
_BILLS = {"paper": "paper bill", "resident": "resident", "gpu_seconds": "GPU·s"}


def cells_of(rows: Sequence[Mapping[str, Any]]) -> list[Cell]:
    """The rows without their intervals."""
    return [serving.cell(row) for row in rows]


def name_of(cell: Cell) -> str:
    """The policy, with its extra slots where there is more than one."""
    slots = cell.settings.get("extra_slots", 1)
    return cell.policy + (f", {slots} extra slots" if slots != 1 else "")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def _change(mine: float | None, theirs: float | None) -> str:
    return f"{100 * (mine / theirs - 1):+.1f}".replace("-", "−") if mine is not None and theirs else "–"


def _groups(cells: Sequence[Cell]) -> dict[tuple[str, str], dict[str, Cell]]:
    """Cells by (model, costs), then by name."""
    groups: dict[tuple[str, str], dict[str, Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.model, cell.costs), {})[name_of(cell)] = cell
    return groups


def _where(model: str, mine: Mapping[str, Cell]) -> str:
    one = next(iter(mine.values()))
    return f"{model} ({one.evidence}, {one.cluster})"


def certain(rows: Sequence[Mapping[str, Any]]) -> str:
    """Changes with 90 % intervals, both runs resampled in the same blocks of iterations."""
    columns = ["model", "costs", "policy", "latency vs Megatron-LM", "latency vs EPLB", "paper bill vs Megatron-LM"]
    groups: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row, cell in zip(rows, cells_of(rows), strict=True):
        groups.setdefault((cell.model, cell.costs), {})[name_of(cell)] = row
    lines = []
    for (model, costs), mine in groups.items():
        static, eplb = mine.get("static"), mine.get("eplb:history")
        for name, row in mine.items():
            if name in ("static", "oracle") or static is None:
                continue
            texts = [
                _interval(row, base, what) for base, what in ((static, "seconds"), (eplb, "seconds"), (static, "bill"))
            ]
            lines.append([model, costs, name, *texts])
    return _table(columns, lines)


def _interval(mine: Mapping[str, Any], base: Mapping[str, Any] | None, what: str) -> str:
    if base is None or mine is base:
        return "–"
    middle, low, high = (100 * (value - 1) for value in serving.ratio(mine, base, what))
    known = "" if low != low else f" [{low:+.1f}, {high:+.1f}]"
    return f"{middle:+.1f}{known}".replace("-", "−")


def absolute(cells: Sequence[Cell]) -> str:
    """One row per model, cost model and policy: layer time and every bill."""
    columns = ["model", "costs", "policy", "layer µs", "imbalance", "replicas", "paper bill GB·s"]
    columns += ["paper bill, all layers GB·s", "resident GB·s", "GPU·s"]
    rows = []
    for (model, costs), mine in _groups(cells).items():
        for name, cell in mine.items():
            layer, bill = cell.layer, cell.billing
            figures = (1e3 * layer.mean_ms, layer.imbalance, layer.replicas, bill.paper, bill.paper_whole)
            texts = ["–" if value is None else f"{value:.4g}" for value in (*figures, bill.resident, bill.gpu_seconds)]
            rows.append([_where(model, mine), costs, name + (" †" if cell.lossy else ""), *texts])
    return _table(columns, rows)


def relative(cells: Sequence[Cell]) -> str:
    """One row per model, cost model and system, the baselines too: changes against each baseline, the paper's first."""
    columns = ["model", "costs", "policy", "latency vs Megatron-LM", "vs EPLB", "vs Oracle"]
    columns += [f"{bill} vs {other}" for bill in _BILLS.values() for other in ("Megatron-LM", "Oracle", "EPLB")]
    columns += ["own layer vs Megatron-LM's all layers"]
    stated = [f"{value:+.2f}".replace("-", "−") for value in STATED.values()]
    rows = [["the paper", "–", "MoEless", *stated[:2], "–", *stated[2:], *(["–"] * 7)]]
    for (model, costs), mine in _groups(cells).items():
        static, eplb, oracle = (mine.get(name) for name in ("static", "eplb:history", "oracle"))
        for name, cell in mine.items():
            if static is None:
                continue
            row = [_where(model, mine), costs, name + (" †" if cell.lossy else "")]
            row += [_change(cell.layer.mean_ms, o.layer.mean_ms if o else None) for o in (static, eplb, oracle)]
            for bill in _BILLS:
                row += [
                    _change(getattr(cell.billing, bill), getattr(o.billing, bill) if o else None)
                    for o in (static, oracle, eplb)
                ]
            rows.append([*row, _change(cell.billing.paper, static.billing.paper_whole)])
    return _table(columns, rows)


def implied() -> dict[str, float]:
    """What the paper's five means imply of each other if they compose, relative to Megatron-LM.

    Latencies, and costs over latencies, which is the memory that is billed.
    """
    kept = {name: 1.0 + value / 100.0 for name, value in STATED.items()}
    mine, cost = kept["latency vs Megatron-LM"], kept["cost vs Megatron-LM"]
    eplb_latency, eplb_cost = mine / kept["latency vs EPLB"], cost / kept["cost vs EPLB"]
    oracle_cost = cost / kept["cost vs Oracle"]
    return {
        "MoEless latency": mine,
        "MoEless memory": cost / mine,
        "EPLB latency": eplb_latency,
        "EPLB memory": eplb_cost / eplb_latency,
        # the oracle holds what Megatron-LM holds: its cost is its latency
        "Oracle latency": oracle_cost,
    }


def needed(cells: Sequence[Cell]) -> str:
    """What would have to be true for the paper's figures, beside what is, under the paper's own costs."""
    want = implied()
    columns = ["quantity, relative to Megatron-LM", "the paper implies"]
    groups = {model: mine for (model, costs), mine in _groups(cells).items() if costs == "paper" and "static" in mine}
    rows: dict[str, list[str]] = {
        "MoEless latency (perfect forecast)": [f"{want['MoEless latency']:.3f}"],
        "the same, 3 extra slots": [f"{want['MoEless latency']:.3f}"],
        "EPLB latency": [f"{want['EPLB latency']:.3f}"],
        "Oracle latency": [f"{want['Oracle latency']:.3f}"],
        "EPLB billed memory": [f"{want['EPLB memory']:.2f}"],
        "MoEless billed memory, own layer against own layer": [f"{want['MoEless memory']:.3f}"],
        "MoEless billed memory, own layer against all layers": [f"{want['MoEless memory']:.3f}"],
        "layer times that each copy is billed for, so that the cost is the paper's": ["–"],
    }
    for model, mine in groups.items():
        columns.append(_where(model, mine))
        static, best = mine["static"], mine.get("moeless:oracle:1")
        more = mine.get("moeless:oracle:1, 3 extra slots")
        eplb, oracle = mine.get("eplb:history"), mine.get("oracle")
        layers = preset(model).L

        def latency(cell: Cell | None, base: Cell = static) -> str:
            return "–" if cell is None else f"{cell.layer.mean_ms / base.layer.mean_ms:.3f}"

        memory = best.layer.replicas / static.layer.replicas if best else None
        billed = best.billing.paper / static.billing.paper_whole if best and static.billing.paper_whole else None
        texts = [
            latency(best),
            latency(more),
            latency(eplb),
            latency(oracle),
            "–" if eplb is None else f"{eplb.layer.replicas / static.layer.replicas:.2f}",
            "–" if memory is None else f"{memory:.3f}",
            "–" if memory is None else f"{memory / layers:.3f}",
            "–" if billed is None else f"{(1 + STATED['cost vs Megatron-LM'] / 100) / billed:.1f} of {layers}",
        ]
        for row, text in zip(rows.values(), texts, strict=True):
            row.append(text)
    return _table(columns, [[name, *values] for name, values in rows.items()])


def document(rows: Sequence[Mapping[str, Any]], command: str, state: Mapping[str, Any] | None) -> str:
    """The whole file; ``state`` is the code's revision, as ``tracking.environment.git_state`` tells it."""
    want, cells = implied(), cells_of(rows)
    code = "outside a checkout" if state is None else state["revision"] + (", changed" if state["dirty"] else "")
    served = {cell.model: f"{cell.settings['requests']} ({cell.layer.samples:,} layer runs)" for cell in cells}
    return (
        f"# Claims\n\nCommand: `{command}`. Code: {code}. Requests: "
        f"{', '.join(f'{model} {count}' for model, count in served.items())}.\n\n"
        "Changes in per cent, lower is better. Megatron-LM is `static`. Evidence: *synthetic* is made-up routing with "
        "the model's shapes, *simulated* is real routing. † changes the model's outputs. `moeless:oracle` has perfect "
        "forecasts, which the paper's system cannot exceed.\n\n"
        f"## Against each baseline\n\n{relative(cells)}\n"
        "The paper bill counts every system's experts only while their own layer runs. The last column bills "
        "Megatron-LM for all layers' experts all the time, MoEless by its own rule.\n\n"
        f"## How sure\n\n{certain(rows)}\n"
        f"Per cent; {serving.PAIRED}. They speak of this workload's iterations, not of other models or days.\n\n"
        f"## What would have to be true\n\n{needed(cells)}\n"
        "If the paper's five means compose, MoEless is billed for "
        f"{want['MoEless memory']:.3f} of Megatron-LM's memory, EPLB for {want['EPLB memory']:.2f} times as much, and "
        f"the Oracle takes {want['Oracle latency']:.3f} of Megatron-LM's time, so that Megatron-LM's slowest GPU takes "
        f"{1 / want['Oracle latency']:.2f} times the mean. A plan holds at least one copy of every expert: billed by "
        "one rule for all, MoEless's memory cannot lie below Megatron-LM's. The stated savings need a baseline that is "
        "billed for all its layers while MoEless is billed for some. The last row says for how many layer times each "
        "of MoEless's copies would be billed (its own, those before it in which it is pre-warmed, those after it in "
        "which it is kept) if the stated saving against Megatron-LM were met exactly.\n\n"
        f"## Absolute figures\n\n{absolute(cells)}"
    )

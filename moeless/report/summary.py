"""Three sentences that say what a result shows: what was served, who was fastest, what it cost."""

from __future__ import annotations

from collections.abc import Sequence

from moeless.metrics import catalogue
from moeless.metrics.result import Cell, Result

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

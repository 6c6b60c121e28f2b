"""What tuning may optimise: figures of a result cell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moeless.errors import UserError
from moeless.metrics.result import Cell


@dataclass(frozen=True)
class Objective:
    """One figure of a cell; ``value`` gives None where the run leaves it undefined."""

    name: str
    label: str
    value: Callable[[Cell], float | None]
    maximise: bool = False


def _request(field: str) -> Callable[[Cell], float | None]:
    return lambda cell: None if cell.request is None else getattr(cell.request, field)


OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        Objective("latency", "mean MoE-layer time (ms)", lambda cell: cell.layer.mean_ms),
        Objective("p99-latency", "p99 MoE-layer time (ms)", lambda cell: cell.layer.p99_ms),
        Objective("imbalance", "imbalance over GPUs", lambda cell: cell.layer.imbalance),
        Objective("replicas", "live replicas a layer", lambda cell: cell.layer.replicas),
        Objective("moved", "moved bytes", lambda cell: cell.layer.moved_bytes),
        Objective("cost", "resident bill (GB·s)", lambda cell: cell.billing.resident),
        Objective("paper-cost", "the paper's bill (GB·s)", lambda cell: cell.billing.paper),
        Objective("gpu-seconds", "GPU-seconds", lambda cell: cell.billing.gpu_seconds),
        Objective("ttft", "mean TTFT (ms)", _request("mean_ttft_ms")),
        Objective("tpot", "mean TPOT (ms)", _request("mean_tpot_ms")),
        Objective("e2e", "mean end-to-end latency (ms)", _request("mean_e2el_ms")),
        Objective("goodput", "goodput (requests/s)", _request("request_goodput"), maximise=True),
    )
}


def objectives(names: tuple[str, ...]) -> tuple[Objective, ...]:
    """Objectives of these names, in this order.

    Raises:
        UserError: there is none, one is unknown, or one is named twice.
    """
    if not names:
        raise UserError(f"tuning needs at least one objective of {', '.join(OBJECTIVES)}")
    for name in names:
        if name not in OBJECTIVES:
            raise UserError(f"no objective is called {name!r}; there are: {', '.join(OBJECTIVES)}")
    if len(set(names)) != len(names):
        raise UserError(f"an objective is named twice in {', '.join(names)}")
    return tuple(OBJECTIVES[name] for name in names)

"""One planner's cells of the gap-closed tables: plan, dispatch, time, compare.

Axes: I iterations, L layers, B (iteration, layer) pairs, E experts, S source ranks, R replicas.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from gap_forecasts import CACHE, forecasts
from gap_protocol import (
    Regime,
    Routing,
    bound_seconds,
    gap_closed,
    history_share_LE,
    pair_seconds,
    protocol_costs,
    sample_iterations,
)

from moeless.contracts import Budget, FloatArray, Forecast, IntArray, LayerPlan, PlanInput
from moeless.placement import PLANNERS
from moeless.placement.exact import exact_dispatch
from moeless.placement.setting import Setting
from moeless.placement.static import static_plan
from moeless.placement.whole_model import spread_over_sources

#: Iterations that a plan made from history stays.
LONG_HORIZON = 10_000
#: Seconds for one exact dispatch; where it runs out, the best solution known counts.
EXACT_SECONDS = 20.0


@dataclass(frozen=True)
class Cell:
    """One number of the tables, with what it takes to read it.

    Attributes:
        room: part of static EP's time that the bound leaves to save.
        gap, low, high: gap closed with its bootstrap 90 % interval.
        saved_percent: time saved against static EP, in per cent of its time.
        extras: copies beyond the primaries, mean over layers and iterations.
        moved: copies of a plan that the plan of the iteration before did not have on that GPU, mean over layers.
        below_exact: the exact dispatch's gap closed on the same plans less this one's; None where not solved.
        exact_saved_percent: its time saved, in per cent of static EP's.
        gap_link, gap_host: gap closed where each layer waits for its moved copies, GPUs loading side by side, over the
            protocol's link or from host memory.
    """

    routing: str
    synthetic: bool
    gpus: int
    extra_slots: int
    regime: str
    know: str
    charged: bool
    planner: str
    pairs: int
    static_us: float
    room: float
    gap: float
    low: float
    high: float
    saved_percent: float
    extras: float
    moved: float
    below_exact: float | None = None
    exact_saved_percent: float | None = None
    gap_link: float | None = None
    gap_host: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Question:
    """What one planner is asked for: a cell in each way of charging control time; ``params`` replace its defaults."""

    gpus: int
    extra_slots: int
    regime: Regime
    know: str
    planner: str
    exact: bool = False
    params: tuple[tuple[str, Any], ...] = ()


@lru_cache(maxsize=8)
def _loads(routing: Routing, regime: Regime, pairs: int) -> IntArray:
    return np.stack([routing.loads(rows) for rows in sample_iterations(routing, regime, pairs)])


@lru_cache(maxsize=2)
def _shares(routing: Routing) -> FloatArray:
    return history_share_LE(routing)


def plan_iteration(
    name: str,
    forecast_L: list[Forecast],
    regime: Regime,
    budget: Budget,
    costs: Any,
    horizon: int = 1,
    params: Any = None,
) -> list[LayerPlan]:
    """A planner's plans of all layers, from nothing."""
    planner = PLANNERS.get(name)
    inputs = [PlanInput(layer, regime.phase, f, None, None, horizon) for layer, f in enumerate(forecast_L)]
    return planner.plan_all(inputs, Setting(costs.spec, costs.cluster, costs, budget, params or planner.params()))


def ask(routing: Routing, question: Question, pairs: int, given: list[list[Forecast]] | None) -> list[Cell]:
    """The cells of a question; ``given`` are the predicted forecasts."""
    q, spec = question, routing.spec
    load_ILE, share_LE = _loads(routing, q.regime, pairs), _shares(routing)
    load_BE = load_ILE.reshape(-1, spec.E)
    told = lru_cache(maxsize=None)(
        lambda i: given[i] if given is not None else forecasts(q.know, q.regime.tokens, share_LE, load_ILE[i], i)
    )
    costs = protocol_costs(q.gpus, spec)
    plain = static_plan(0, spec.E, q.gpus)
    static_B = pair_seconds(load_BE[:, plain.expert_R], plain.gpu_R, costs)
    bound_B = bound_seconds(load_BE, costs)
    budget = Budget.even(spec.E, q.gpus, q.extra_slots, spec.expert_bytes)
    cells = []
    for charged in (False, True):
        solve = q.exact and not charged
        time_B, exact_B, extras, moved, most_B = _run(
            q, load_ILE, told, protocol_costs(q.gpus, spec, charged), budget, solve
        )
        middle, low, high = gap_closed(static_B, time_B, bound_B)
        exact = gap_closed(static_B, exact_B, bound_B)[0] if solve else None
        waits = spec.expert_bytes / costs.cluster.fast.bandwidth, costs.load_seconds(spec.expert_bytes, "host", 0)
        link, host = (gap_closed(static_B, time_B + most_B * wait, bound_B)[0] for wait in waits)
        cells.append(
            Cell(
                routing=routing.name,
                synthetic=routing.synthetic,
                gpus=q.gpus,
                extra_slots=q.extra_slots,
                regime=q.regime.name,
                know=q.know,
                charged=charged,
                planner=q.planner,
                pairs=len(load_BE),
                static_us=float(static_B.mean() * 1e6),
                room=float(1 - bound_B.sum() / static_B.sum()),
                gap=middle,
                low=low,
                high=high,
                saved_percent=float(100 * (1 - time_B.sum() / static_B.sum())),
                extras=extras,
                moved=moved,
                below_exact=None if exact is None else exact - middle,
                exact_saved_percent=float(100 * (1 - exact_B.sum() / static_B.sum())) if solve else None,
                gap_link=link,
                gap_host=host,
            )
        )
    return cells


def _run(
    q: Question, load_ILE: IntArray, told: Callable[[int], list[Forecast]], costs: Any, budget: Budget, exact: bool
) -> tuple[FloatArray, FloatArray, float, float, IntArray]:
    """Seconds of each pair by the planner's dispatch and by the exact one, mean extras, mean copies moved.

    Last the most copies that one GPU has to load for each pair.
    """
    planner = PLANNERS.get(q.planner)
    params, control = planner.params(**dict(q.params)), costs.control_seconds(planner.control, 0)
    setting, stays = Setting(costs.spec, costs.cluster, costs, budget, params), q.know == "history"
    plans = plan_iteration(q.planner, told(0), q.regime, budget, costs, LONG_HORIZON, params) if stays else []
    time, optimal, extras, moved, most = [], [], 0, 0, []
    with ExactTimes(CACHE / f"exact-{q.regime.name}-{q.gpus}-{q.extra_slots}-{q.know}.json") as times:
        for i, load_LE in enumerate(load_ILE):
            before = plans
            if not stays:
                plans = plan_iteration(q.planner, told(i), q.regime, budget, costs, params=params)
            # the first plans have none before them
            arrivals_LG = np.array(
                [_moved_G(old, new, q.gpus) for old, new in zip(before or plans, plans, strict=True)]
            )
            moved += int(arrivals_LG.sum())
            most += arrivals_LG.max(1).tolist()
            for plan, load_E in zip(plans, load_LE, strict=True):
                usable_R = np.ones(plan.R, np.bool_)
                quota_SR = planner.dispatch(spread_over_sources(load_E, q.gpus), plan, usable_R, setting)
                # a layer without extras, or with shares fixed ahead, has nothing to decide and takes no control time
                paid = control if plan.decides else 0.0
                time.append(pair_seconds(quota_SR.sum(0), plan.gpu_R, costs)[0] + paid)
                extras += plan.num_extra
                if exact:
                    optimal.append(min(times.seconds(load_E, plan, costs.terms(), q.gpus), time[-1]))
    pairs = max((len(load_ILE) - 1) * load_ILE.shape[1], 1)
    return np.array(time), np.array(optimal or time), extras / max(len(time), 1), moved / pairs, np.array(most)


def _moved_G(old: LayerPlan, new: LayerPlan, num_gpus: int) -> IntArray:
    """Copies of the new plan on each GPU that did not hold that expert, ``[G]``."""
    had = set(zip(old.expert_R.tolist(), old.gpu_R.tolist(), strict=True))
    copies = set(zip(new.expert_R.tolist(), new.gpu_R.tolist(), strict=True)) - had
    return np.bincount([gpu for _, gpu in copies], minlength=num_gpus).astype(np.int64)


class ExactTimes:
    """Exact dispatches by load and plan, kept on disk: they take longer than everything else together."""

    def __init__(self, file: Path) -> None:
        self.file, self.known, self.new = file, {}, False

    def __enter__(self) -> ExactTimes:
        if self.file.exists():
            self.known = json.loads(self.file.read_text())
        return self

    def __exit__(self, *_: object) -> None:
        if self.new:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            partial = self.file.with_suffix(".partial")
            partial.write_text(json.dumps(self.known))
            partial.replace(self.file)

    def seconds(self, load_E: IntArray, plan: LayerPlan, terms: Any, gpus: int) -> float:
        text = json.dumps([load_E.tolist(), plan.to_json(), dataclasses.astuple(terms), gpus])
        key = hashlib.sha256(text.encode()).hexdigest()[:24]
        if key not in self.known:
            usable_R = np.ones(plan.R, np.bool_)
            self.known[key] = exact_dispatch(load_E, plan, usable_R, terms, gpus, time_limit=EXACT_SECONDS).seconds
            self.new = True
        return float(self.known[key])

"""Several models, each with GPUs of its own or all on one pool: what the same objective costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from moeless.experiments import serving
from moeless.experiments.base import Data, Drawn, Experiment, Job, Options, Plot
from moeless.experiments.sources import Source, common_kind, common_label, synthetic
from moeless.report import charts

TENANTS = 4
GPUS = (2, 4, 8)
OBJECTIVES = ("ttft:2000", "tpot:50")
#: Share of the requests that must meet the objectives.
TARGET = 0.95
#: Mean requests per second of a tenant, in bursts that fall into different moments for each.
RATE, SHAPE = 0.3, 0.05
#: How GPUs are given back: not at all, all in silence, or besides one by one where fewer are needed.
KEPT: dict[str, Any] = {}
IDLE = {"scale_to_zero": True, "keep_alive": "10"}
SINGLY = {**IDLE, "requests_per_gpu": 4}
#: Ways to serve each model by itself, and all together: name to (policy, how GPUs are given back).
OWN = {
    "own GPUs, static EP": ("static", KEPT),
    "own GPUs, given back when idle": ("elastic:history", IDLE),
    "own GPUs, given back one by one": ("elastic:history", SINGLY),
}
SHARED = {
    "one pool, static EP": ("static", KEPT),
    "one pool, elastic": ("elastic:history", KEPT),
    "one pool, given back when idle": ("elastic:history", IDLE),
    "one pool, given back one by one": ("elastic:history", SINGLY),
}


def _sources(options: Options) -> list[Source]:
    model = (options.models or ("phi-3.5-moe",))[0]
    return [
        synthetic(dataclasses.replace(options, seed=options.seed + place), model, "lmsys") for place in range(TENANTS)
    ]


def _workload(options: Options, gpus: int) -> dict[str, Any]:
    return {
        **serving.CONTINUOUS,
        "cluster": f"h100x{gpus}",
        "arrivals": f"gamma:{RATE}:{SHAPE}",
        "max_requests": None,
        "duration": options.pick(60.0, 1800.0),
        "goodput": list(OBJECTIVES),
    }


def _jobs(options: Options) -> Mapping[str, Job]:
    made, sources, costs = {}, _sources(options), serving.physical(options)
    for gpus in GPUS:
        changes = _workload(options, gpus)
        for name, (policy, returns) in OWN.items():
            for place, source in enumerate(sources):
                more = {"seed": options.seed + place, **returns}
                made[f"{name}|{gpus}|{place}"] = serving.job(options, source, policy, costs, **changes, **more)
        for name, (policy, returns) in SHARED.items():
            job = serving.job(options, sources[0], policy, costs, **changes, **returns)
            made[f"{name}|{gpus}"] = dataclasses.replace(
                job,
                label=f"serve {TENANTS} models on one pool of {gpus} GPUs by {policy}",
                function="moeless.experiments.cells.serving:share",
                needs=tuple(source.job for source in sources),
            )
    return made


@dataclasses.dataclass(frozen=True)
class _Way:
    """One way to serve all tenants, with so many GPUs a tenant or in the pool."""

    gpus: str
    good: float
    gpu_seconds: float
    resident: float
    worst_ttft_ms: float
    requests: int
    note: str = ""

    @property
    def span(self) -> tuple[float, float]:
        """90 % interval of ``good`` after so many requests (Wilson's score interval)."""
        z, n, share = 1.645, self.requests, self.good
        middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def _own(results: Mapping[str, Any], name: str, gpus: int) -> _Way:
    """Each model with so many GPUs of its own."""
    cells = [serving.cell(results[f"{name}|{gpus}|{place}"]) for place in range(TENANTS)]
    requests = [one.request for one in cells if one.request]
    assert len(requests) == TENANTS
    # GPUs that are never given back are held until the last tenant is done, like a pool's
    last = max(request.duration for request in requests)
    counts = [request.completed + request.failed for request in requests]
    shares = (
        ((request.request_goodput or 0.0) * request.duration / count, count)
        for request, count in zip(requests, counts, strict=True)
    )
    good, count = min(shares, key=lambda share: share[0])
    return _Way(
        f"{TENANTS} × {gpus}",
        good,
        sum(one.billing.gpu_seconds if OWN[name][1] else gpus * last for one in cells),
        sum(one.billing.resident for one in cells),
        max(request.mean_ttft_ms for request in requests),
        count,
    )


def _pool(results: Mapping[str, Any], name: str, gpus: int) -> _Way:
    """All models on so many GPUs."""
    one = results[f"{name}|{gpus}"]
    return _Way(
        str(gpus),
        one["good"] / one["requests"],
        one["gpu_seconds"],
        one["resident"],
        max(one["mean_ttft_ms"]),
        one["requests"],
        f"{sum(one['wakes'])} times a model was loaded" if any(one["wakes"]) else "",
    )


def _draw(options: Options, results: Mapping[str, Any]) -> Drawn:
    sources = _sources(options)
    ways = {name: [_own(results, name, gpus) for gpus in GPUS] for name in OWN}
    ways |= {name: [_pool(results, name, gpus) for gpus in GPUS] for name in SHARED}
    columns = [
        "system",
        "GPUs",
        "requests within objectives (%)",
        "GPU·s",
        "resident bill (GB·s)",
        "slowest tenant's mean TTFT (ms)",
        "objective met",
        "note",
    ]
    rows = [
        [
            name,
            way.gpus,
            100 * way.good,
            way.gpu_seconds,
            way.resident,
            way.worst_ttft_ms,
            "yes" if way.good >= TARGET else "no",
            way.note,
        ]
        for name, mine in ways.items()
        for way in mine
    ]
    series = {}
    for name, mine in ways.items():
        low, high = 100 * np.array([way.span for way in mine]).T
        series[name] = charts.Line([way.gpu_seconds for way in mine], [100 * way.good for way in mine], low, high)
    counts = [way.requests for mine in ways.values() for way in mine]
    plot = Plot(
        charts.lines(
            series, xlabel="GPU·s of all models", ylabel="requests within objectives (%)",
            title=f"{TENANTS} models: service over cost", log_x=True, reference=100 * TARGET,
            reference_label="objective",
        ),
        f"{TENANTS} models of {sources[0].title}'s shapes with bursts of their own (gamma gaps, shape {SHAPE:g}, "
        f"{RATE:g} requests/s each), {GPUS[0]} to {GPUS[-1]} H100 for each or for all, {serving.physical(options)} "
        f"costs; objectives {' and '.join(OBJECTIVES)} ms. Of own GPUs the worst tenant's share is shown. "
        f"Bands: 90 % Wilson intervals (n from {min(counts)} to {max(counts)} requests a point).",
        common_kind(sources),
        common_label(sources),
    )  # fmt: skip
    return Drawn({"service": plot}, {"ways": Data(columns, rows, "Each system", show=True)}, text=_text(ways))


def _text(ways: Mapping[str, list[_Way]]) -> list[str]:
    """The cheapest way of each system to meet the objective, beside the first system's."""
    cheapest = {
        name: min((way for way in mine if way.good >= TARGET), key=lambda way: way.gpu_seconds, default=None)
        for name, mine in ways.items()
    }
    first, base = next(iter(cheapest.items()))
    text = []
    for name, way in cheapest.items():
        if way is None:
            text.append(f"{name}: the objective is not met with any of these numbers of GPUs.")
            continue
        change = "" if base in (None, way) else serving.change_text(way.gpu_seconds, base.gpu_seconds)
        beside = change and f", {change} against {first}"
        text.append(f"{name}: {way.gpus} GPUs meet the objective, {way.gpu_seconds:.0f} GPU·s{beside}.")
    return text


EXPERIMENTS = (
    Experiment(
        name="sharing",
        title="Beyond the paper: several models on one pool of GPUs",
        question="Is one pool for several models cheaper at the same objective than GPUs for each?",
        stated="One model at a time is served; sharing, where serverless should win, is not shown.",
        jobs=_jobs,
        draw=_draw,
    ),
)

"""Studies of the cluster: from one node to 1,024 GPUs, and several models on GPUs of their own or all on one pool."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from moeless.experiments import serving
from moeless.experiments.base import Data, Drawn, Experiment, Job, Options, Plot
from moeless.experiments.sources import Source, common_kind, common_label, synthetic
from moeless.metrics import catalogue
from moeless.metrics.result import Cell
from moeless.report import charts

EPLB = ("eplb:history", "eplb-hierarchical:history")
POLICIES = ("static", *EPLB, "moeless:history", "elastic:history", "oracle")
SIZES = (8, 32, 128, 512, 1024)
MODEL = "deepseek-v3"
#: Part of a layer's time to its heading.
PARTS = {"expert": "experts (ms)", "all_to_all": "all-to-all (ms)", "control": "control (ms)", "stall": "waiting (ms)"}
#: Setting of a run that holds a time to its heading.
SPLIT = {"first_ms": "first iteration (ms)", "later_ms": "later ones (ms)"}


def _scale_jobs(options: Options) -> Mapping[str, Job]:
    made = {}
    for gpus in SIZES:
        for policy in POLICIES:
            params = {
                "model": MODEL,
                "layers": options.pick(2, 8),
                "gpus": gpus,
                "requests_per_gpu": 32,
                "prompt_tokens": 16,
                "output_tokens": options.pick(16, 128),
                "policy": policy,
                "costs": serving.physical(options),
                "extra_slots": 1,
                "plan_every": 8,
                "seed": options.seed,
            }
            label = f"serve {MODEL} by {policy} on {gpus} GPUs"
            made[f"{gpus}|{policy}"] = Job(label, "moeless.experiments.cells.scale:serve", params)
    return made


def _scale(options: Options, results: Mapping[str, Any]) -> Drawn:
    found = {(gpus, policy): serving.found(results, str(gpus), policy) for gpus in SIZES for policy in POLICIES}
    rows = [
        [
            gpus,
            policy,
            *catalogue.values("scale", one),
            *(one.layer.parts_ms[name] for name in PARTS),
            *(one.settings[name] for name in SPLIT),
            one.layer.samples,
        ]
        for (gpus, policy), one in found.items()
    ]
    columns = ("GPUs", "policy", *catalogue.headings("scale"), *PARTS.values(), *SPLIT.values(), "layer runs")
    series = {}
    for policy in POLICIES:
        ratio_X3 = np.array([serving.ratio(results[f"{gpus}|{policy}"], results[f"{gpus}|static"]) for gpus in SIZES])
        series[policy] = charts.Line(SIZES, *ratio_X3.T)
    runs = serving.fewest_runs(found.values())
    plot = Plot(
        charts.lines(
            series, xlabel="GPUs", ylabel="mean layer time ÷ static EP's", title="Layer time over GPUs",
            policies=True, log_x=True, ylim=(0, None),
        ),
        f"32 decoding requests a GPU (prompts included), {MODEL} shapes, nodes of eight H100, "
        f"{serving.physical(options)} costs, one extra slot per GPU; n = {runs:,} layer runs a point; bands: "
        f"{serving.PAIRED}.",
        "synthetic",
        "synthetic routing",
    )  # fmt: skip
    text = []
    for gpus in SIZES:
        best = min(POLICIES[:-1], key=lambda policy: found[gpus, policy].layer.mean_ms)
        base = found[gpus, "static"].layer.mean_ms
        text.append(
            f"{gpus} GPUs: {best} is fastest without changing outputs, "
            f"{serving.change_text(found[gpus, best].layer.mean_ms, base)} against static EP; "
            f"elastic {serving.change_text(found[gpus, 'elastic:history'].layer.mean_ms, base)}."
        )
        text += _split(gpus, *(found[gpus, policy] for policy in ("static", "eplb:history", "elastic:history")))
    text.append(
        "With more GPUs than experts static EP, and the oracle on its placement, leave GPUs without work: there "
        "copies are what uses a cluster at all. Elastic never moves a primary, so it starts from a worse place than "
        "EPLB."
    )
    notes = [
        text for text in dict.fromkeys(note for one in found.values() for note in one.warnings) if "p99" not in text
    ]
    return Drawn({"gpus": plot}, {"points": Data(columns, rows, "Each policy", show=True)}, text=text, warnings=notes)


def _split(gpus: int, static: Cell, eplb: Cell, elastic: Cell) -> list[str]:
    """Where elastic is behind EPLB: whether in the first iteration, all prompts at once, or after it."""
    if elastic.layer.mean_ms <= eplb.layer.mean_ms:
        return []
    said = []
    for name, what in (("first_ms", "the first iteration, all prompts at once"), ("later_ms", "the later ones")):
        mine, theirs = (serving.change_text(one.settings[name], static.settings[name]) for one in (elastic, eplb))
        said.append(f"in {what}, elastic is {mine} and EPLB {theirs} against static EP")
    return [f"{gpus} GPUs, where elastic is behind EPLB: {'; '.join(said)}."]


# several models

TENANTS = 4
POOLS = (2, 4, 8)
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


def _sharing_jobs(options: Options) -> Mapping[str, Job]:
    made, sources, costs = {}, _sources(options), serving.physical(options)
    for gpus in POOLS:
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


def _sharing(options: Options, results: Mapping[str, Any]) -> Drawn:
    sources = _sources(options)
    ways = {name: [_own(results, name, gpus) for gpus in POOLS] for name in OWN}
    ways |= {name: [_pool(results, name, gpus) for gpus in POOLS] for name in SHARED}
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
        f"{RATE:g} requests/s each), {POOLS[0]} to {POOLS[-1]} H100 for each or for all, {serving.physical(options)} "
        f"costs; objectives {' and '.join(OBJECTIVES)} ms. Of own GPUs the worst tenant's share is shown. "
        f"Bands: 90 % Wilson intervals (n from {min(counts)} to {max(counts)} requests a point).",
        common_kind(sources),
        common_label(sources),
    )  # fmt: skip
    return Drawn({"service": plot}, {"ways": Data(columns, rows, "Each system", show=True)}, text=_cheapest(ways))


def _cheapest(ways: Mapping[str, list[_Way]]) -> list[str]:
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
        name="scale",
        title="Beyond the paper: 8 to 1,024 GPUs",
        question="Which policy helps how much as the cluster grows over nodes with two link tiers?",
        stated="Eight GPUs of one machine; nothing larger is shown.",
        jobs=_scale_jobs,
        draw=_scale,
    ),
    Experiment(
        name="sharing",
        title="Beyond the paper: several models on one pool of GPUs",
        question="Is one pool for several models cheaper at the same objective than GPUs for each?",
        stated="One model at a time is served; sharing, where serverless should win, is not shown.",
        jobs=_sharing_jobs,
        draw=_sharing,
    ),
)

"""How long jobs will take, told beforehand: what ``--dry-run`` says of a run of hours.

Layer runs are bounded by every request being served alone, token by token; rates were measured on one core of a
2.8 GHz Xeon with ``moeless reproduce`` itself. Meant to tell minutes from hours.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from moeless.experiments.base import Job
from moeless.spec import preset

#: Layer runs per second of one core, by planner; of the paper's planner also by predictor.
_RATES = {"static": 90_000, "eplb": 90_000, "oracle": 60_000, "elastic": 30_000, "moeless": 3_900, "parts": 3_900}
_FITTED_RATE = 1_650
#: Seconds per (token, layer, distance) of a fit, its evaluation included.
_FIT = {"layer_aware": 1.2e-5, "from_scratch": 6e-5}
_OTHER_FIT = 1.4e-5
#: Seconds of a job whose length hardly depends on its parameters.
_REST = 4.0
_LIVE = 120.0


def seconds(job: Job) -> float:
    """One job on one core, at most, roughly."""
    module, _, function = job.function.rpartition(".")[2].partition(":")
    params = job.params
    if job.given is not None:
        return 0.0
    if function == "fit":
        per = _FIT.get(str(params["method"]), _OTHER_FIT)
        return 3.0 + per * params["max_tokens"] * _shape(job.needs[0])[1] * len(params["distances"])
    if module == "live":
        return _LIVE * params["requests"] / 16
    if function == "bundled" or module == "synthetic":
        tokens, layers = _shape(job)
        return 2.0 + 1e-6 * params["requests"] * tokens * layers * (450 if function == "bundled" else 5)
    if "policy" in params and "max_requests" in params:
        output, layers = _shape(job.needs[0]) if job.needs else (0.0, 0)
        # a workload bounded by its duration: a few requests a second
        requests = params["max_requests"] or 1.0 * params["duration"]
        return 0.3 + float(requests) * output * layers / _rate(job)
    return _REST


def _rate(job: Job) -> float:
    planner, _, predictor = str(job.params["policy"]).partition(":")
    fitted = predictor.partition(":")[0] in ("transition", "layer_aware", "blend")
    planner = planner.partition("-")[0]
    rate = _FITTED_RATE if fitted and planner in ("moeless", "parts") else _RATES.get(planner, 3_900)
    # layers between two plans cost as those of a fixed plan
    every = int(job.params.get("plan_every", 1))
    return rate if planner in ("static", "eplb", "oracle") else 1.0 / (1.0 / rate / every + 1.0 / _RATES["static"])


def _shape(job: Job) -> tuple[float, int]:
    """Output tokens of a request on the mean, and layers, of the trace that a job makes."""
    params: Mapping[str, Any] = job.params
    if job.given is not None:
        from moeless.traces import open_trace

        trace = open_trace(job.given)
        return trace.num_rows / max(1, trace.num_requests), trace.spec.L  # type: ignore[union-attr]
    if "output_tokens" in params:
        return float(params["output_tokens"]), preset(params["model"]).L
    return float(params.get("max_new_tokens", 0)), preset("bundled").L


def plan(jobs: Iterable[Job], workers: int) -> dict[str, Any]:
    """Minutes of those jobs on so many workers, and the dearest kinds of them, JSON-ready."""
    kinds: dict[str, float] = defaultdict(float)
    total = 0.0
    for job in jobs:
        took = seconds(job)
        kinds[kind(job)] += took
        total += took if job.timed else took / workers
    dearest = sorted(kinds.items(), key=lambda item: -item[1])[:6]
    return {
        "minutes_about": round(total / 60, 1),
        "core_minutes_by_kind": {name: round(value / 60, 1) for name, value in dearest},
    }


def kind(job: Job) -> str:
    """Jobs alike, in a word or two: a fit, a recording, or serving by one planner."""
    module, _, function = job.function.rpartition(".")[2].partition(":")
    policy = str(job.params.get("policy", ""))
    return f"serve by {policy.partition(':')[0]}" if policy else f"{module}: {function}"

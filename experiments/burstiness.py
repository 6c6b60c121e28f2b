"""Burstiness of arrivals: the same mean rate, evenly spread or in bursts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeless.experiments import serving, study
from moeless.experiments.base import Drawn, Experiment, Job, Options

POLICIES = ("static", "eplb:history", "moeless:history", "elastic:history")
#: Gamma shapes of the gaps: 1 is Poisson, below is burstier.
SHAPES = (0.1, 0.25, 0.5, 1.0, 4.0)
RATE = 6.0
#: Silence between, or too little work for all GPUs: a tenth of the rate, one GPU held for so many requests.
QUIET, PER_GPU = "on-off 2 s of 20 s", 4
FEW = f"a tenth of the rate, a GPU for {PER_GPU} requests"
FEW_POLICIES = ("static", "elastic:history")


def _points() -> dict[str, dict[str, Any]]:
    points: dict[str, dict[str, Any]] = {f"shape {shape:g}": {"arrivals": f"gamma:{RATE}:{shape}"} for shape in SHAPES}
    # silence for nine tenths of the time: where giving GPUs back could pay
    points[QUIET] = {"arrivals": f"on-off:{RATE / 10}:2:18", "scale_to_zero": True, "keep_alive": "2"}
    return points


def _jobs(options: Options) -> Mapping[str, Job]:
    common = {"max_requests": options.pick(24, serving.FULL), "goodput": list(study.OBJECTIVES)}
    few = {FEW: {"arrivals": f"poisson:{RATE / 10}", "requests_per_gpu": PER_GPU, "keep_alive": "2"}}
    return study.jobs(options, POLICIES, _points(), **common) | study.jobs(options, FEW_POLICIES, few, **common)


def _draw(options: Options, results: Mapping[str, Any]) -> Drawn:
    x = {f"shape {shape:g}": shape for shape in SHAPES}
    plots = {
        "ttft": study.lines(
            options, results, x, POLICIES, "request.p99_ttft_ms",
            xlabel="gamma shape of the gaps (smaller is burstier)", ylabel="p99 time to first token (ms)",
            title="First tokens over burstiness", log_x=True,
        ),
        "layer": study.lines(
            options, results, x, POLICIES, "layer.mean_ms",
            xlabel="gamma shape of the gaps (smaller is burstier)", ylabel="mean layer time (ms)",
            title="Layer time over burstiness", log_x=True,
        ),
    }  # fmt: skip
    labels = list(_points())
    text = []
    for policy in POLICIES:
        even, bursty = (study.found(results, f"shape {shape:g}", policy) for shape in (SHAPES[-1], SHAPES[0]))
        if even.request and bursty.request:
            text.append(
                f"{policy}: from gaps of shape {SHAPES[-1]:g} to {SHAPES[0]:g}, p99 time to first token changes by "
                f"{study.change(bursty.request.p99_ttft_ms, even.request.p99_ttft_ms)}."
            )
    base, mine = study.found(results, QUIET, "static"), study.found(results, QUIET, "moeless:history")
    if base.request and mine.request:
        text.append(
            f"Bursts of two seconds in twenty, GPUs given back after 2 s of silence: moeless holds GPUs "
            f"{study.change(mine.billing.gpu_seconds, base.billing.gpu_seconds)} and its mean time to first token is "
            f"{mine.request.mean_ttft_ms:.0f} ms, static EP's {base.request.mean_ttft_ms:.0f} ms."
        )
    base, mine = (study.found(results, FEW, policy) for policy in FEW_POLICIES)
    if base.request and mine.request:
        held = study.change(mine.billing.gpu_seconds, base.billing.gpu_seconds)
        text.append(
            f"At {RATE / 10:g} requests/s, one GPU held for {PER_GPU} requests and as many as memory needs, the others "
            f"given back after 2 s: elastic holds GPUs {held} against all eight; its mean time to first token is "
            f"{mine.request.mean_ttft_ms:.0f} ms instead of {base.request.mean_ttft_ms:.0f} ms, its mean layer "
            f"{study.change(mine.layer.mean_ms, base.layer.mean_ms)}."
        )
    data = study.table(results, labels, POLICIES, f"Arrivals of {RATE:g} requests/s on the mean")
    few = study.table(results, [FEW], FEW_POLICIES, "GPUs given back one by one")
    return Drawn(plots, {"arrivals": data, "few": few}, text=text, warnings=study.warnings(results))


EXPERIMENT = Experiment(
    name="burstiness",
    title="Beyond the paper: burstiness of arrivals",
    question="How do the policies bear bursts, and what does giving GPUs back save in the silence between?",
    stated="One production trace is replayed; burstiness is not varied.",
    jobs=_jobs,
    draw=_draw,
)

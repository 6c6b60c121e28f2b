"""Cold starts, keep-alive and pre-warming: what copies cost that are not there yet, or still there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeless.experiments import serving, study
from moeless.experiments.base import Drawn, Experiment, Job, Options

POLICIES = ("moeless:history", "elastic:history")
#: Seconds that a function instance takes to start, beside the transfer of its weights.
STARTS = (0.0, 1e-3, 1e-2, 1e-1, 1.0)
KEEP_ALIVE = ("0", "0.1", "1", "10", "60", "lru", "adaptive")
DISTANCES = (1, 2, 4, 8)
#: Forecasts that are perfect, so that a distance changes nothing but the time there is to load.
AHEAD = ("moeless:oracle", "elastic:oracle")


def _points() -> dict[str, dict[str, Any]]:
    points: dict[str, dict[str, Any]] = {
        f"start {1e3 * start:g} ms": {"start_seconds": start, "instant_copies": False} for start in STARTS
    }
    points |= {f"keep-alive {keep}": {"keep_alive": keep, "instant_copies": False} for keep in KEEP_ALIVE}
    points["weights in storage"] = {"home": "storage", "keep_alive": "0", "instant_copies": False}
    points["copies take no time"] = {"instant_copies": True}
    return points


def _jobs(options: Options) -> Mapping[str, Job]:
    common = {"max_requests": options.pick(8, serving.FULL), "goodput": list(study.OBJECTIVES)}
    made = study.jobs(options, POLICIES, _points(), **common)
    for distance in DISTANCES:
        for policy in AHEAD:
            (job,) = study.jobs(options, [f"{policy}:{distance}"], {"": {"instant_copies": False}}, **common).values()
            made[f"distance {distance}|{policy}"] = job
    return made


def _draw(options: Options, results: Mapping[str, Any]) -> Drawn:
    starts = {f"start {1e3 * start:g} ms": max(start, 1e-4) for start in STARTS}
    distances = {f"distance {distance}": float(distance) for distance in DISTANCES}
    plots = {
        "start": study.lines(
            options, results, starts, POLICIES, "layer.mean_ms",
            xlabel="start of an instance (s; 0 drawn at 0.0001)", ylabel="mean layer time (ms)",
            title="Layer time over cold-start time", log_x=True,
        ),
        "distance": study.lines(
            options, results, distances, AHEAD, lambda one: 1e3 * sum(one.layer.stalls.values()) / one.layer.samples,
            xlabel="plans are made so many layers ahead", ylabel="mean wait for weights (ms a layer)",
            title="Waiting for weights over pre-warming distance",
        ),
        "keep-alive": study.lines(
            options, results, {f"keep-alive {keep}": max(float(keep), 1e-2) for keep in KEEP_ALIVE[:5]}, POLICIES,
            "billing.resident", xlabel="keep-alive (s; 0 drawn at 0.01)",
            ylabel="resident bill (GB·s)", title="Memory held over keep-alive", log_x=True,
        ),
    }  # fmt: skip
    waits = [
        sum(study.found(results, f"distance {d}", policy).layer.stalls.values()) for d in DISTANCES for policy in AHEAD
    ]
    if not any(waits):
        # a figure of zeros says less than its sentence
        del plots["distance"]
    labels = list(_points())
    data = study.table(results, labels, POLICIES, "Cold-start time, keep-alive policy, home of the weights")
    ahead = study.table(results, list(distances), AHEAD, "Pre-warming distance, perfect forecasts")
    return Drawn(
        plots, {"sweeps": data, "distances": ahead}, text=_text(results, waits), warnings=study.warnings(results)
    )


def _text(results: Mapping[str, Any], waits: list[float]) -> list[str]:
    said = []
    if not any(waits):
        said.append("With perfect forecasts no layer waits for weights, however few layers ahead plans are made.")
    for policy in POLICIES:
        free = study.found(results, "copies take no time", policy)
        slow = study.found(results, f"start {1e3 * STARTS[-1]:g} ms", policy)
        none, lru = study.found(results, "keep-alive 0", policy), study.found(results, "keep-alive lru", policy)
        said.append(
            f"{policy}: an instance start of {STARTS[-1]:g} s changes the layer time of free copies by "
            f"{study.change(slow.layer.mean_ms, free.layer.mean_ms)}. Keeping copies until memory is needed instead of "
            f"dropping them at once changes layer time by {study.change(lru.layer.mean_ms, none.layer.mean_ms)}, "
            f"transfers by {study.change(lru.layer.moved_bytes, none.layer.moved_bytes)} and the resident bill by "
            f"{study.change(lru.billing.resident, none.billing.resident)}."
        )
    return said


EXPERIMENT = Experiment(
    name="coldstart",
    title="Beyond the paper: cold starts, keep-alive, pre-warming",
    question="How much do cold copies cost, and what do keep-alive and looking further ahead buy?",
    stated="No cold-start latency and no keep-alive duration is given; almost every start is said to be warm.",
    jobs=_jobs,
    draw=_draw,
)

"""Studies of the conditions of serving: cold starts and keep-alive, burstiness of arrivals, drift of domains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeless.experiments import serving
from moeless.experiments.base import Drawn, Experiment, Job, Options, Plot
from moeless.experiments.serving import change_text, found
from moeless.experiments.sources import common_kind, common_label
from moeless.report import style
from moeless.report.charts import Bars, bars

COPYING = ("moeless:history", "elastic:history")
#: Seconds that a function instance takes to start, beside the transfer of its weights.
STARTS = {f"start {1e3 * start:g} ms": start for start in (0.0, 1e-3, 1e-2, 1e-1, 1.0)}
KEEP_ALIVE = ("0", "0.1", "1", "10", "60", "lru", "adaptive")
#: Forecasts that are perfect, so that a distance changes nothing but the time there is to load.
AHEAD = ("moeless:oracle", "elastic:oracle")
DISTANCES = {f"distance {distance}": distance for distance in (1, 2, 4, 8)}
_COLD: dict[str, dict[str, Any]] = {
    **{label: {"start_seconds": start, "instant_copies": False} for label, start in STARTS.items()},
    **{f"keep-alive {keep}": {"keep_alive": keep, "instant_copies": False} for keep in KEEP_ALIVE},
    "weights in storage": {"home": "storage", "keep_alive": "0", "instant_copies": False},
    "copies take no time": {"instant_copies": True},
}


def _cold_jobs(options: Options) -> Mapping[str, Job]:
    common = {"max_requests": options.pick(8, serving.FULL), "goodput": list(serving.OBJECTIVES)}
    made = serving.setting_jobs(options, COPYING, _COLD, **common)
    source, costs = serving.source_of(options), serving.physical(options)
    for label, distance in DISTANCES.items():
        for policy in AHEAD:
            changes = {**serving.CONTINUOUS, **common, "instant_copies": False}
            made[f"{label}|{policy}"] = serving.job(options, source, f"{policy}:{distance}", costs, **changes)
    return made


def _cold(options: Options, results: Mapping[str, Any]) -> Drawn:
    plots = {
        "start": serving.lines(
            options, results, {label: max(start, 1e-4) for label, start in STARTS.items()}, COPYING, "layer.mean_ms",
            xlabel="start of an instance (s; 0 drawn at 0.0001)", ylabel="mean layer time (ms)",
            title="Layer time over cold-start time", log_x=True,
        ),
        "distance": serving.lines(
            options, results, DISTANCES, AHEAD, lambda one: 1e3 * sum(one.layer.stalls.values()) / one.layer.samples,
            xlabel="plans are made so many layers ahead", ylabel="mean wait for weights (ms a layer)",
            title="Waiting for weights over pre-warming distance",
        ),
        "keep-alive": serving.lines(
            options, results, {f"keep-alive {keep}": max(float(keep), 1e-2) for keep in KEEP_ALIVE[:5]}, COPYING,
            "billing.resident", xlabel="keep-alive (s; 0 drawn at 0.01)",
            ylabel="resident bill (GB·s)", title="Memory held over keep-alive", log_x=True,
        ),
    }  # fmt: skip
    ahead = [(label, policy) for label in DISTANCES for policy in AHEAD]
    text = []
    if not any(sum(found(results, *pair).layer.stalls.values()) for pair in ahead):
        # a figure of zeros says less than its sentence
        del plots["distance"]
        text.append("With perfect forecasts no layer waits for weights, however few layers ahead plans are made.")
    longest = list(STARTS)[-1]
    for policy in COPYING:
        free, slow, none, lru = (
            found(results, label, policy)
            for label in ("copies take no time", longest, "keep-alive 0", "keep-alive lru")
        )
        text.append(
            f"{policy}: an instance start of {STARTS[longest]:g} s changes the layer time of free copies by "
            f"{change_text(slow.layer.mean_ms, free.layer.mean_ms)}. Keeping copies until memory is needed instead of "
            f"dropping them at once changes layer time by {change_text(lru.layer.mean_ms, none.layer.mean_ms)}, "
            f"transfers by {change_text(lru.layer.moved_bytes, none.layer.moved_bytes)} and the resident bill by "
            f"{change_text(lru.billing.resident, none.billing.resident)}."
        )
    swept = [(label, policy) for label in _COLD for policy in COPYING]
    data = {
        "sweeps": serving.settings(results, swept, "Cold-start time, keep-alive policy, home of the weights"),
        "distances": serving.settings(results, ahead, "Pre-warming distance, perfect forecasts"),
    }
    return Drawn(plots, data, text=text, warnings=serving.warnings(results))


ARRIVING = ("static", "eplb:history", "moeless:history", "elastic:history")
RATE = 6.0
#: Gamma shapes of the gaps: 1 is Poisson, below is burstier.
SHAPES = {f"shape {shape:g}": shape for shape in (0.1, 0.25, 0.5, 1.0, 4.0)}
#: Silence between, or too little work for all GPUs: a tenth of the rate, one GPU held for so many requests.
QUIET, PER_GPU = "on-off 2 s of 20 s", 4
_ARRIVALS: dict[str, dict[str, Any]] = {
    **{label: {"arrivals": f"gamma:{RATE}:{shape}"} for label, shape in SHAPES.items()},
    # silence for nine tenths of the time: where giving GPUs back could pay
    QUIET: {"arrivals": f"on-off:{RATE / 10}:2:18", "scale_to_zero": True, "keep_alive": "2"},
}
FEW = f"a tenth of the rate, a GPU for {PER_GPU} requests"
FEW_POLICIES = ("static", "elastic:history")


def _burst_jobs(options: Options) -> Mapping[str, Job]:
    common = {"max_requests": options.pick(24, serving.FULL), "goodput": list(serving.OBJECTIVES)}
    few = {FEW: {"arrivals": f"poisson:{RATE / 10}", "requests_per_gpu": PER_GPU, "keep_alive": "2"}}
    return {
        **serving.setting_jobs(options, ARRIVING, _ARRIVALS, **common),
        **serving.setting_jobs(options, FEW_POLICIES, few, **common),
    }


def _bursts(options: Options, results: Mapping[str, Any]) -> Drawn:
    looks = (
        ("ttft", "request.p99_ttft_ms", "p99 time to first token (ms)", "First tokens over burstiness"),
        ("layer", "layer.mean_ms", "mean layer time (ms)", "Layer time over burstiness"),
    )
    plots = {
        name: serving.lines(
            options, results, SHAPES, ARRIVING, metric, xlabel="gamma shape of the gaps (smaller is burstier)",
            ylabel=label, title=title, log_x=True,
        )
        for name, metric, label, title in looks
    }  # fmt: skip
    burstiest, *_, evenest = SHAPES
    text = []
    for policy in ARRIVING:
        even, bursty = (found(results, label, policy).request for label in (evenest, burstiest))
        if even and bursty:
            text.append(
                f"{policy}: from gaps of {evenest} to {SHAPES[burstiest]:g}, p99 time to first token changes by "
                f"{change_text(bursty.p99_ttft_ms, even.p99_ttft_ms)}."
            )
    base, mine = found(results, QUIET, "static"), found(results, QUIET, "moeless:history")
    if base.request and mine.request:
        text.append(
            f"Bursts of two seconds in twenty, GPUs given back after 2 s of silence: moeless holds GPUs "
            f"{change_text(mine.billing.gpu_seconds, base.billing.gpu_seconds)} and its mean time to first token is "
            f"{mine.request.mean_ttft_ms:.0f} ms, static EP's {base.request.mean_ttft_ms:.0f} ms."
        )
    base, mine = (found(results, FEW, policy) for policy in FEW_POLICIES)
    if base.request and mine.request:
        text.append(
            f"At {RATE / 10:g} requests/s, one GPU held for {PER_GPU} requests and as many as memory needs, the others "
            f"given back after 2 s: elastic holds GPUs "
            f"{change_text(mine.billing.gpu_seconds, base.billing.gpu_seconds)} against all eight; its mean time to "
            f"first token is {mine.request.mean_ttft_ms:.0f} ms instead of {base.request.mean_ttft_ms:.0f} ms, its "
            f"mean layer {change_text(mine.layer.mean_ms, base.layer.mean_ms)}."
        )
    every = [(label, policy) for label in _ARRIVALS for policy in ARRIVING]
    data = {
        "arrivals": serving.settings(results, every, f"Arrivals of {RATE:g} requests/s on the mean"),
        "few": serving.settings(results, [(FEW, policy) for policy in FEW_POLICIES], "GPUs given back one by one"),
    }
    return Drawn(plots, data, text=text, warnings=serving.warnings(results))


DRIFTING = ("static", "eplb:history", "moeless:history", "moeless:last", "moeless:oracle:1", "elastic:history")
MIXED, BLOCKS = "mixed", "one domain after the other"
OFTEN = ", EPLB plans every 2 s"
#: Order of the domains and seconds between EPLB's plans to the policies that serve it; the paper's example of ten
#: minutes never plans in a quick run.
_ORDERS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    order + pace: ({"blocks": order == BLOCKS, "replan_seconds": seconds}, policies)
    for order in (MIXED, BLOCKS)
    for pace, seconds, policies in (("", 600.0, DRIFTING), (OFTEN, 2.0, ("eplb:history",)))
}


def _drift_jobs(options: Options) -> Mapping[str, Job]:
    made: dict[str, Job] = {}
    for label, (changes, policies) in _ORDERS.items():
        requests = options.pick(24, serving.FULL)
        made |= serving.setting_jobs(options, policies, {label: changes}, max_requests=requests)
    return made


def _drift(options: Options, results: Mapping[str, Any]) -> Drawn:
    text = []
    still, moved = (found(results, order, "static").layer.mean_ms for order in (MIXED, BLOCKS))
    for policy in DRIFTING:
        one, two = (found(results, order, policy).layer for order in (MIXED, BLOCKS))
        beside = f", {change_text(two.mean_ms / one.mean_ms, moved / still)} beside static EP's change"
        text.append(
            f"{policy}: imbalance {one.imbalance:.3f} mixed, {two.imbalance:.3f} with one domain after the other; "
            f"layer time {change_text(two.mean_ms, one.mean_ms)}{'' if policy == 'static' else beside}."
        )
    often = found(results, BLOCKS + OFTEN, "eplb:history").layer
    text += [
        f"eplb:history planning every 2 s: imbalance {often.imbalance:.3f} with one domain after the other.",
        "The order also changes which requests run together, for static EP too: what a policy loses to drift is its "
        "change beside static EP's, not its change alone.",
    ]
    source, look = serving.source_of(options), style.looks(DRIFTING)
    cells = {order: [found(results, order, policy) for policy in DRIFTING] for order in (MIXED, BLOCKS)}
    colours = [look[policy].colour for policy in DRIFTING]
    plot = Plot(
        bars(
            DRIFTING,
            {
                order: Bars([one.layer.imbalance for one in cells[order]], colours=colours, alpha=shade)
                for order, shade in ((MIXED, 0.45), (BLOCKS, 1.0))
            },
            xlabel="imbalance over GPUs (max ÷ mean)",
            title="Imbalance under drift",
            digits=3,
            reference=None,
            legend=False,
        ),
        f"Pale: domains mixed; full: one domain after the other. {source.title} on "
        f"{source.cluster or options.cluster}, {serving.physical(options)} costs, continuous batching "
        f"(n = {serving.fewest_runs(cells[MIXED] + cells[BLOCKS]):,} layer runs or more a bar).",
        common_kind([source]),
        common_label([source]),
    )
    pairs = [(label, policy) for label, (_, policies) in _ORDERS.items() for policy in policies]
    data = {"orders": serving.settings(results, pairs, "The same requests in two orders")}
    return Drawn({"imbalance": plot}, data, text=text, warnings=serving.warnings(results))


EXPERIMENTS = (
    Experiment(
        name="coldstart",
        title="Beyond the paper: cold starts, keep-alive, pre-warming",
        question="How much do cold copies cost, and what do keep-alive and looking further ahead buy?",
        stated="No cold-start latency and no keep-alive duration is given; almost every start is said to be warm.",
        jobs=_cold_jobs,
        draw=_cold,
    ),
    Experiment(
        name="burstiness",
        title="Beyond the paper: burstiness of arrivals",
        question="How do the policies bear bursts, and what does giving GPUs back save in the silence between?",
        stated="One production trace is replayed; burstiness is not varied.",
        jobs=_burst_jobs,
        draw=_bursts,
    ),
    Experiment(
        name="drift",
        title="Beyond the paper: drift of domains",
        question="What happens to plans made from the past when the domain of the requests changes?",
        stated="Two prompt sets are served, each by itself.",
        jobs=_drift_jobs,
        draw=_drift,
    ),
)

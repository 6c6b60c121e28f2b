"""From one node to 1,024 GPUs: what two link tiers and many GPUs per expert do to each policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moeless.experiments import serving
from moeless.experiments.base import Data, Drawn, Experiment, Job, Options, Plot
from moeless.metrics import catalogue
from moeless.metrics.result import Cell
from moeless.report import charts

EPLB = ("eplb:history", "eplb-hierarchical:history")
POLICIES = ("static", *EPLB, "moeless:history", "elastic:history", "oracle")
GPUS = (8, 32, 128, 512, 1024)
MODEL = "deepseek-v3"
#: Part of a layer's time to its heading.
PARTS = {"expert": "experts (ms)", "all_to_all": "all-to-all (ms)", "control": "control (ms)", "stall": "waiting (ms)"}
#: Setting of a run that holds a time to its heading.
SPLIT = {"first_ms": "first iteration (ms)", "later_ms": "later ones (ms)"}


def _jobs(options: Options) -> Mapping[str, Job]:
    made = {}
    for gpus in GPUS:
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


def _draw(options: Options, results: Mapping[str, Any]) -> Drawn:
    found = {(gpus, policy): serving.found(results, str(gpus), policy) for gpus in GPUS for policy in POLICIES}
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
        ratio_X3 = np.array([serving.ratio(results[f"{gpus}|{policy}"], results[f"{gpus}|static"]) for gpus in GPUS])
        series[policy] = charts.Line(GPUS, *ratio_X3.T)
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
    for gpus in GPUS:
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


EXPERIMENTS = (
    Experiment(
        name="scale",
        title="Beyond the paper: 8 to 1,024 GPUs",
        question="Which policy helps how much as the cluster grows over nodes with two link tiers?",
        stated="Eight GPUs of one machine; nothing larger is shown.",
        jobs=_jobs,
        draw=_draw,
    ),
)

"""Cells that serve a growing cluster with work that grows alike."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless.cluster import cluster
from moeless.contracts import Policy, Request
from moeless.costs import COSTS
from moeless.experiments.cells import intervals
from moeless.policy import resolve
from moeless.predictors import PREDICTORS
from moeless.serverless import KeepAlive, PoolSettings
from moeless.simulator import Replay, SimulationSettings, simulate
from moeless.spec import MoESpec, preset
from moeless.traces.synthetic import SyntheticParams, synthetic_model
from moeless.workloads.lengths import Workload
from moeless.workloads.schedulers import Continuous

#: Made-up tokens that requests replay, and as many again that are the history.
TOKENS = 2048
#: Made-up requests of those tokens.
PARTS = 64


def some_layers(name: str, layers: int) -> MoESpec:
    """A model's shapes with fewer layers, all of them MoE layers."""
    spec = preset(name)
    return dataclasses.replace(spec, num_layers=layers, moe_layers=tuple(range(layers)))


def routing(spec: MoESpec, seed: int) -> NDArray[np.uint16]:
    """Made-up expert ids of 2 TOKENS tokens, in the statistics of ``moeless.traces.synthetic``'s defaults."""
    model = synthetic_model(spec, SyntheticParams(), seed=seed)
    parts = [model.request(2 * TOKENS // PARTS, np.random.default_rng([seed, 5, part]))[1] for part in range(PARTS)]
    return np.concatenate(parts)


def serve(params: dict[str, Any], needs: list[Any]) -> dict[str, Any]:
    """One policy on so many GPUs: a result row, labelled synthetic.

    Params: ``model``, ``layers``, ``gpus`` (nodes of eight), ``requests_per_gpu``, all there at the start,
    ``prompt_tokens``, ``output_tokens``, ``policy``, ``costs``, ``extra_slots``, ``plan_every``, ``seed``.
    """
    spec = some_layers(params["model"], params["layers"])
    nodes = params["gpus"] // 8
    where = cluster("h100x8" if nodes == 1 else f"h100x8x{nodes}")
    topk_TLK = routing(spec, params["seed"])
    random = np.random.default_rng([params["seed"], 6])
    prompt, output = params["prompt_tokens"], params["output_tokens"]
    count = params["requests_per_gpu"] * where.G
    requests = tuple(Request(index, 0.0, prompt, output, trace_request=0) for index in range(count))
    base_N = random.integers(0, TOKENS - prompt - output, count)
    share_LE = np.stack([np.bincount(topk_TLK[TOKENS:, layer].ravel(), minlength=spec.E) for layer in range(spec.L)])
    runtime = resolve(
        Policy.parse(params["policy"]),
        spec=spec,
        cluster=where,
        costs=COSTS.get(params["costs"])(spec, where),
        extra_slots=params["extra_slots"],
        predictors={"history": PREDICTORS.get("history")(spec)},
    )
    done = simulate(
        Replay(topk_TLK[:TOKENS], Workload(requests, False, (), base_N), spec.E, where.G),
        requests,
        Continuous(requests, where.G, token_budget=512 * where.G, max_running=count),
        runtime,
        settings=SimulationSettings(PoolSettings(KeepAlive("fixed", 10.0)), plan_every=params["plan_every"]),
        prior_share_LE=share_LE / share_LE.sum(1, keepdims=True),
        evidence="synthetic",
        labels={"requests": count, "extra_slots": params["extra_slots"], "layers": spec.L},
    )
    row = intervals.row(done, spec, where.G)
    times_IL = done.record.times_IL
    # the first iteration is all prompts at once, under the plans of the deployment
    row["settings"] |= {"first_ms": 1e3 * float(times_IL[0].mean()), "later_ms": 1e3 * float(times_IL[1:].mean())}
    return row

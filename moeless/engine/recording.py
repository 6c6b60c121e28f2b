"""The routing of a live run: read from the ranks' records, and written as a trace that simulator and predictors read.

Axes: T tokens in order of request and position, L MoE layers, K top-k, H hidden, N requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moeless.contracts import IntArray
from moeless.engine.job import Job
from moeless.engine.options import LiveWorkload
from moeless.errors import RunFailed
from moeless.traces import RequestRows, TokenTraceWriter, TraceInfo


@dataclass(frozen=True)
class Routing:
    """What the router chose for every token of every finished request.

    Attributes:
        first_row_N: of each of the job's requests.
        input_TLH: what each gate saw, float16; None where no predictor of the run reads it.
    """

    request_T: IntArray
    token_T: IntArray
    topk_TLK: NDArray[np.uint16]
    weights_TLK: NDArray[np.float16]
    input_TLH: NDArray[np.float16] | None
    first_row_N: IntArray


def read_routing(job: Job) -> Routing:
    """What the ranks recorded of the job's recorded policy.

    Raises:
        RunFailed: a rank recorded nothing at all.
    """
    arrays: dict[str, list[NDArray[Any]]] = {}
    for rank in range(job.ranks):
        with np.load(job.folder / f"records-{job.recorded_cell}-{rank}.npz") as found:
            for key in found.files:
                if key.startswith("trace_"):
                    arrays.setdefault(key[6:], []).append(found[key])
    if not arrays:
        raise RunFailed("no routing was recorded")
    columns = {name: np.concatenate(parts) for name, parts in arrays.items()}
    order = np.lexsort((columns["position"], columns["request"]))
    columns = {name: values[order] for name, values in columns.items()}
    ids = np.array([live.request.id for live in job.requests])
    return Routing(
        columns["request"],
        columns["token"],
        columns["experts"],
        columns["weights"],
        columns.get("inputs"),
        np.searchsorted(columns["request"], ids),
    )


def write_trace(job: Job, routing: Routing, out: Path, workload: LiveWorkload) -> TraceInfo:
    """Write the routing as a trace of kind *tokens*, with gate inputs where they were recorded.

    Raises:
        UserError: ``out`` exists already.
    """
    info = TraceInfo(
        kind="tokens",
        spec=job.spec,
        source={
            "model": str(job.model.name),
            "engine": "live",
            "policy": job.policies[job.recorded_cell],
            "ranks": job.ranks,
        },
        prompt_source={"prompts": workload.prompts or "bundled", "seed": workload.seed},
        seed=job.seed,
        settings={"host": job.host, "dtype": job.dtype, "temperature": job.temperature},
        router_input_dtype=None if routing.input_TLH is None else "float16",
    )
    writer = TokenTraceWriter(out, info)
    for live in job.requests:
        rows = np.flatnonzero(routing.request_T == live.request.id)
        if not len(rows):
            continue
        inputs = None if routing.input_TLH is None else torch.from_numpy(routing.input_TLH[rows])
        writer.append(
            [
                RequestRows(
                    live.request.id,
                    routing.topk_TLK[rows],
                    live.request.prompt_tokens,
                    live.request.output_tokens,
                    weights_TLK=routing.weights_TLK[rows],
                    token_T=routing.token_T[rows],
                    input_TLH=inputs,
                    category=live.request.category,
                )
            ]
        )
    return writer.close()

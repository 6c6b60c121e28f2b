"""The routing of a live run as a trace folder that the simulator and predictors read."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moeless.engine.job import Job
from moeless.engine.workload import WorkloadSettings
from moeless.traces import RequestRows, TokenTraceWriter, TraceInfo


def write_trace(job: Job, cell: int, out: Path, workload: WorkloadSettings) -> TraceInfo:
    """Write what the ranks routed under one policy as a trace of kind *tokens*.

    Raises:
        UserError: ``out`` exists already, or nothing was recorded.
    """
    info = TraceInfo(
        kind="tokens",
        spec=job.spec,
        source={"model": str(job.model.name), "engine": "live", "policy": job.policies[cell], "ranks": job.ranks},
        prompt_source={"prompts": workload.prompts or "bundled", "seed": workload.seed},
        seed=job.seed,
        settings={"host": job.host, "dtype": job.dtype, "temperature": job.temperature},
    )
    arrays: dict[str, list[np.ndarray]] = {}  # type: ignore[type-arg]
    for rank in range(job.ranks):
        with np.load(job.folder / f"records-{cell}-{rank}.npz") as found:
            for key in found.files:
                if key.startswith("trace_"):
                    arrays.setdefault(key[6:], []).append(found[key])
    columns = {name: np.concatenate(parts) for name, parts in arrays.items()}
    order = np.lexsort((columns["position"], columns["request"])) if columns else np.empty(0, np.int64)
    columns = {name: values[order] for name, values in columns.items()}
    writer = TokenTraceWriter(out, info)
    for live in job.requests:
        rows = np.flatnonzero(columns["request"] == live.request.id) if columns else order
        if not len(rows):
            continue
        writer.append(
            [
                RequestRows(
                    live.request.id,
                    columns["experts"][rows],
                    live.request.prompt_tokens,
                    live.request.output_tokens,
                    weights_TLK=columns["weights"][rows],
                    token_T=columns["token"][rows],
                    category=live.request.category,
                )
            ]
        )
    return writer.close()

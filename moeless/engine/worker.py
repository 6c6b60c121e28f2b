"""One rank from start to end: join, load, serve the workload under every policy, write records.

Under ``torchrun`` this module is the program: ``python -m moeless.engine.worker JOB``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeless.allocator import keep_freed_memory
from moeless.contracts import Phase
from moeless.engine import groups
from moeless.engine.controller import Controller, ControlSettings
from moeless.engine.elastic import ElasticExperts, columns
from moeless.engine.exchange import Exchange
from moeless.engine.groups import Ranks
from moeless.engine.hostmem import HostExperts, shared_experts
from moeless.engine.hosts import Host, load_host
from moeless.engine.job import Job
from moeless.engine.launch import describe, die_with
from moeless.engine.policy import resolve_live
from moeless.engine.serving import LoopSettings, Served, ServingLoop
from moeless.engine.store import ReplicaStore
from moeless.engine.torchrun import Place, place, report_path
from moeless.machine import available_bytes, cores, processor_quota
from moeless.policy import ResolvedPolicy
from moeless.serverless import KeepAlive

#: Memory that a rank keeps for requests, messages and tables when it makes its slots.
WORK_BYTES = 64 * 2**20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def policies_of(job: Job) -> list[ResolvedPolicy]:
    """The job's policies with their parts.

    Raises:
        UserError: one of them does not exist or cannot run live.
    """
    return [
        resolve_live(
            text,
            spec=job.spec,
            cluster=job.cluster,
            costs=job.costs,
            extra_slots=job.extra_slots,
            model=job.model,
            predictors=job.predictors,
            params=job.planner_params.get(text.partition(":")[0]),
        )
        for text in job.policies
    ]


def host_experts(job: Job, host: Host, exchange: Exchange) -> HostExperts:
    """Map this machine's expert weights; its ranks read the checkpoint's experts between them."""
    spec, ranks = job.spec, exchange.ranks
    experts = shared_experts(job.shared, spec.L, spec.E, host.ffn.shapes, host.ffn.dtype, exchange)
    if ranks.device.type == "cuda":
        experts.pin()
    for layer in range(spec.L):
        for expert in range(ranks.local_rank, spec.E, ranks.local_world):
            experts.fill(layer, expert, host.read_expert(layer, expert))
    exchange.barrier()
    return experts


def slot_room(exchange: Exchange) -> int | None:
    """Bytes that this rank's slots may take of the memory of its machine, shared evenly; None on a GPU.

    All ranks look before any of them takes something.
    """
    ranks = exchange.ranks
    here = slice(ranks.first_local, ranks.first_local + ranks.local_world)
    least = min(groups.from_all(ranks, available_bytes())[here])
    return None if ranks.device.type == "cuda" else max(0, least // ranks.local_world - WORK_BYTES)


def machine_facts(ranks: Ranks) -> dict[str, Any]:
    """On which machine this rank ran, and what it might use of it: results compare ranks with cores."""
    mask = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(cores()))
    return {"machine": ranks.first_local, "cpus": mask, "cpu_quota": processor_quota()}


def memory_facts(host: Host, store: ReplicaStore, experts: HostExperts) -> dict[str, int]:
    """Bytes of this rank: read from the checkpoint so far, held by it alone, shared with its machine's ranks."""
    own = [*host.model.parameters(), *host.model.buffers(), *store.tensors()]
    shared = store.num_layers * experts.num_experts * experts.expert_bytes
    return {
        "read_bytes": host.checkpoint.read_bytes,
        "own_bytes": sum(tensor.nbytes for tensor in own),
        "shared_bytes": shared,
    }


def serve(job: Job, ranks: Ranks) -> None:
    """Run the whole job on this rank.

    Raises:
        UserError: the model or a policy is refused.
        RunFailed: memory or another rank fails.
    """
    torch.manual_seed(job.seed)
    keep_freed_memory()
    exchange = Exchange(ranks)
    policies = policies_of(job)
    host = load_host(job.host, job.model, spec=job.spec, device=ranks.device, dtype=DTYPES[job.dtype])
    experts = host_experts(job, host, exchange)
    slots = max(int(policy.budget.slots_G.max()) for policy in policies) + job.spare_slots
    store = ReplicaStore(
        experts,
        job.spec.L,
        min(slots, job.spec.E),
        ranks.device,
        host.ffn.dtype,
        least=-(-job.spec.E // ranks.world),
        room_bytes=slot_room(exchange),
        rank=ranks.rank,
        group=ranks.moves,
    )
    settings = ControlSettings(
        job.replan_seconds, KeepAlive.parse(job.keep_alive), job.skip_below_tokens, job.plan_every, job.copy_from
    )
    for cell, policy in enumerate(policies):
        policy.warm_up()
        elastic = ElasticExperts(
            Controller(policy, exchange, store, settings), host.ffn, record=job.record and cell == job.recorded_cell
        )
        elastic.record_inputs = job.record_inputs
        scheduler = job.scheduler([live.request for live in job.requests], ranks.world)
        loop_settings = LoopSettings(
            job.temperature, job.top_p, job.seed, keep_logits=job.verify and not policy.lossy, prompt_nll=job.verify
        )
        # one walk without tokens: threads, buffers and message channels exist before the clock starts
        host.moe = elastic
        elastic.controller.begin(Phase.MIXED, 0, 0.0)
        host.idle_step()
        elastic.reset()
        exchange.calls.clear()
        products = getattr(host.ffn, "products", 0)
        with (job.folder / f"finished-{cell}-{ranks.rank}.jsonl").open("w", encoding="utf-8") as finished:
            loop = ServingLoop(host, elastic, exchange, scheduler, job.requests, loop_settings, finished)
            served = loop.run()
        elastic.controller.close()
        end = served.end_I[-1] if served.end_I else 0.0
        counts = store.settle(end)
        _write(
            job,
            cell,
            ranks.rank,
            served,
            elastic,
            {
                **counts.__dict__,
                **memory_facts(host, store, experts),
                **machine_facts(ranks),
                "collectives": dict(exchange.calls),
                "piled_up": scheduler.queueing().piled_up,
                "nll": served.nll,
                "products": getattr(host.ffn, "products", 0) - products,
                "grouped": getattr(host.ffn, "grouped", None),
            },
        )
        exchange.barrier()
    store.close()


def _write(job: Job, cell: int, rank: int, served: Served, elastic: ElasticExperts, facts: Mapping[str, Any]) -> None:
    """Leave this rank's records of one cell in the run's folder."""
    elastic.settle()
    arrays = {
        "rows_ILC": columns(elastic.rows, job.spec.L),
        "start_I": np.array(served.start_I),
        "end_I": np.array(served.end_I),
        "tokens_I": np.array(served.tokens_I, np.int64),
        "phase_I": np.array(served.phase_I, np.int64),
    }
    for name in served.recorded[0] if served.recorded else ():
        arrays[f"trace_{name}"] = np.concatenate([part[name] for part in served.recorded])
    np.savez(job.folder / f"records-{cell}-{rank}.npz", **arrays)  # type: ignore[arg-type]
    for request, rows in served.logits.items():
        np.save(job.folder / f"logits-{cell}-{request}.npy", np.stack(rows))
    (job.folder / f"facts-{cell}-{rank}.json").write_text(json.dumps(facts), encoding="utf-8")


def serve_at(job: Job, at: Place) -> None:
    """Join the other ranks of a torchrun launch, serve the job, and leave; a failure is reported in the job's folder.

    Raises:
        UserError, RunFailed: as :func:`serve`.
    """
    threads = 1 if job.device == "cpu" else min(torch.get_num_threads(), max(1, cores() // at.local_world))
    torch.set_num_threads(threads)
    try:
        ranks = groups.join(
            at.rank,
            at.world,
            device=job.device,
            local_rank=at.local_rank,
            local_world=at.local_world,
            timeout_seconds=job.timeout_seconds,
        )
        serve(job, ranks)
        groups.leave()
    except Exception as error:
        report = describe(error)
        job.folder.mkdir(parents=True, exist_ok=True)
        report_path(job.folder, at.rank).write_text(json.dumps(report.__dict__), encoding="utf-8")
        if report.kind == "peer":
            # the rank that caused it may still be writing its own report
            time.sleep(1.0)
        raise


def main(path: str) -> int:
    """The program under ``torchrun``: one rank of a job file."""
    at = place()
    if at is None:
        sys.stderr.write("moeless.engine.worker runs under torchrun; see moeless serve-bench --backend live\n")
        return 2
    die_with(os.getppid())
    try:
        serve_at(Job.read(Path(path)), at)
        return 0
    except Exception:
        if os.environ.get("MOELESS_TRACEBACK"):
            raise
        return 1


if __name__ == "__main__":
    code = main(sys.argv[1])
    # a thread that waits for a peer must not hold the process
    os._exit(code)

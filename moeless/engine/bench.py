"""A whole live benchmark: launch ranks, serve the workload under every policy, verify, make result cells."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from moeless.cluster import Cluster, cluster
from moeless.configuration import inherited
from moeless.contracts import ModelPlan
from moeless.devices import gpus_with_room
from moeless.engine import room
from moeless.engine.checkpoint import Checkpoint
from moeless.engine.forkserver import ForkServer
from moeless.engine.hosts import HOSTS, remarks
from moeless.engine.job import Job
from moeless.engine.options import LiveConfig, ServingOptions
from moeless.engine.predicted import best_costs, predict
from moeless.engine.results import finished_requests, make_cell, read_records
from moeless.engine.start import by_torchrun, launch, serve_at
from moeless.engine.torchrun import Place, end_well_on_sigterm, place
from moeless.engine.verify import verification_path
from moeless.engine.workload import live_requests
from moeless.errors import RunFailed, UserError
from moeless.files import write_text
from moeless.machine import cores
from moeless.metrics.result import Cell
from moeless.spec import BYTES_PER_WEIGHT, MoESpec

#: Memory, as measured with the bundled model: of a program with the libraries that ranks need, of a rank that is forked
#: from it, of a rank under torchrun, and of torchrun itself.
PROGRAM_BYTES, FORKED_BYTES, RANK_BYTES, AGENT_BYTES = 400 * 10**6, 60 * 10**6, 450 * 10**6, 200 * 10**6


class LiveBench:
    """A checked configuration; nothing runs before :meth:`run`.

    Attributes:
        remarks: on this machine, for whoever runs it; one sentence each.
        shared: folder for the experts' mapping on this machine.

    Raises:
        UserError: something asked for does not exist, does not fit together, or a file is broken.
    """

    def __init__(self, config: LiveConfig) -> None:
        import torch

        from moeless.predictors.gates import checkpoint_folder
        from moeless.traces.specs import resolve_spec

        if not config.policies:
            raise UserError("a live run needs at least one --policy")
        HOSTS.get(config.host)
        self.config = config
        self.device: str = config.device
        self.place = place()
        self.remarks = remarks(config.host)
        here = config.ranks if self.place is None else self.place.local_world
        if self.place is not None and self.place.world != config.ranks:
            raise UserError(f"torchrun started {self.place.world} ranks, --ranks says {config.ranks}")
        if config.device == "cuda" and torch.cuda.device_count() < here:
            raise UserError(f"{here} ranks need as many GPUs, this machine has {torch.cuda.device_count()}")
        if config.launcher == "fork" and config.device == "cuda":
            raise UserError("forked ranks cannot use GPUs; leave --launcher out, or give --launcher torchrun")
        self.model = checkpoint_folder("bundled" if config.model is None else config.model)
        Checkpoint(self.model)
        spec = resolve_spec(str(self.model))
        if config.device == "auto":
            self.device = self._free_device(spec, here)
        self.dtype = config.dtype or ("float32" if self.device == "cpu" or config.verify else spec.dtype)
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise UserError(f"--dtype {self.dtype!r} is none of float32, bfloat16, float16")
        name = "bundled" if config.model is None else spec.name
        self.spec: MoESpec = dataclasses.replace(spec, name=name, dtype=self.dtype, expert_dtype=self.dtype)
        self.costs = config.costs or best_costs(self.spec, self.cluster, self.device)
        self.requests = live_requests(self.model, config)
        config.scheduler([live.request for live in self.requests], config.ranks)
        self._check_policies()
        self.shared, remark = room.place(self.needs(), room.look())
        self.remarks += [remark] if remark is not None else []

    def _free_device(self, spec: MoESpec, here: int) -> str:
        """GPUs where this machine has one for each of its ranks, with room for the rank's part of the model."""
        import torch

        if self.config.launcher == "fork" or torch.cuda.device_count() < here:
            return "cpu"
        if self.place is not None:
            # all ranks have to come to the same answer, whatever each finds on its own machine
            return "cuda"
        dtype = self.config.dtype or ("float32" if self.config.verify else spec.dtype)
        experts = spec.L * -(-spec.E // self.config.ranks) * spec.expert_params
        needed = (experts + spec.non_expert_params) * BYTES_PER_WEIGHT.get(dtype, 4)
        device, remark = gpus_with_room(round(needed), here)
        self.remarks += [remark] if remark is not None else []
        return device

    @property
    def cluster(self) -> Cluster:
        """The cluster that planners plan for, with as many GPUs as there are ranks."""
        ranks = self.config.ranks
        name = self.config.cluster or ("h100x8" if self.device != "cpu" else "cpu2" if ranks <= 2 else "cpu8")
        found = cluster(name)
        return dataclasses.replace(
            found, num_gpus=ranks, island_size=min(found.island_size, ranks), gpus_per_node=max(found.gpus_per_node, 1)
        )

    def _check_policies(self) -> None:
        from moeless.engine.worker import policies_of

        self._reads_inputs = False
        job = self._job(Path(), Path())
        for policy in policies_of(job):
            self._reads_inputs |= policy.predictor is not None and policy.predictor.reads == "router_inputs"
            ModelPlan(job.spec.name, job.spec.E, job.ranks, policy.label, tuple(policy.first_plans()))

    def estimate(self) -> dict[str, Any]:
        """What the run takes: tokens, bytes of expert copies per rank and of host memory, and where the experts lie."""
        config, spec = self.config, self.spec
        slots = min(-(-spec.E // config.ranks) + config.extra_slots + config.spare_slots, spec.E)
        positions = sum(live.request.prompt_tokens + live.request.output_tokens - 1 for live in self.requests)
        return {
            "device": self.device,
            "dtype": self.dtype,
            "cores": cores(),
            "requests": len(self.requests),
            "token_positions": positions * len(config.policies),
            "host_expert_mb": round(spec.L * spec.E * spec.expert_bytes / 1e6, 1),
            "rank_expert_mb": round(spec.L * slots * spec.expert_bytes / 1e6, 1),
            "rank_other_mb": round(spec.non_expert_bytes / 1e6, 1),
            "experts_in": str(self.shared),
            "machine_memory_mb": round((self.needs().experts + self.needs().memory) / 1e6, 1),
        }

    def needs(self) -> room.Needs:
        """What the ranks of this machine need at the least, and after them the verification's reference."""
        config, spec = self.config, self.spec
        here = config.ranks if self.place is None else self.place.local_world
        experts = spec.L * spec.E * spec.expert_bytes
        own = 2 * spec.expert_bytes
        if self.device == "cpu":
            own += spec.L * -(-spec.E // config.ranks) * spec.expert_bytes + spec.non_expert_bytes
        logits = 0
        if config.verify:
            logits = 4 * spec.vocab_size * sum(live.request.output_tokens for live in self.requests)
        separate = self.place is not None or by_torchrun(self.device, config.launcher)
        programs = AGENT_BYTES + here * RANK_BYTES if separate else PROGRAM_BYTES + here * FORKED_BYTES
        serving = programs + here * own + logits
        verifying = 0
        if config.verify:
            kinds = 4 + (0 if self.dtype == "float32" else 2)
            numbers = spec.L * spec.E * spec.expert_params + spec.non_expert_params
            verifying = PROGRAM_BYTES + kinds * numbers + 2 * logits
        return room.Needs(experts, max(serving, verifying - experts), here, logits * len(config.policies))

    def _job(self, folder: Path, shared: Path) -> Job:
        config = self.config
        return Job(
            model=self.model,
            device=self.device,
            dtype=self.dtype,
            spec=self.spec,
            cluster=self.cluster,
            costs=self.costs,
            requests=self.requests,
            folder=folder,
            shared=shared,
            record=config.record or config.predict,
            record_inputs=self._reads_inputs,
            **inherited(ServingOptions, config),
        )

    def run(self, out: Path) -> list[Cell]:
        """Launch the ranks, serve, verify.

        ``out`` gets ``requests.jsonl`` (every finished request's token times and tokens, also after a failure), and
        with ``record`` a trace in ``trace/``.

        Raises:
            RunFailed: a rank failed or was killed, or a policy's outputs are not the model's.
        """
        with contextlib.ExitStack() as stack:
            self._server: ForkServer | None = None
            stack.callback(self._end_server)
            if self.place is not None:
                job = self.job_at(self.place, out)
                stack.callback(shutil.rmtree, job.folder, ignore_errors=True)
                start = partial(serve_at, job, self.place)
                end_well_on_sigterm()
            else:
                scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="moeless-"))
                job = self._job(Path(scratch), self.shared)
                forks = None if by_torchrun(job.device, self.config.launcher) else self._forks()
                start = partial(launch, job, self.config.launcher, forks)
            try:
                start()
            except BaseException:
                self._keep_finished(job, out)
                raise
            self._keep_finished(job, out)
            return self._cells(job, out)

    def _forks(self) -> ForkServer:
        """The process that forks ranks and the verification; started when it is first needed."""
        if self._server is None:
            self._server = ForkServer()
        return self._server

    def _end_server(self) -> None:
        if self._server is not None:
            self._server.close()

    def job_at(self, at: Place, out: Path) -> Job:
        """The job of a rank that torchrun started; ``out`` must be one folder on all machines."""
        folder = out / "ranks"
        if at.rank == 0:
            # the others meet it before they write
            folder.mkdir(parents=True, exist_ok=True)
        return self._job(folder, self.shared)

    def serve_rank(self, out: Path) -> None:
        """Be a rank other than the first of a torchrun launch.

        Raises:
            UserError, RunFailed: as :meth:`run`.
        """
        assert self.place is not None
        serve_at(self.job_at(self.place, out), self.place)

    def _keep_finished(self, job: Job, out: Path) -> None:
        lines = [
            json.dumps({"policy": text, **entry})
            for cell, text in enumerate(job.policies)
            for entry in finished_requests(job.folder, cell, job.ranks)
        ]
        if lines:
            write_text(out / "requests.jsonl", "\n".join(lines) + "\n")

    def _cells(self, job: Job, out: Path) -> list[Cell]:
        from moeless.engine.worker import policies_of

        policies = policies_of(job)
        records = [read_records(job, cell) for cell in range(len(policies))]
        checked = self._verify(job, [policy.lossy for policy in policies]) if job.verify else {}
        cells = []
        for index, (policy, record) in enumerate(zip(policies, records, strict=True)):
            settings: dict[str, Any] = {"arrivals": self.config.arrivals}
            if index in checked:
                settings["verification"] = checked[index]
            cell = make_cell(
                job, policy, record, warmup=self.config.warmup, objectives=self.config.objectives, settings=settings
            )
            if index in checked and not checked[index]["passed"]:
                cell = dataclasses.replace(cell, warnings=(*cell.warnings, checked[index]["sentence"]))
            cells.append(cell)
        if job.record:
            from moeless.engine.recording import read_routing, write_trace

            routing = read_routing(job)
            if self.config.record:
                write_trace(job, routing, out / "trace", self.config)
            if self.config.predict:
                cells += predict(job, policies, routing, warmup=self.config.warmup, objectives=self.config.objectives)
        return cells

    def _verify(self, job: Job, lossy: Sequence[bool]) -> dict[int, dict[str, Any]]:
        """Compare every policy with the reference, in a process of its own."""
        path = job.folder / "verified-job.json"
        job.write(path)
        cells = [cell for cell, is_lossy in enumerate(lossy) if not is_lossy]
        self._forks().run("moeless.engine.verify:verifying", {"job": str(path), "cells": cells}, 1)
        found = json.loads(verification_path(job).read_text(encoding="utf-8"))
        return {int(cell): entry for cell, entry in found.items()}


def check_verified(cells: Sequence[Cell]) -> None:
    """Fail a run whose outputs are not the model's.

    Raises:
        RunFailed: a policy did not pass; the sentence says which and by how much.
    """
    for cell in cells:
        entry = cell.settings.get("verification")
        if entry is not None and not entry["passed"]:
            raise RunFailed(f"policy {cell.policy} is {entry['sentence']}")

"""What the ranks of one run have to do: a plain file that every rank reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeless.cluster import Cluster
from moeless.contracts import Request
from moeless.engine.moves import CopySource
from moeless.engine.serving import LiveRequest
from moeless.files import read_json, write_json
from moeless.spec import MoESpec


@dataclass(frozen=True)
class Job:
    """Every policy over the same requests, on the same ranks.

    Attributes:
        folder: scratch folder of the run; ranks write their records there.
        shared: folder of the machine's memory file system for the experts' mapping.
        spare_slots: places per layer beyond the budget, which keep-alive uses.
        keep_alive: ``SECONDS``, ``lru`` or ``adaptive[:SECONDS]``; see :class:`moeless.serverless.KeepAlive`.
        copy_from: where copies come from, one of ``moeless.engine.moves.COPY_SOURCES``.
        temperature, top_p: of sampling; temperature 0 is greedy.
        record, record_inputs: keep what the first policy that is not lossy routed, and what its gates saw.
        verify: keep the generated tokens' logits and score the prompts.
    """

    model: Path
    host: str
    device: str
    dtype: str
    ranks: int
    spec: MoESpec
    cluster: Cluster
    costs: str
    policies: tuple[str, ...]
    requests: tuple[LiveRequest, ...]
    folder: Path
    shared: Path
    batching: str = "continuous"
    token_budget: int = 2048
    max_running: int = 64
    extra_slots: int = 1
    spare_slots: int = 1
    keep_alive: str = "10"
    copy_from: CopySource = "auto"
    replan_seconds: float = 2.0
    skip_below_tokens: int = 0
    plan_every: int = 1
    predictors: tuple[Path, ...] = ()
    planner_params: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    verify: bool = False
    record: bool = False
    record_inputs: bool = False
    timeout_seconds: float = 120.0

    @property
    def recorded_cell(self) -> int:
        """The policy whose routing is kept: the router's own, so never the oracle's where there is another."""
        return next((index for index, text in enumerate(self.policies) if text != "oracle"), 0)

    @property
    def batching_options(self) -> dict[str, Any]:
        """What the scheduler takes."""
        if self.batching != "continuous":
            return {}
        return {"token_budget": self.token_budget, "max_running": self.max_running}

    def write(self, path: Path) -> None:
        """Write the job for ranks that are started elsewhere."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data |= {"spec": self.spec.to_json(), "cluster": self.cluster.to_json()}
        data |= {name: str(data[name]) for name in ("model", "folder", "shared")}
        data["predictors"] = [str(p) for p in self.predictors]
        data["policies"] = list(self.policies)
        data["planner_params"] = {name: dict(values) for name, values in self.planner_params.items()}
        data["requests"] = [dataclasses.asdict(live.request) | {"tokens": list(live.token_P)} for live in self.requests]
        write_json(path, data)

    @classmethod
    def read(cls, path: Path) -> Job:
        """Read what :meth:`write` wrote."""
        data = read_json(path)
        requests = tuple(
            LiveRequest(Request(**{k: v for k, v in entry.items() if k != "tokens"}), tuple(entry["tokens"]))
            for entry in data["requests"]
        )
        data |= {"spec": MoESpec.from_json(data["spec"]), "cluster": Cluster.from_json(data["cluster"])}
        data |= {name: Path(data[name]) for name in ("model", "folder", "shared")}
        data |= {"requests": requests, "policies": tuple(data["policies"])}
        data["predictors"] = tuple(Path(p) for p in data["predictors"])
        return cls(**data)

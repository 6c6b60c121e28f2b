"""What the ranks of one run have to do: a plain file that every rank reads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from moeless.cluster import Cluster
from moeless.contracts import Request
from moeless.engine.options import ServingOptions
from moeless.engine.serving import LiveRequest
from moeless.files import read_json, write_json
from moeless.spec import MoESpec


@dataclass(frozen=True, kw_only=True)
class Job(ServingOptions):
    """Every policy over the same requests, on the same ranks.

    Attributes:
        folder: scratch folder of the run; ranks write their records there.
        shared: folder of the machine's memory file system for the experts' mapping.
        record, record_inputs: keep what the first policy that is not lossy routed, and what its gates saw.
    """

    model: Path
    device: str
    dtype: str
    spec: MoESpec
    cluster: Cluster
    costs: str
    requests: tuple[LiveRequest, ...]
    folder: Path
    shared: Path
    record: bool = False
    record_inputs: bool = False
    timeout_seconds: float = 120.0

    @property
    def recorded_cell(self) -> int:
        """The policy whose routing is kept: the router's own, so never the oracle's where there is another."""
        return next((index for index, text in enumerate(self.policies) if text != "oracle"), 0)

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

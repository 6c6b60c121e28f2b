"""What the ranks of one run have to do: a plain file that every rank reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moeless.cluster import Cluster
from moeless.engine.options import ServingOptions
from moeless.engine.serving import LiveRequest
from moeless.files import read_json, write_json
from moeless.metrics import schema
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
        write_json(path, schema.to_json(self))

    @classmethod
    def read(cls, path: Path) -> Job:
        """Read what :meth:`write` wrote."""
        return schema.from_json(cls, read_json(path), str(path))

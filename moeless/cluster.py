"""Clusters: GPUs, their memory, and the two tiers of links between them.

An *island* is a set of GPUs joined by the fast links (an NVLink pair, an NVSwitch node); a *node*
shares one host memory. GPUs are numbered island by island, node by node.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moeless.configuration import Component, option
from moeless.errors import UserError

GB = 1e9
GIB = 2.0**30


@dataclass(frozen=True, kw_only=True)
class Hardware(Component, group="Model, cluster and costs"):
    """Which model's shapes on which GPUs, and how long their work takes."""

    model: str | None = option(
        None, "--model", "Model preset in place of the trace's own shapes; live: a model folder, or the bundled one."
    )
    cluster: str | None = option(None, "--cluster", "a6000x8, h100x8, h100x8xN (N nodes), cpu2 or cpu8.")
    costs: tuple[str, ...] | str | None = option(
        None,
        "--costs",
        "paper, roofline or measured[:PROFILE].",
        kind=list[str],
    )


@dataclass(frozen=True)
class Device:
    """One accelerator (or CPU rank). Rates are sustained peaks per device.

    Attributes:
        flops: dense matrix FLOP/s in the 16-bit type (32-bit on CPUs).
        memory_bytes, memory_bandwidth: capacity in bytes, reads in bytes/s.
        launch_seconds: fixed time of one layer's expert launch on a GPU.
        host_bandwidth: host to device, bytes/s (pinned).
        storage_bandwidth: object store or disk to host, bytes/s, per device.
        price_per_hour: US dollars; a list price, for the gpu-seconds bill.
        source: where each figure comes from.
    """

    name: str
    flops: float
    memory_bytes: float
    memory_bandwidth: float
    launch_seconds: float
    host_bandwidth: float
    storage_bandwidth: float
    price_per_hour: float
    source: str


@dataclass(frozen=True)
class Link:
    """Per GPU and direction: bytes/s; and the fixed seconds of one all-to-all over it."""

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Cluster:
    """``num_gpus`` equal devices; ``fast`` joins GPUs of an island, ``slow`` everything else."""

    name: str
    device: Device
    num_gpus: int
    island_size: int
    gpus_per_node: int
    fast: Link
    slow: Link

    def __post_init__(self) -> None:
        if self.num_gpus < 1 or self.island_size < 1 or self.gpus_per_node < 1:
            raise UserError(f"cluster {self.name!r}: GPUs, island size and GPUs per node must be at least 1")

    @property
    def G(self) -> int:
        """Number of GPUs, that is of EP ranks."""
        return self.num_gpus

    @property
    def num_nodes(self) -> int:
        """Machines, the last one possibly part-filled."""
        return -(-self.num_gpus // self.gpus_per_node)

    def island_of(self, gpu: int) -> int:
        """The island of a GPU."""
        return gpu // self.island_size

    def node_of(self, gpu: int) -> int:
        """The node of a GPU."""
        return gpu // self.gpus_per_node

    def with_gpus(self, num_gpus: int) -> Cluster:
        """The same machines in another number of GPUs."""
        return dataclasses.replace(self, name=f"{self.name}@{num_gpus}", num_gpus=num_gpus)

    def to_json(self) -> dict[str, Any]:
        """A dictionary that ``from_json`` takes back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Cluster:
        """Rebuild a cluster.

        Raises:
            UserError: a field is missing, unknown or of the wrong kind.
        """
        try:
            values = dict(data)
            values["device"] = Device(**values["device"])
            values["fast"], values["slow"] = Link(**values["fast"]), Link(**values["slow"])
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"not a cluster: {error}") from error


A6000 = Device(
    name="NVIDIA RTX A6000",
    flops=154.8e12,
    memory_bytes=48 * GIB,
    memory_bandwidth=768e9,
    launch_seconds=5e-6,
    host_bandwidth=25e9,
    storage_bandwidth=2e9,
    price_per_hour=0.80,
    source="RTX A6000 datasheet: 309.7 TFLOP/s sparse bf16 halved, 768 GB/s, PCIe 4.0 x16 at 80 % of 31.5 GB/s; "
    "storage and price are assumptions",
)
H100 = Device(
    name="NVIDIA H100 SXM",
    flops=700e12,
    memory_bytes=80 * GIB,
    memory_bandwidth=3.0e12,
    launch_seconds=3e-6,
    host_bandwidth=50e9,
    storage_bandwidth=4e9,
    price_per_hour=2.50,
    source="H100 SXM datasheet: 989 TFLOP/s dense bf16 and 3.35 TB/s, taken at the 700 TFLOP/s and 3.0 TB/s that "
    "large kernels reach, PCIe 5.0 x16 at 80 % of 63 GB/s; storage and price are assumptions",
)
CPU = Device(
    name="one CPU core",
    flops=40e9,
    memory_bytes=4 * GIB,
    memory_bandwidth=8e9,
    launch_seconds=50e-6,
    host_bandwidth=6e9,
    storage_bandwidth=0.5e9,
    price_per_hour=0.04,
    source="an order of magnitude for one server core; profile the machine for real figures",
)

_A6000_PAIR = Link(bandwidth=56.25e9, latency=10e-6)
_A6000_PCIE = Link(bandwidth=20e9, latency=20e-6)
_H100_NVSWITCH = Link(bandwidth=300e9, latency=10e-6)
_H100_NETWORK = Link(bandwidth=50e9, latency=25e-6)
_LOOPBACK = Link(bandwidth=1e9, latency=500e-6)
_LOOPBACK_CROWDED = Link(bandwidth=0.5e9, latency=4.7e-3)


def cluster(name: str) -> Cluster:
    """A built-in cluster: ``a6000x8``, ``h100x8``, ``h100x8xN`` (N nodes), ``cpu2``, ``cpu8``.

    ``a6000xG`` and ``h100xG`` take any number of GPUs up to one node of eight.

    Raises:
        UserError: the name is none of these.
    """
    match = re.fullmatch(r"(a6000|h100)x(\d{1,4})(?:x(\d{1,4}))?", name)
    if match:
        gpus, nodes = int(match[2]), int(match[3] or 1)
        if 1 <= gpus <= 8 and nodes >= 1 and (nodes == 1 or match[1] == "h100"):
            if match[1] == "h100":
                return Cluster(name, H100, gpus * nodes, gpus, gpus, _H100_NVSWITCH, _H100_NETWORK)
            return Cluster(name, A6000, gpus, min(2, gpus), gpus, _A6000_PAIR, _A6000_PCIE)
    if name == "cpu2":
        return Cluster(name, CPU, 2, 2, 2, _LOOPBACK, _LOOPBACK)
    if name == "cpu8":
        return Cluster(name, CPU, 8, 8, 8, _LOOPBACK_CROWDED, _LOOPBACK_CROWDED)
    raise UserError(f"no cluster is called {name!r}; there are: a6000x8, h100x8, h100x8xN (N nodes), cpu2, cpu8")

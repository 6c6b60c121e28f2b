"""The result file: one cell per policy, cost model and setting.

``result.json`` holds no NaN: a figure that is undefined is null, with a warning that says why. Durations
named ``*_ms`` are milliseconds, ``*_bytes`` bytes. Keys of :class:`RequestMetrics` are those of vLLM's
serving benchmark.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moeless.errors import UserError
from moeless.files import read_json, write_json
from moeless.metrics import schema

SCHEMA_VERSION = 1

Evidence = Literal["measured", "simulated", "synthetic", "stated"]


@dataclass(frozen=True)
class LayerMetrics:
    """MoE-layer figures over all (iteration, layer) pairs.

    Attributes:
        mean_ms, p50_ms, p99_ms: layer forward time, stalls and exposed control included.
        imbalance: mean over pairs of max / mean GPU load; ``balancedness`` likewise of mean / max.
        replicas: mean live replicas of a layer.
        moved_bytes: weight bytes that copies moved, over the whole run.
        warm_rate: replicas found warm when their layer ran, of all planned ones.
        stalls: exposed waiting by cause, seconds over the whole run.
        parts_ms: mean time by part (expert, all_to_all, misc, control, stall); they sum to ``mean_ms``.
        cdf_ms: the 0th, 1st, ... 100th percentile of layer time, empty where not kept.
        samples: (iteration, layer) pairs.
    """

    mean_ms: float
    p50_ms: float
    p99_ms: float
    imbalance: float
    replicas: float
    moved_bytes: float
    warm_rate: float
    stalls: Mapping[str, float]
    samples: int
    p90_ms: float | None = None
    balancedness: float | None = None
    active_experts: float | None = None
    parts_ms: Mapping[str, float] = field(default_factory=dict)
    cdf_ms: tuple[float, ...] = ()


@dataclass(frozen=True)
class RequestMetrics:
    """Request figures under the names of vLLM's serving benchmark; times are milliseconds, rates per second.

    TPOT is (end-to-end − TTFT) / (output tokens − 1) of each request with at least two output tokens, ITL
    each gap between successive tokens; either is None where no request has one.
    """

    duration: float
    completed: int
    failed: int
    total_input_tokens: int
    total_output_tokens: int
    request_throughput: float
    output_throughput: float
    total_token_throughput: float
    max_concurrent_requests: int
    mean_ttft_ms: float
    median_ttft_ms: float
    std_ttft_ms: float
    p99_ttft_ms: float
    mean_e2el_ms: float
    median_e2el_ms: float
    std_e2el_ms: float
    p99_e2el_ms: float
    mean_tpot_ms: float | None = None
    median_tpot_ms: float | None = None
    std_tpot_ms: float | None = None
    p99_tpot_ms: float | None = None
    mean_itl_ms: float | None = None
    median_itl_ms: float | None = None
    std_itl_ms: float | None = None
    p99_itl_ms: float | None = None
    request_goodput: float | None = None


@dataclass(frozen=True)
class Billing:
    """The three bills; formulas and what each flatters stand in ``moeless.metrics.billing``.

    Attributes:
        paper: GB·s, own layer's replicas times own duration.
        resident: GB·s of every resident expert copy, keep-alive included.
        gpu_seconds: GPU·s of every GPU that was held.
        paper_whole: GB·s, every layer's replicas times every layer's duration.
        gpu_dollars: ``gpu_seconds`` at the device's price, US dollars.
    """

    paper: float
    resident: float
    gpu_seconds: float
    paper_whole: float | None = None
    gpu_dollars: float | None = None


@dataclass(frozen=True)
class Cell:
    """One row of a result.

    Attributes:
        policy: as shown to people, for example ``static``, ``eplb:history``, ``moeless:layer_aware:1``.
        trace_kind: tokens, iterations, counts.
        evidence: measured (ran), simulated (real routing), synthetic (made-up routing), stated (a paper says so).
        request: None where request figures are undefined; a warning says why.
        settings: the assumptions that distinguish this cell (rate, batching, keep-alive, ...).
        lossy: True where the policy changes what the model computes (the oracle).
    """

    policy: str
    predictor: str
    distance: int
    model: str
    trace_kind: str
    cluster: str
    costs: str
    evidence: Evidence
    layer: LayerMetrics
    request: RequestMetrics | None
    billing: Billing
    warnings: tuple[str, ...] = ()
    lossy: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """Content of ``result.json``."""

    command: str
    cells: tuple[Cell, ...]
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> dict[str, Any]:
        """A dictionary that ``from_json`` takes back.

        Raises:
            ValueError: a figure is not finite.
        """
        data = schema.to_json(self)
        return {"schema_version": data.pop("schema_version"), **data}

    @classmethod
    def from_json(cls, data: Any, where: str = "result") -> Result:
        """Read a result strictly.

        Raises:
            UserError: the version differs, a key is missing or unknown, or a value has the wrong kind.
        """
        version = data.get("schema_version") if isinstance(data, Mapping) else None
        if version != SCHEMA_VERSION:
            raise UserError(f"{where} has schema_version {version!r}; this version of moeless reads {SCHEMA_VERSION}")
        return schema.from_json(cls, data, where)


def write_result(path: Path, result: Result) -> None:
    """Write ``result.json`` atomically."""
    write_json(path, result.to_json())


def read_result(path: Path) -> Result:
    """Read ``result.json``.

    Raises:
        UserError: the file is missing, is not JSON, or breaks the schema.
    """
    return Result.from_json(read_json(path), str(path))

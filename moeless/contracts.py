"""Plain data that passes between the parts, with its validation.

Glossary: an *expert* is logical; a *replica* is a physical copy of one; the *primary* is an expert's
first copy, every further one is an *extra*. A *plan* says which replicas one layer has and where.

Axes: L MoE layers, E experts, R replicas of one layer, G GPUs, S source ranks, T tokens, K top-k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless.errors import UserError

IntArray = NDArray[np.int64]
Int32Array = NDArray[np.int32]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


class Phase(IntEnum):
    """What a forward pass does; the values are those of the trace files."""

    PREFILL = 0
    DECODE = 1
    MIXED = 255


class InstanceState(IntEnum):
    """A replica as a serverless function."""

    COLD = 0
    LOADING = 1
    WARM = 2
    EXPIRED = 3


@dataclass(frozen=True)
class Forecast:
    """Predicted load of one layer: mean and variance in tokens per expert, for ``tokens`` tokens.

    ``mean_E`` sums to ``tokens * K``. Variances add across ranks.
    """

    mean_E: FloatArray
    var_E: FloatArray
    tokens: int
    source: str

    def __post_init__(self) -> None:
        mean, var = np.asarray(self.mean_E, np.float64), np.asarray(self.var_E, np.float64)
        object.__setattr__(self, "mean_E", mean)
        object.__setattr__(self, "var_E", var)
        if mean.ndim != 1 or var.shape != mean.shape:
            raise UserError(f"a forecast needs mean and variance of one length, got {mean.shape} and {var.shape}")
        # an array's minimum and maximum pass a NaN on, and no comparison holds for one
        if all(x.min(initial=0.0) >= 0.0 and x.max(initial=0.0) < np.inf for x in (mean, var)):
            return
        if not (np.isfinite(mean).all() and np.isfinite(var).all()):
            raise UserError(f"the forecast of {self.source!r} holds a value that is not finite")
        if (mean < 0).any() or (var < 0).any():
            raise UserError(f"the forecast of {self.source!r} holds a negative load or variance")


@dataclass(frozen=True)
class Context:
    """What a predictor may look at when it forecasts ``layer + distance`` from ``layer``.

    Attributes:
        router_input_TH: what layer's gate sees, None where it is not recorded.
        topk_TK: expert ids that layer's gate chose, None where unknown.
        history_E: mean load share of the *target* layer over the past (sums to 1), None at a cold start.
        last_load_E: load of the *target* layer in the previous iteration of this phase.
        tokens: tokens of this iteration.
        true_load_E: the target layer's true load; the ``oracle`` predictor alone reads it.
        token_T: token ids of this iteration, −1 where unknown; what is known before any layer has run.
        recent_E: load of the *target* layer summed over a window of recent iterations, None before there were any.
    """

    router_input_TH: NDArray[np.floating[Any]] | None
    topk_TK: NDArray[np.integer[Any]] | None
    history_E: FloatArray | None
    last_load_E: NDArray[np.number[Any]] | None
    tokens: int
    phase: Phase
    true_load_E: NDArray[np.number[Any]] | None = None
    recent_E: NDArray[np.number[Any]] | None = None
    token_T: NDArray[np.integer[Any]] | None = None


@dataclass(frozen=True)
class LayerPlan:
    """Replicas of one layer, sorted by (gpu, primary first, expert); one primary per expert.

    Build with :meth:`build`, which sorts and validates.

    ``share_R`` is each copy's part of its expert's tokens where that is fixed ahead: the layer then gathers no counts
    and decides nothing after the gate. None: the planner's dispatch splits, by its own rule.
    """

    layer: int
    expert_R: Int32Array
    gpu_R: Int32Array
    primary_R: BoolArray
    share_R: FloatArray | None = None

    @classmethod
    def build(
        cls, layer: int, expert_R: Any, gpu_R: Any, primary_R: Any, *, num_experts: int, num_gpus: int,
        share_R: Any = None,
    ) -> LayerPlan:  # fmt: skip
        """Sort the replicas and check the plan.

        Raises:
            UserError: an id is out of range, an expert has no primary or several, or its shares do not sum to 1.
        """
        expert = np.ascontiguousarray(expert_R, np.int32)
        gpu = np.ascontiguousarray(gpu_R, np.int32)
        primary = np.ascontiguousarray(primary_R, np.bool_)
        share = None if share_R is None else np.ascontiguousarray(share_R, np.float64)
        cls(layer, expert, gpu, primary, share)._check_replicas(num_experts, num_gpus)
        order = np.lexsort((expert, ~primary, gpu))
        return cls(layer, expert[order], gpu[order], primary[order], None if share is None else share[order])

    def validate(self, *, num_experts: int, num_gpus: int) -> None:
        """Raise :class:`UserError` where the plan breaks the contract."""
        self._check_replicas(num_experts, num_gpus)
        order = np.lexsort((self.expert_R, ~self.primary_R, self.gpu_R))
        if (order != np.arange(self.R)).any():
            raise UserError(f"plan of layer {self.layer}: replicas are not sorted by GPU, primary first, expert")

    def _check_replicas(self, num_experts: int, num_gpus: int) -> None:
        """All of :meth:`validate` but the order of the replicas."""
        expert, gpu, primary = self.expert_R, self.gpu_R, self.primary_R
        where = f"plan of layer {self.layer}"
        if not (expert.ndim == gpu.ndim == primary.ndim == 1 and len(expert) == len(gpu) == len(primary)):
            raise UserError(f"{where}: experts, GPUs and primary marks must be three rows of one length")
        if len(expert) and (expert.min() < 0 or expert.max() >= num_experts):
            raise UserError(f"{where}: an expert id lies outside 0..{num_experts - 1}")
        if len(gpu) and (gpu.min() < 0 or gpu.max() >= num_gpus):
            raise UserError(f"{where}: a GPU id lies outside 0..{num_gpus - 1}")
        counts = np.bincount(expert[primary], minlength=num_experts)
        if (counts != 1).any():
            bad = int(np.flatnonzero(counts != 1)[0])
            raise UserError(f"{where}: expert {bad} has {int(counts[bad])} primaries, it needs exactly one")
        if self.share_R is not None:
            share = self.share_R
            if share.shape != expert.shape or not (share >= 0).all():
                raise UserError(f"{where}: shares must be one number of at least 0 per replica")
            if not np.allclose(np.bincount(expert, weights=share, minlength=num_experts), 1.0, atol=1e-6):
                raise UserError(f"{where}: the shares of an expert's copies must sum to 1")

    @property
    def R(self) -> int:
        """Number of replicas."""
        return len(self.expert_R)

    @property
    def num_extra(self) -> int:
        """Replicas beyond the primaries."""
        return self.R - int(np.count_nonzero(self.primary_R))

    @property
    def decides(self) -> bool:
        """Whether anything is left to decide after the gate: an expert has several copies, their shares not fixed."""
        return self.num_extra > 0 and self.share_R is None

    def replicas_E(self, num_experts: int) -> IntArray:
        """Copies of each expert, ``[E]``."""
        return np.bincount(self.expert_R, minlength=num_experts).astype(np.int64)

    def slots_G(self, num_gpus: int) -> IntArray:
        """Copies on each GPU, ``[G]``."""
        return np.bincount(self.gpu_R, minlength=num_gpus).astype(np.int64)

    def to_json(self) -> dict[str, Any]:
        """A dictionary that ``from_json`` takes back."""
        data: dict[str, Any] = {
            "layer": self.layer,
            "expert": self.expert_R.tolist(),
            "gpu": self.gpu_R.tolist(),
            "primary": [bool(p) for p in self.primary_R],
        }
        if self.share_R is not None:
            data["share"] = self.share_R.tolist()
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, num_experts: int, num_gpus: int) -> LayerPlan:
        """Rebuild and check a plan.

        Raises:
            UserError: the dictionary is not one of a valid plan.
        """
        try:
            plan = cls(
                int(data["layer"]),
                np.asarray(data["expert"], np.int32),
                np.asarray(data["gpu"], np.int32),
                np.asarray(data["primary"], np.bool_),
                np.asarray(data["share"], np.float64) if "share" in data else None,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"not a layer plan: {error}") from error
        plan.validate(num_experts=num_experts, num_gpus=num_gpus)
        return plan


@dataclass(frozen=True)
class ModelPlan:
    """One :class:`LayerPlan` per MoE layer, in order, with what made it."""

    model: str
    num_experts: int
    num_gpus: int
    planner: str
    layers: tuple[LayerPlan, ...]
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for index, plan in enumerate(self.layers):
            if plan.layer != index:
                raise UserError(f"a model plan's layers must be 0, 1, 2, ...; position {index} holds {plan.layer}")
            plan.validate(num_experts=self.num_experts, num_gpus=self.num_gpus)

    def to_json(self) -> dict[str, Any]:
        """A dictionary that ``from_json`` takes back."""
        return {
            "format": 1,
            "model": self.model,
            "num_experts": self.num_experts,
            "num_gpus": self.num_gpus,
            "planner": self.planner,
            "notes": dict(self.notes),
            "layers": [plan.to_json() for plan in self.layers],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelPlan:
        """Rebuild and check a plan file's content.

        Raises:
            UserError: it is not one.
        """
        try:
            experts, gpus = int(data["num_experts"]), int(data["num_gpus"])
            layers = tuple(LayerPlan.from_json(layer, num_experts=experts, num_gpus=gpus) for layer in data["layers"])
            return cls(str(data["model"]), experts, gpus, str(data["planner"]), layers, dict(data.get("notes", {})))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"not a plan file: {error!r}") from error


@dataclass(frozen=True)
class Budget:
    """Room for replicas of one layer.

    Attributes:
        slots_G: replicas of one layer that each GPU may hold, ``[G]``.
        bytes_G: bytes that one layer's replicas may take on each GPU, ``[G]``.
        max_extra: replicas beyond the primaries, over all GPUs (the paper's M_cap / M_e).
    """

    slots_G: IntArray
    bytes_G: FloatArray
    max_extra: int

    @classmethod
    def even(cls, num_experts: int, num_gpus: int, extra_slots: int, expert_bytes: float) -> Budget:
        """Room for the static primaries and ``extra_slots`` more on every GPU."""
        slots = np.full(num_gpus, -(-num_experts // num_gpus) + extra_slots, np.int64)
        return cls(slots, slots.astype(np.float64) * float(expert_bytes), extra_slots * num_gpus)


@dataclass(frozen=True)
class PlanInput:
    """What a planner sees of one layer, ahead of time.

    ``state_R`` holds an :class:`InstanceState` per replica of ``previous``, None meaning all warm.
    ``horizon_iterations`` is how many iterations what the forecast says is expected to stay so; 0: not known.
    ``lead_seconds`` is the time until the layer begins: copies that arrive within it cost nothing.
    ``copy_seconds`` brings one expert to a GPU; None: from host memory, by the cost model.
    """

    layer: int
    phase: Phase
    forecast: Forecast
    previous: LayerPlan | None = None
    state_R: NDArray[np.uint8] | None = None
    horizon_iterations: int = 0
    lead_seconds: float = 0.0
    copy_seconds: float | None = None


@dataclass(frozen=True)
class Request:
    """One request of a workload.

    Attributes:
        id: position in order of arrival, from 0.
        arrival: seconds since the workload's start.
        prompt_tokens, output_tokens: lengths; the first output token comes out of the prefill.
        trace_request: the trace's request whose routing it replays, None where it has no trace.
    """

    id: int
    arrival: float
    prompt_tokens: int
    output_tokens: int
    trace_request: int | None = None
    category: str = ""


@dataclass(frozen=True)
class Span:
    """Positions ``start`` to ``stop`` of one request, computed in one iteration."""

    request: int
    start: int
    stop: int
    phase: Phase


@dataclass(frozen=True)
class Iteration:
    """One forward pass: its spans, and the data-parallel rank that owns each request's tokens."""

    id: int
    spans: Sequence[Span]
    rank_of_request: Mapping[int, int]

    @property
    def tokens(self) -> int:
        """Tokens of this pass."""
        return sum(span.stop - span.start for span in self.spans)

    @property
    def phase(self) -> Phase:
        """PREFILL or DECODE where all spans agree, otherwise MIXED."""
        phases = {span.phase for span in self.spans}
        return phases.pop() if len(phases) == 1 else Phase.MIXED


#: The distance of a policy that chooses it layer by layer while it runs.
AUTO = 0


@dataclass(frozen=True)
class Policy:
    """``planner[:predictor[:distance]]`` of the command line; distance 0 is ``auto``, chosen per layer at run time."""

    planner: str
    predictor: str = "none"
    distance: int = 1

    @classmethod
    def parse(cls, text: str) -> Policy:
        """Read a policy; names are checked by their registries, not here.

        Raises:
            UserError: the text has not that form.
        """
        parts = text.split(":")
        if not 1 <= len(parts) <= 3 or not all(parts):
            raise UserError(f"policy {text!r} is not of the form planner[:predictor[:distance]]")
        distance = parts[2] if len(parts) == 3 else "1"
        if distance == "auto":
            return cls(parts[0], parts[1], AUTO)
        if not distance.isdigit() or int(distance) < 1:
            raise UserError(f"policy {text!r}: the distance must be a whole number of at least 1, or auto")
        return cls(parts[0], parts[1] if len(parts) > 1 else "none", int(distance))

    def __str__(self) -> str:
        if self.predictor == "none":
            return self.planner
        return f"{self.planner}:{self.predictor}:{self.distance or 'auto'}"


def check_load(load_SE: Sequence[Any] | NDArray[Any]) -> IntArray:
    """Token counts of source rank and expert as int64.

    Raises:
        UserError: the array is not two-dimensional, or holds a negative or non-whole number.
    """
    load = np.asarray(load_SE)
    if load.ndim != 2:
        raise UserError(f"loads must have two axes (source rank, expert), got shape {load.shape}")
    if load.dtype.kind == "f" and not (np.isfinite(load).all() and (load == np.floor(load)).all()):
        raise UserError("loads must be whole numbers of tokens")
    if (load < 0).any():
        raise UserError("loads must not be negative")
    return load.astype(np.int64)

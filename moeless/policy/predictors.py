"""Where a policy's predictor comes from: ready, fitted and read from folders, or made from the model's own gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from moeless.contracts import Policy
from moeless.errors import UserError
from moeless.placement import Planner
from moeless.predictors import PREDICTORS, LoadPredictor, load_predictor
from moeless.spec import MoESpec


class PredictorSource(Protocol):
    """What resolving a policy asks for its predictor."""

    def default(self, planner: Planner) -> str:
        """The predictor of a policy that names none."""
        ...

    def get(self, name: str, policy: Policy) -> Any:
        """The predictor of that name.

        Raises:
            UserError: there is none.
        """
        ...


@dataclass(frozen=True)
class ReadyPredictors:
    """Predictors by name, as a notebook or a test has them."""

    ready: Mapping[str, Any]

    def default(self, planner: Planner) -> str:
        """The planner's own."""
        return planner.default_predictor

    def get(self, name: str, policy: Policy) -> Any:
        """The one of that name."""
        if name not in self.ready:
            known = ", ".join(sorted(self.ready))
            raise UserError(f"policy {policy}: no predictor {name!r} is at hand; there are: {known}")
        return self.ready[name]


@dataclass(frozen=True)
class FittedPredictors:
    """Fitted predictors from their folders; others as their registry makes them."""

    spec: MoESpec
    folders: Sequence[Path]

    @cached_property
    def fitted(self) -> dict[str, LoadPredictor]:
        """By name; the first folder of a name counts."""
        found: dict[str, LoadPredictor] = {}
        for folder in self.folders:
            loaded = load_predictor(folder)
            self.check(folder, loaded)
            found.setdefault(loaded.name, loaded)
        return found

    @cached_property
    def _made(self) -> dict[str, LoadPredictor]:
        return dict(self.fitted)

    def check(self, folder: Path, loaded: LoadPredictor) -> None:
        """Refuse a predictor of another model."""
        loaded.check_spec(self.spec, "the trace")

    def default(self, planner: Planner) -> str:
        """The planner's own."""
        return planner.default_predictor

    def get(self, name: str, policy: Policy) -> Any:
        """The one of that name, made once."""
        if name not in self._made:
            self._made[name] = self.make(name)
        return self._made[name]

    def make(self, name: str) -> LoadPredictor:
        """One that no folder holds."""
        kind: type[LoadPredictor] = PREDICTORS.get(name)
        return kind.unfitted(self.spec)


@dataclass(frozen=True)
class SimulationPredictors(FittedPredictors):
    """For a replayed trace.

    Attributes:
        has_router_inputs: whether the trace holds what gates see.
    """

    has_router_inputs: bool = False

    def get(self, name: str, policy: Policy) -> Any:
        """As its base class; what the predictor reads must be in the trace."""
        predictor = super().get(name, policy)
        if predictor.reads == "router_inputs" and not self.has_router_inputs:
            raise UserError(
                f"predictor {name!r} reads gate inputs, which the trace does not hold; record it with "
                "`moeless trace --router-inputs`, or use history"
            )
        return predictor


@dataclass(frozen=True)
class LivePredictors(FittedPredictors):
    """For a live model, whose gates can be read.

    Attributes:
        model: the model's folder.
    """

    model: Path = Path()

    def check(self, folder: Path, loaded: LoadPredictor) -> None:
        """As its base class, but names may differ: a live model is called as its folder is."""
        mine, its = ((s.L, s.E, s.K, s.hidden_size) for s in (self.spec, loaded.spec))
        if mine != its:
            raise UserError(
                f"{folder} was fitted for {loaded.spec.name}, whose shapes are not those of {self.spec.name}"
            )

    def default(self, planner: Planner) -> str:
        """The planner's own; where that has to be fitted and no folder holds it, the model's gates."""
        name = planner.default_predictor
        return "gate_reuse" if PREDICTORS.get(name).needs_fitting and name not in self.fitted else name

    def get(self, name: str, policy: Policy) -> Any:
        """As its base class; nobody knows the true loads of what has not run yet, or looks past the last layer."""
        if policy.distance >= self.spec.L:
            raise UserError(f"policy {policy}: the distance must be below the model's {self.spec.L} MoE layers")
        predictor = super().get(name, policy)
        if predictor.reads == "true_load":
            raise UserError(f"the {name} predictor reads the future and exists in the simulator only")
        return predictor

    def make(self, name: str) -> LoadPredictor:
        """One that no folder holds, from the model's gates where it takes them."""
        kind: type[LoadPredictor] = PREDICTORS.get(name)
        if kind.needs_gates and not kind.needs_fitting:
            from moeless.predictors.gates import read_gates

            return kind.unfitted(self.spec, read_gates(self.model, self.spec))
        return super().make(name)

"""What every load predictor is: a forecast of layer l + d's load from what layer l sees.

Importing this module needs NumPy alone; saving and loading need safetensors. The live engine relies on that.

Axes: T tokens, L MoE layers, E experts, K experts per token, H hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from moeless.contracts import Context, FloatArray, Forecast, IntArray, Phase
from moeless.errors import UserError
from moeless.files import folder_atomic, read_json, reading, write_json
from moeless.spec import MoESpec

if TYPE_CHECKING:
    from moeless.predictors.fitting import FitInput
    from moeless.predictors.gates import Gates
    from moeless.predictors.token_level import TokenLevel

PREDICTOR_FILE = "predictor.json"
WEIGHTS_FILE = "weights.safetensors"
METRICS_FILE = "metrics.json"
FORMAT = 1

#: What a predictor reads of the iteration: nothing but its size, the source layer's expert ids or gate inputs, or the
#: target layer's true load, which simulations alone can know.
Reads = Literal["nothing", "topk", "router_inputs", "true_load"]


class LoadPredictor(ABC):
    """Forecasts the load of layer ``layer + distance`` while ``layer`` runs.

    A class declares what it is; whoever uses it asks these declarations, never its name or its class.

    Attributes:
        name: the registry's name of the method.
        reads: what it takes from :class:`~moeless.contracts.Context` besides past loads and the number of tokens.
        needs_fitting: whether it has to be fitted on a trace before it forecasts.
        needs_gates: whether it is made from the model's gates.
        from_history: whether every forecast is ``Context.history_E`` alone. History is known before an iteration
            starts, so such a predictor needs no distance.
        forecasts_first: whether it has more than history for the first layers, which have no source layer (``layer``
            below 0).
        token_part: the method that forecasts single tokens, whose sum :meth:`from_tokens` takes; None where the
            predictor forecasts loads only.
        spec: the model whose loads it forecasts.
    """

    name: ClassVar[str]
    reads: Reads = "nothing"
    needs_fitting: ClassVar[bool] = False
    needs_gates: ClassVar[bool] = False
    from_history: ClassVar[bool] = False
    forecasts_first: ClassVar[bool] = False
    token_part: TokenLevel | None = None

    def __init__(self, spec: MoESpec) -> None:
        self.spec = spec

    @abstractmethod
    def predict(self, context: Context, layer: int, distance: int) -> Forecast:
        """Forecast the load ``[E]`` of layer ``layer + distance``, in tokens; its mean sums to ``tokens * K``.

        Without a source (``layer`` below 0, or nothing fitted for that pair) the forecast is history, else the last
        load, else equal shares; ``Forecast.source`` names which.

        Raises:
            UserError: the model has no such target layer, or an input is missing, holds NaN or has another shape.
        """

    def predict_topk(self, inputs: NDArray[Any], layer: int, distance: int) -> IntArray:
        """Expert ids ``[T, K]`` that each token is forecast to choose at ``layer + distance``, most likely first.

        Args:
            inputs: ``[T, H]`` gate inputs or ``[T, K]`` expert ids of ``layer``, as :attr:`reads` says.

        Raises:
            UserError: the method forecasts loads only, or the inputs do not fit.
        """
        raise UserError(f"predictor {self.name!r} forecasts loads, not single tokens")

    @classmethod
    def unfitted(cls, spec: MoESpec, gates: Gates | None = None) -> Self:
        """Make a predictor that needs no fitting, from the model's gates where it uses them.

        Raises:
            UserError: the method has to be fitted, or uses gates and none are given.
        """
        if cls.needs_fitting or (cls.needs_gates and gates is None):
            raise UserError(
                f"predictor {cls.name!r} must be fitted first: run `moeless train-predictor TRACE --method {cls.name} "
                "--out DIR` and pass that folder"
            )
        return cls(spec, *([gates] if cls.needs_gates else []))

    @classmethod
    def fit(cls, given: FitInput) -> Self:
        """Fit on a trace; the default is for methods that learn nothing.

        Raises:
            UserError: an option is unknown or refused, or the trace lacks what the method reads.
        """
        if given.options:
            raise UserError(f"predictor {cls.name!r} has no parameters")
        return cls.unfitted(given.rows.spec)

    @classmethod
    def fitting_class(cls, options: Mapping[str, Any], has_router_inputs: bool) -> type[LoadPredictor]:  # noqa: ARG003
        """The class whose ``reads`` and ``needs_gates`` say what a fit needs: this one, or that of a method inside."""
        return cls

    def skill(self, layer: int, distance: int, phase: Phase, tokens: int) -> float | None:
        """How much better than history it was on validation requests, for an iteration of ``tokens`` tokens.

        1 is exact, 0 is as good as history, below 0 is worse; None where it was not measured.
        """
        return None

    def to(self, device: Any) -> Self:
        """Move the fitted arrays, in place, to the device that holds the inputs.

        Args:
            device: a ``torch.device`` or its name.
        """
        return self

    def from_tokens(self, mean_E: FloatArray, context: Context, layer: int, distance: int) -> Forecast:
        """The forecast, given the load ``[E]`` that :attr:`token_part` forecasts for the iteration's tokens."""
        return self.predict(context, layer, distance)

    def settings(self) -> dict[str, Any]:
        """Values that ``predictor.json`` keeps besides name and model; all are JSON."""
        return {}

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Fitted arrays by name."""
        return {}

    @classmethod
    def from_state(
        cls,
        spec: MoESpec,
        settings: Mapping[str, Any],  # noqa: ARG003
        tensors: Mapping[str, NDArray[Any]],  # noqa: ARG003
    ) -> Self:
        """Rebuild a predictor from its :meth:`settings` and :meth:`tensors`."""
        return cls(spec)

    @property
    def num_parameters(self) -> int:
        """How many numbers were fitted."""
        return sum(int(array.size) for array in self.tensors().values())

    @property
    def memory_bytes(self) -> int:
        """Bytes of the fitted arrays in the precision in which they are stored."""
        return sum(int(array.nbytes) for array in self.tensors().values())

    def write(self, folder: Path, notes: Mapping[str, Any] | None = None) -> None:
        """Write the predictor's files into an existing folder."""
        from safetensors.numpy import save_file

        head = {"format": FORMAT, "name": self.name, "spec": self.spec.to_json(), "settings": self.settings()}
        write_json(folder / PREDICTOR_FILE, head | {"notes": dict(notes or {})})
        arrays = {name: np.ascontiguousarray(array) for name, array in self.tensors().items()}
        save_file(arrays, folder / WEIGHTS_FILE)

    def save(self, path: Path, notes: Mapping[str, Any] | None = None) -> None:
        """Write the predictor's folder, whole or not at all.

        Raises:
            UserError: ``path`` exists and is not an empty folder, or cannot be written.
        """
        with folder_atomic(path) as folder:
            self.write(folder, notes)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a folder that :meth:`save` wrote.

        Raises:
            UserError: the folder holds another method, or is damaged.
        """
        name, spec, settings = read_head(path)
        if name != cls.name:
            raise UserError(f"{path} holds predictor {name!r}, not {cls.name!r}")
        try:
            return cls.from_state(spec, settings, _read_tensors(path / WEIGHTS_FILE))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(f"{path} does not hold a complete predictor {name!r} ({error!r}); fit it again") from None

    def check_spec(self, spec: MoESpec, what: str) -> None:
        """Refuse a model other than the one that the predictor was fitted on.

        Only what routing depends on is compared: name, layers, experts, experts per token, hidden size.

        Raises:
            UserError: ``spec`` differs.
        """
        if _routing_of(spec) != _routing_of(self.spec):
            mine, other = (
                f"{s.name} ({s.L} MoE layers, {s.E} experts, top-{s.K}, hidden size {s.hidden_size})"
                for s in (self.spec, spec)
            )
            raise UserError(f"predictor {self.name!r} was fitted on {mine}; {what} is of {other}")

    def fallback(self, context: Context, target: int) -> Forecast:
        """Forecast from past loads alone: history, else the last load, else equal shares."""
        self._check_target(target)
        share_E, source = share_of(context.history_E, self.spec.E, "the history"), "history"
        if share_E is None:
            share_E, source = share_of(context.last_load_E, self.spec.E, "the last load"), "last"
        if share_E is None:
            share_E, source = np.full(self.spec.E, 1.0 / self.spec.E), "uniform"
        return self.scaled(share_E, context.tokens, source)

    def expecting(
        self, load_E: NDArray[Any] | None, what: str, context: Context, target: int, variance: float = 1.0
    ) -> Forecast:
        """Forecast a load in proportion to ``load_E``; :meth:`fallback` where that is None or zero everywhere.

        Args:
            load_E: loads or shares ``[E]``.
            what: what it is called in an error.
            variance: of the forecast, over its mean; 1 is that of a Poisson count.
        """
        self._check_target(target)
        share_E = share_of(load_E, self.spec.E, what)
        if share_E is None:
            return self.fallback(context, target)
        return self.scaled(share_E, context.tokens, self.name, variance)

    def scaled(self, share_E: FloatArray, tokens: int, source: str, variance: float = 1.0) -> Forecast:
        """Forecast a load in proportion to ``share_E``, which sums to ``tokens * K``.

        Args:
            share_E: loads or shares ``[E]``.
            source: what ``Forecast.source`` says.
            variance: of the forecast, over its mean; 1 is that of a Poisson count.
        """
        mean_E = proportional(share_E, tokens * self.spec.K)
        return Forecast(mean_E, variance * mean_E, tokens, source)

    def _check_target(self, target: int) -> None:
        if not 0 <= target < self.spec.L:
            raise UserError(f"there is no layer {target} to forecast: {self.spec.name} has {self.spec.L} MoE layers")


def read_head(path: Path) -> tuple[str, MoESpec, dict[str, Any]]:
    """Method name, model and settings of a predictor folder.

    Raises:
        UserError: there is none.
    """
    file = path / PREDICTOR_FILE
    if not file.is_file():
        raise UserError(f"{path} is not a predictor: it holds no {PREDICTOR_FILE}; make one with train-predictor")
    data = read_json(file)
    if not isinstance(data, Mapping) or data.get("format") != FORMAT or "name" not in data or "spec" not in data:
        raise UserError(f"{file} does not describe a predictor of format {FORMAT}")
    return str(data["name"]), MoESpec.from_json(data["spec"]), dict(data.get("settings", {}))


def load_predictor(path: Path) -> LoadPredictor:
    """Read a predictor's folder, whatever its method.

    Raises:
        UserError: there is none, or its method is unknown.
    """
    from moeless.predictors import PREDICTORS

    kind: type[LoadPredictor] = PREDICTORS.get(read_head(Path(path))[0])
    return kind.load(Path(path))


def _routing_of(spec: MoESpec) -> tuple[Any, ...]:
    """The properties of a model that its routing depends on."""
    return spec.name, spec.moe_layers, spec.num_experts, spec.top_k, spec.hidden_size


def share_of(load_E: NDArray[Any] | None, num_experts: int, what: str) -> FloatArray | None:
    """A load as shares ``[E]`` that sum to 1; None if there is no load or it is zero everywhere.

    Args:
        what: what the load is called in an error.

    Raises:
        UserError: the load has another length, a NaN or a negative entry.
    """
    if load_E is None:
        return None
    load = np.asarray(load_E, np.float64)
    if load.shape != (num_experts,):
        raise UserError(f"{what} must hold {num_experts} experts, got shape {load.shape}")
    if not np.isfinite(load).all() or (load < 0).any():
        raise UserError(f"{what} holds a negative value or one that is not finite")
    total = float(load.sum())
    return load / total if total > 0 else None


def proportional(weight_E: FloatArray, total: float) -> FloatArray:
    """Weights ``[E]`` scaled to sum to ``total``; equal ones if all are zero."""
    weight = np.maximum(weight_E, 0.0)
    mass = float(weight.sum())
    if mass <= 0:
        return np.full(len(weight), total / len(weight))
    return weight * (total / mass)


def _read_tensors(path: Path) -> dict[str, NDArray[Any]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        with reading(path):
            tensors: dict[str, NDArray[Any]] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); fit the predictor again") from None
    for name, array in tensors.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise UserError(f"{path}: tensor {name!r} holds a value that is not finite; fit the predictor again")
    return tensors

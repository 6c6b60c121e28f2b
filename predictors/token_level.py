"""The base of methods that forecast the experts of single tokens and add them up to a load.

Needs torch, NumPy and safetensors only: the live engine runs these on its hidden states.

Axes: T tokens, L MoE layers, D distances, E experts, K experts per token, H hidden size.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray

from moeless.contracts import Context, FloatArray, Forecast, IntArray, Phase
from moeless.errors import UserError
from moeless.predictors.base import LoadPredictor, proportional
from moeless.predictors.router import RouterRule
from moeless.predictors.variance import Variance
from moeless.spec import MoESpec

Pair = tuple[int, int]


class TokenLevel(LoadPredictor):
    """Scores every expert for every token of layer ``l`` and adds the tokens up.

    Attributes:
        counting: a token counts 1 for each of its K forecast experts (``topk``, as in the paper), or for each expert
            its probability.
        batch_context: whether a token's forecast depends on the iteration's other tokens.
        variance: calibrated coefficients per (layer, distance); Poisson where there are none.

    Args:
        rule: how scores become chosen experts.
        arrays: the fitted arrays as they are stored; computation uses them as float32 tensors (``_computed``).
        distances: the distances at which it forecasts; None for any.
    """

    counting: ClassVar[Literal["topk", "probability"]] = "topk"
    batch_context: ClassVar[bool] = False

    def __init__(
        self,
        spec: MoESpec,
        rule: RouterRule,
        arrays: Mapping[str, NDArray[Any]],
        distances: Sequence[int] | None = None,
        variance: Mapping[Pair, Variance] | None = None,
    ) -> None:
        super().__init__(spec)
        self.rule, self.variance = rule, dict(variance or {})
        self.distances = None if distances is None else tuple(distances)
        self._kept = dict(arrays)
        self._computed = {name: torch.from_numpy(array.astype(np.float32)) for name, array in self._kept.items()}
        self._device, self.token_part = torch.device("cpu"), self

    @abstractmethod
    def scores(self, input_TX: torch.Tensor, layer: int, distance: int) -> torch.Tensor:
        """Selection scores ``[T, E]`` of the target layer; ``input_TX`` is ``[T, H]`` f32 or ``[T, K]`` i64."""

    def covers(self, layer: int, distance: int) -> bool:
        """Whether the method can forecast ``layer + distance`` from ``layer``."""
        known = distance >= 0 if self.distances is None else distance in self.distances
        return layer >= 0 and known and layer + distance < self.spec.L

    def to(self, device: str | torch.device) -> Self:
        """Move the weights to the device of the gate inputs; methods that read expert ids stay on the CPU."""
        if self.reads == "router_inputs":
            self._device = torch.device(device)
            self._computed = {name: tensor.to(device) for name, tensor in self._computed.items()}
        return self

    def temperature(self, layer: int, distance: int) -> float:
        """What scores are divided by before a softmax turns them into probabilities."""
        return 1.0

    @torch.inference_mode()
    def probabilities(self, inputs: NDArray[Any] | torch.Tensor, layer: int, distance: int) -> torch.Tensor:
        """Expected assignments of each token, f32 ``[T, E]``; every row sums to K."""
        scores = self.scores(self.check_inputs(inputs, layer, distance), layer, distance)
        return torch.softmax(scores / self.temperature(layer, distance), -1) * self.spec.K

    @torch.inference_mode()
    def chosen(self, inputs: NDArray[Any] | torch.Tensor, layer: int, distance: int) -> torch.Tensor:
        """Forecast expert ids ``[T, K]``, as a tensor on the weights' device."""
        return self.rule.select(self.scores(self.check_inputs(inputs, layer, distance), layer, distance), self.spec.K)

    def predict_topk(self, inputs: NDArray[Any] | torch.Tensor, layer: int, distance: int) -> IntArray:
        """Forecast expert ids ``[T, K]``; see :class:`LoadPredictor`."""
        return np.asarray(self.chosen(inputs, layer, distance).numpy(force=True), np.int64)

    def token_loads(self, inputs: NDArray[Any] | torch.Tensor, layer: int, distance: int) -> NDArray[np.float32]:
        """What each token adds to the forecast, f32 ``[T, E]``; every row sums to K."""
        if self.counting == "probability":
            load_TE = self.probabilities(inputs, layer, distance)
        else:
            chosen = self.chosen(inputs, layer, distance)
            load_TE = torch.zeros(len(chosen), self.spec.E, device=chosen.device).scatter_(1, chosen, 1.0)
        return np.asarray(load_TE.numpy(force=True))

    def mean_load(self, inputs: NDArray[Any] | torch.Tensor, layer: int, distance: int) -> FloatArray:
        """Forecast load ``[E]`` of those tokens, which sums to ``T * K``."""
        if self.counting == "topk":
            chosen = self.chosen(inputs, layer, distance)
            return np.asarray(torch.bincount(chosen.flatten(), minlength=self.spec.E).numpy(force=True), np.float64)
        summed = self.probabilities(inputs, layer, distance).sum(0, dtype=torch.float64).numpy(force=True)
        return proportional(summed, len(inputs) * self.spec.K)

    def from_tokens(self, mean_E: FloatArray, context: Context, layer: int, distance: int) -> Forecast:
        """The forecast, given the sum over the tokens."""
        mean_E = proportional(mean_E, context.tokens * self.spec.K)
        variance_E = self.variance.get((layer, distance), Variance()).of(mean_E)
        return Forecast(mean_E, variance_E, context.tokens, self.name)

    def predict(self, context: Context, layer: int, distance: int) -> Forecast:
        """Forecast from the tokens, or from past loads without a source layer; see :class:`LoadPredictor`."""
        self._check_target(layer + distance)
        if layer < 0 or context.tokens == 0 or not self.covers(layer, distance):
            return self.fallback(context, layer + distance)
        # the inputs may be one rank's part of the tokens: the forecast is scaled to all of them
        mean_E = self.mean_load(self.inputs_of(context, self.name), layer, distance)
        return self.from_tokens(mean_E, context, layer, distance)

    def skill(self, layer: int, distance: int, phase: Phase, tokens: int) -> float | None:
        """One figure for all sizes and phases; see :meth:`LoadPredictor.skill`."""
        return self.variance.get((layer, distance), Variance()).skill

    def inputs_of(self, context: Context, asked: str) -> NDArray[Any]:
        """The gate inputs or expert ids that the method reads.

        Args:
            asked: name of the predictor in the error.

        Raises:
            UserError: the context does not hold them.
        """
        by_gates = self.reads == "router_inputs"
        inputs: NDArray[Any] | None = context.router_input_TH if by_gates else context.topk_TK
        if inputs is None:
            what = "gate inputs" if by_gates else "expert ids"
            raise UserError(f"predictor {asked!r} needs {what}, which this trace or engine has not")
        return inputs

    def check_inputs(self, inputs: NDArray[Any] | torch.Tensor, layer: int, distance: int) -> torch.Tensor:
        """The inputs as a tensor to compute with.

        Raises:
            UserError: nothing is fitted for the pair, or the inputs have another shape, type or range.
        """
        self._check_target(layer + distance)
        if layer < 0 or not self.covers(layer, distance):
            raise UserError(f"predictor {self.name!r} has nothing fitted from layer {layer} at distance {distance}")
        given = inputs if isinstance(inputs, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(_signed(inputs)))
        width = self.spec.hidden_size if self.reads == "router_inputs" else self.spec.K
        if given.ndim != 2 or given.shape[1] != width:
            raise UserError(f"predictor {self.name!r} needs inputs of shape [tokens, {width}], got {list(given.shape)}")
        if self.reads == "router_inputs":
            given = given.to(torch.float32)
            # tensors come from a running model: checking their values would wait for the GPU
            looked_at = not isinstance(inputs, torch.Tensor)
            # a sum is not finite where a value is not, and takes a fifth of the time of looking at each
            if looked_at and not torch.isfinite(given.sum()) and not torch.isfinite(given).all():
                raise UserError(f"the gate inputs of layer {layer} hold values that are not finite")
            return given.to(self._device)
        if given.is_floating_point():
            raise UserError(f"predictor {self.name!r} needs whole numbers as expert ids")
        given = given.to(self._device, torch.int64)
        if len(given) and (int(given.min()) < 0 or int(given.max()) >= self.spec.E):
            raise UserError(f"the expert ids of layer {layer} must lie in 0..{self.spec.E - 1}")
        return given

    def settings(self) -> dict[str, Any]:
        """The distances, if limited, and the variances as rows of layer, distance, scale, spread, skill."""
        known = {} if self.distances is None else {"distances": list(self.distances)}
        return known | {
            "variance": [[layer, d, v.scale, v.spread, v.skill] for (layer, d), v in sorted(self.variance.items())]
        }

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The fitted arrays."""
        return dict(self._kept)

    @staticmethod
    def variance_from(settings: Mapping[str, Any]) -> dict[Pair, Variance]:
        """The variances by (layer, distance) from :meth:`settings`."""
        return {
            (int(row[0]), int(row[1])): Variance(float(row[2]), float(row[3]), *row[4:5])
            for row in settings["variance"]
        }


class PairNetworks(TokenLevel):
    """The base of methods with a network for every (layer, distance), in arrays ``[L, D, ...]``.

    Attributes:
        dtypes: the names of the arrays and the types in which they are stored.
    """

    needs_fitting = True
    dtypes: ClassVar[Mapping[str, type[np.floating[Any]]]]

    def __init__(
        self,
        spec: MoESpec,
        arrays: Mapping[str, NDArray[Any]],
        distances: Sequence[int],
        variance: Mapping[Pair, Variance] | None = None,
    ) -> None:
        kept = {name: arrays[name].astype(dtype) for name, dtype in self.dtypes.items()}
        super().__init__(spec, RouterRule("softmax"), kept, distances, variance)
        self._column = {d: index for index, d in enumerate(distances)}

    def at(self, layer: int, distance: int) -> tuple[int, int]:
        """Index of a pair on the arrays' first two axes."""
        return layer, self._column[distance]

    @classmethod
    def from_state(cls, spec: MoESpec, settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Self:
        """See :class:`LoadPredictor`."""
        return cls(spec, tensors, settings["distances"], cls.variance_from(settings))


def _signed(inputs: NDArray[Any]) -> NDArray[Any]:
    """Unsigned ids as a type that torch computes with."""
    array = np.asarray(inputs)
    return array.astype(np.int64) if array.dtype.kind == "u" else array

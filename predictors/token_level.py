"""Methods that forecast each token's experts, and sum them up to a load.

Needs torch, NumPy and safetensors only: the live engine runs these on its hidden states.

Axes: T tokens, E experts, K experts per token, H hidden size.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from moeless.contracts import Context, FloatArray, Forecast, IntArray, Phase
from moeless.errors import UserError
from moeless.predictors.base import LoadPredictor, Reads
from moeless.predictors.router import RouterRule
from moeless.predictors.shares import proportional
from moeless.predictors.variance import Variance
from moeless.spec import MoESpec

#: How tokens are summed: each counts fully for the experts forecast (the paper), or by their probabilities.
Counting = Literal["topk", "probability"]


class TokenLevel(LoadPredictor):
    """Scores every expert for every token of layer ``l`` and counts.

    Attributes:
        counting: how tokens become a load.
        batch_context: whether a token's forecast depends on the iteration's other tokens.
        variance: calibrated coefficients per (layer, distance); Poisson where there are none.
    """

    counting: Counting = "topk"
    batch_context: bool = False

    def __init__(self, spec: MoESpec, rule: RouterRule, variance: Mapping[tuple[int, int], Variance]) -> None:
        super().__init__(spec)
        self.rule = rule
        self.variance = dict(variance)

    @abstractmethod
    def covers(self, layer: int, distance: int) -> bool:
        """Whether the method can forecast ``layer + distance`` from ``layer``."""

    @abstractmethod
    def scores(self, input_TX: torch.Tensor, layer: int, distance: int) -> torch.Tensor:
        """Selection scores ``[T, E]`` of the target layer; ``input_TX`` is ``[T, H]`` f32 or ``[T, K]`` i64."""

    def temperature(self, layer: int, distance: int) -> float:
        """What scores are divided by before a softmax turns them into probabilities."""
        return 1.0

    @torch.inference_mode()
    def probabilities(self, inputs: NDArray[Any] | torch.Tensor, layer: int, distance: int) -> torch.Tensor:
        """Expected assignments of each token, f32 ``[T, E]``; every row sums to K."""
        scores = self.scores(self.check_inputs(inputs, layer, distance), layer, distance)
        return torch.softmax(scores / self.temperature(layer, distance), -1) * self.spec.K

    @torch.inference_mode()
    def predict_topk(self, inputs: NDArray[Any] | torch.Tensor, layer: int, distance: int) -> IntArray:
        """Forecast expert ids ``[T, K]``; see :class:`LoadPredictor`."""
        chosen: IntArray = self._select(inputs, layer, distance).numpy(force=True).astype(np.int64)
        return chosen

    @torch.inference_mode()
    def token_loads(self, inputs: NDArray[Any] | torch.Tensor, layer: int, distance: int) -> NDArray[np.float32]:
        """What each token adds to the forecast, f32 ``[T, E]``; every row sums to K."""
        if self.counting == "probability":
            summed: NDArray[np.float32] = self.probabilities(inputs, layer, distance).numpy(force=True)
            return summed
        chosen = self._select(inputs, layer, distance)
        marked = torch.zeros(len(chosen), self.spec.E, device=chosen.device).scatter_(1, chosen, 1.0)
        counted: NDArray[np.float32] = marked.numpy(force=True)
        return counted

    @torch.inference_mode()
    def mean_load(self, inputs: NDArray[Any] | torch.Tensor, layer: int, distance: int) -> FloatArray:
        """Forecast load ``[E]`` of those tokens, which sums to ``T * K``."""
        if self.counting == "topk":
            chosen = self._select(inputs, layer, distance)
            counts: FloatArray = torch.bincount(chosen.flatten(), minlength=self.spec.E).numpy(force=True)
            return counts.astype(np.float64)
        summed = self.probabilities(inputs, layer, distance).sum(0, dtype=torch.float64).numpy(force=True)
        return proportional(summed, len(inputs) * self.spec.K)

    @property
    def token_part(self) -> TokenLevel:
        """Itself."""
        return self

    def from_tokens(self, mean_E: FloatArray, context: Context, layer: int, distance: int) -> Forecast:
        """The forecast, given the sum over the tokens."""
        mean_E = proportional(mean_E, context.tokens * self.spec.K)
        variance_E = self.variance.get((layer, distance), Variance()).of(mean_E)
        return Forecast(mean_E, variance_E, context.tokens, self.name)

    def predict(self, context: Context, layer: int, distance: int) -> Forecast:
        """Forecast from the tokens; from past loads where there is no source layer; see :class:`LoadPredictor`."""
        target = layer + distance
        self._check_target(target)
        inputs = self.inputs_of(context)
        if layer < 0 or context.tokens == 0 or not self.covers(layer, distance):
            return self.fallback(context, target)
        if inputs is None:
            raise missing_inputs(self.name, self.reads)
        # a rank that sees a part of the iteration's tokens speaks for all of them
        return self.from_tokens(self.mean_load(inputs, layer, distance), context, layer, distance)

    def skill(self, layer: int, distance: int, phase: Phase, tokens: int) -> float | None:
        """As calibrated, over sizes and phases; see :meth:`LoadPredictor.skill`."""
        del phase, tokens
        known = self.variance.get((layer, distance))
        return None if known is None else known.skill

    def inputs_of(self, context: Context) -> NDArray[Any] | None:
        """What the method reads of a context, None where it is not there."""
        return context.router_input_TH if self.reads == "router_inputs" else context.topk_TK

    def _select(self, inputs: NDArray[Any] | torch.Tensor, layer: int, distance: int) -> torch.Tensor:
        return self.rule.select(self.scores(self.check_inputs(inputs, layer, distance), layer, distance), self.spec.K)

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
            # a tensor is a running model's own: looking at its values would hold the host until a GPU has them
            looked_at = not isinstance(inputs, torch.Tensor)
            # a sum is not finite where a value is not, and takes a fifth of the time of looking at each
            if looked_at and not torch.isfinite(given.sum()) and not torch.isfinite(given).all():
                raise UserError(f"the gate inputs of layer {layer} hold values that are not finite")
            return given
        if given.is_floating_point():
            raise UserError(f"predictor {self.name!r} needs whole numbers as expert ids")
        given = given.to(torch.int64)
        if len(given) and (int(given.min()) < 0 or int(given.max()) >= self.spec.E):
            raise UserError(f"the expert ids of layer {layer} must lie in 0..{self.spec.E - 1}")
        return given

    def variance_json(self) -> list[list[float | None]]:
        """The variance coefficients as ``predictor.json`` keeps them."""
        return [[layer, d, v.scale, v.spread, v.skill] for (layer, d), v in sorted(self.variance.items())]

    @staticmethod
    def variance_from_json(rows: list[list[Any]]) -> dict[tuple[int, int], Variance]:
        """The coefficients back."""
        return {(int(row[0]), int(row[1])): Variance(float(row[2]), float(row[3]), *row[4:5]) for row in rows}


def missing_inputs(name: str, reads: Reads) -> UserError:
    """The error of a method whose inputs are not there."""
    return UserError(f"predictor {name!r} needs {_WHAT[reads]}, which this trace or engine has not")


_WHAT = {"router_inputs": "gate inputs", "topk": "expert ids", "nothing": "nothing"}


def _signed(inputs: NDArray[Any]) -> NDArray[Any]:
    """Unsigned ids as a type that torch computes with."""
    array = np.asarray(inputs)
    return array.astype(np.int64) if array.dtype.kind == "u" else array

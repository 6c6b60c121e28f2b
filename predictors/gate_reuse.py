"""The unchanged gate of layer l + d, applied to the inputs of layer l's gate (Mixtral-offloading, arXiv 2312.17238).

It works as far as residual connections keep gate inputs similar from layer to layer.

Axes: T tokens, L MoE layers, E experts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from moeless.errors import UserError
from moeless.predictors.fitting import FitInput, calibrated
from moeless.predictors.gates import Gates
from moeless.predictors.router import RouterRule
from moeless.predictors.token_level import Pair, TokenLevel
from moeless.predictors.variance import Variance
from moeless.spec import MoESpec

#: A model's own gates reproduce its routing up to rounding of what they see; another checkpoint's do not.
EXPLAINED = 0.97
CHECK_TOKENS = 512


class GateReuse(TokenLevel):
    """The model's own gates, at any distance; weights are kept in 16 bits, as in served models.

    Args:
        arrays: fitted arrays besides the gates.

    Raises:
        UserError: the gates have not the model's shape.
    """

    name = "gate_reuse"
    reads = "router_inputs"
    needs_gates = True

    def __init__(
        self,
        spec: MoESpec,
        gates: Gates,
        variance: Mapping[Pair, Variance] | None = None,
        *,
        arrays: Mapping[str, NDArray[Any]] | None = None,
        distances: Sequence[int] | None = None,
    ) -> None:
        gates.check(spec)
        super().__init__(spec, gates.rule, {**gates.arrays(), **(arrays or {})}, distances, variance)
        self.source = gates.source

    @classmethod
    def fit(cls, given: FitInput) -> Self:
        """Take the gates as they are; calibrate variances on validation requests."""
        if given.options:
            raise UserError(f"predictor {cls.name!r} has no parameters")
        return calibrated(cls(given.rows.spec, checked_gates(given, cls.name)), given)

    def scores(self, input_TX: torch.Tensor, layer: int, distance: int) -> torch.Tensor:
        """See :class:`TokenLevel`; at distance 0 these are the scores of the layer's own router."""
        target, bias_LE = layer + distance, self._computed.get("bias")
        return self._score(
            input_TX, self._computed["gate"][target], None if bias_LE is None else bias_LE[target], target
        )

    def _score(
        self, input_TH: torch.Tensor, weight_EH: torch.Tensor, bias_E: torch.Tensor | None, target: int
    ) -> torch.Tensor:
        correction_LE = self._computed.get("correction")
        logits = torch.nn.functional.linear(input_TH, weight_EH, bias_E)
        return self.rule.scores(logits, None if correction_LE is None else correction_LE[target])

    def settings(self) -> dict[str, Any]:
        """The router's rule, the gates' source and the variance."""
        return {"rule": asdict(self.rule), "source": self.source, "variance": super().settings()["variance"]}

    @classmethod
    def from_state(cls, spec: MoESpec, settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Self:
        """See :class:`LoadPredictor`."""
        return cls(spec, gates_from(settings, tensors), cls.variance_from(settings))


def gates_from(settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Gates:
    """The gates from a predictor's folder."""
    gate_LEH, rule = tensors["gate"].astype(np.float32), RouterRule(**settings["rule"])
    return Gates(gate_LEH, tensors.get("bias"), tensors.get("correction"), rule, str(settings["source"]))


def checked_gates(given: FitInput, name: str) -> Gates:
    """The gates that a fit starts from, after a check that they are the trace's.

    Raises:
        UserError: there are none, or they do not reproduce the trace's routing.
    """
    rows = given.rows
    if given.gates is None:
        raise UserError(f"predictor {name!r} starts from the model's gates; name the model with --model")
    raw = GateReuse(rows.spec, given.gates)
    row_T = rows.of(given.split.fit)[:CHECK_TOKENS]
    input_TLH = rows.inputs(row_T)
    found = [
        float(rows.found(raw.predict_topk(input_TLH[:, layer], layer, 0), row_T, layer).mean())
        for layer in range(rows.spec.L)
    ]
    if min(found) < EXPLAINED:
        raise UserError(
            f"the gates of {given.gates.source} are not those that made {rows.trace.path}: at layer "
            f"{int(np.argmin(found))} they explain {100 * min(found):.0f} % of its routing; name its model, or record "
            "the trace again"
        )
    return given.gates

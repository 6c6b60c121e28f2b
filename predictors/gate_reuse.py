"""The raw gate of layer l + d applied to what layer l's gate sees (Mixtral-offloading, arXiv 2312.17238).

Works as far as residual connections keep gate inputs similar from layer to layer.

Axes: T tokens, L MoE layers, E experts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from moeless.predictors.base import not_fitted
from moeless.predictors.gates import Gates
from moeless.predictors.router import RouterRule
from moeless.predictors.token_level import TokenLevel
from moeless.predictors.variance import Variance
from moeless.spec import MoESpec

if TYPE_CHECKING:
    from moeless.predictors.fitting import FitInput


class GateReuse(TokenLevel):
    """The model's own gates, any distance; held in 16 bits as served models hold them.

    Raises:
        UserError: no gates are given, or they are another model's.
    """

    name = "gate_reuse"
    reads = "router_inputs"
    needs_gates = True

    def __init__(
        self,
        spec: MoESpec,
        gates: Gates | None = None,
        variance: Mapping[tuple[int, int], Variance] | None = None,
    ) -> None:
        if gates is None:
            raise not_fitted(self.name)
        gates.check(spec)
        super().__init__(spec, gates.rule, variance or {})
        self.source = gates.source
        self._gate_LEH = gates.weight_LEH.astype(np.float16)
        self._bias_LE = gates.bias_LE
        self._correction_LE = gates.correction_LE
        self.gate_LEH = torch.from_numpy(self._gate_LEH.astype(np.float32))
        self.bias_LE = None if gates.bias_LE is None else torch.from_numpy(gates.bias_LE)
        self.correction_LE = None if gates.correction_LE is None else torch.from_numpy(gates.correction_LE)

    @classmethod
    def fit(cls, given: FitInput) -> GateReuse:
        """Fit on a trace; see :func:`moeless.predictors.fit_gates.fit_gate_reuse`."""
        from moeless.predictors.fit_gates import fit_gate_reuse

        return fit_gate_reuse(given)

    def to(self, device: str | torch.device) -> Self:
        """Gates on a device."""
        self.gate_LEH = self.gate_LEH.to(device)
        self.bias_LE = None if self.bias_LE is None else self.bias_LE.to(device)
        self.correction_LE = None if self.correction_LE is None else self.correction_LE.to(device)
        return self

    def covers(self, layer: int, distance: int) -> bool:
        """Any pair of layers of the model; at distance 0 it is the layer's own router."""
        return layer >= 0 and distance >= 0 and layer + distance < self.spec.L

    def scores(self, input_TX: torch.Tensor, layer: int, distance: int) -> torch.Tensor:
        """The target gate's selection scores."""
        return self._score(input_TX, self.gate_LEH[layer + distance], self._bias(layer, distance), layer + distance)

    def _bias(self, layer: int, distance: int) -> torch.Tensor | None:
        return None if self.bias_LE is None else self.bias_LE[layer + distance]

    def _score(
        self, input_TH: torch.Tensor, weight_EH: torch.Tensor, bias_E: torch.Tensor | None, target: int
    ) -> torch.Tensor:
        device = input_TH.device
        logits = torch.nn.functional.linear(
            input_TH, weight_EH.to(device), None if bias_E is None else bias_E.to(device)
        )
        correction_E = None if self.correction_LE is None else self.correction_LE[target].to(device)
        return self.rule.scores(logits, correction_E)

    def settings(self) -> dict[str, Any]:
        """The router's rule and the variance."""
        return {"rule": self.rule.to_json(), "source": self.source, "variance": self.variance_json()}

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The gates."""
        arrays: dict[str, NDArray[Any]] = {"gate": self._gate_LEH}
        if self._bias_LE is not None:
            arrays["bias"] = self._bias_LE
        if self._correction_LE is not None:
            arrays["correction"] = self._correction_LE
        return arrays

    @classmethod
    def from_state(cls, spec: MoESpec, settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Self:
        """Rebuild."""
        return cls(spec, _gates(settings, tensors), cls.variance_from_json(settings["variance"]))


def _gates(settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Gates:
    return Gates(
        tensors["gate"].astype(np.float32),
        tensors.get("bias"),
        tensors.get("correction"),
        RouterRule.from_json(settings["rule"]),
        str(settings["source"]),
    )

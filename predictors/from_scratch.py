"""Networks trained from scratch, one per (layer, distance), as ProMoE has them (arXiv 2410.22134).

The paper's Table 2 fixes their size: H × 512 × E in 16 bits gives its ProMoE column. They see the same gate inputs as
the fine-tuned gates, on the same tokens, and know nothing of the model's gates.

Axes: L MoE layers, D distances, E experts, H hidden size, F hidden units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from moeless.predictors.base import not_fitted
from moeless.predictors.router import RouterRule
from moeless.predictors.token_level import TokenLevel
from moeless.predictors.variance import Variance
from moeless.spec import MoESpec

if TYPE_CHECKING:
    from moeless.predictors.fitting import FitInput

#: Hidden units that give the paper's memory.
TABLE_2_HIDDEN = 512
NAMES = ("first", "first_bias", "second", "second_bias")


class FromScratch(TokenLevel):
    """Two-layer networks.

    Args:
        state: ``first [L, D, F, H]``, ``first_bias [L, D, F]``, ``second [L, D, E, F]``, ``second_bias [L, D, E]``.
        temperature_LD: what scores are divided by before a softmax.
    """

    name = "from_scratch"
    needs_fitting = True
    reads = "router_inputs"

    def __init__(
        self,
        spec: MoESpec,
        state: Mapping[str, NDArray[Any]] | None = None,
        distances: Sequence[int] = (),
        temperature_LD: NDArray[Any] | None = None,
        variance: Mapping[tuple[int, int], Variance] | None = None,
    ) -> None:
        if state is None or temperature_LD is None:
            raise not_fitted(self.name)
        super().__init__(spec, RouterRule("softmax"), variance or {})
        self.distances = tuple(distances)
        self._column = {d: index for index, d in enumerate(self.distances)}
        self._state = {name: state[name].astype(np.float16) for name in NAMES}
        self._temperature_LD = temperature_LD.astype(np.float32)
        self._tensor = {name: torch.from_numpy(array.astype(np.float32)) for name, array in self._state.items()}

    @classmethod
    def fit(cls, given: FitInput) -> FromScratch:
        """Fit on a trace; see :func:`moeless.predictors.fit_scratch.fit_from_scratch`."""
        from moeless.predictors.fit_scratch import fit_from_scratch

        return fit_from_scratch(given)

    def to(self, device: str | torch.device) -> Self:
        """Networks on a device."""
        self._tensor = {name: tensor.to(device) for name, tensor in self._tensor.items()}
        return self

    def covers(self, layer: int, distance: int) -> bool:
        """Fitted pairs."""
        return layer >= 0 and distance in self._column and layer + distance < self.spec.L

    def scores(self, input_TX: torch.Tensor, layer: int, distance: int) -> torch.Tensor:
        """Logits ``[T, E]``."""
        at = layer, self._column[distance]
        first, first_bias, second, second_bias = (self._tensor[name][at].to(input_TX.device) for name in NAMES)
        inner = torch.nn.functional.linear(input_TX, first, first_bias).relu()
        return torch.nn.functional.linear(inner, second, second_bias)

    def temperature(self, layer: int, distance: int) -> float:
        """Fitted with the network."""
        return float(self._temperature_LD[layer, self._column[distance]])

    @property
    def memory_bytes(self) -> int:
        """Bytes of the pairs that exist: the arrays have a row for every layer, also the last ones that reach none."""
        pairs = sum(self.spec.L - d for d in self.distances)
        return sum(int(array[0, 0].nbytes) for array in self._state.values()) * pairs

    @property
    def num_parameters(self) -> int:
        """Numbers of the pairs that exist."""
        pairs = sum(self.spec.L - d for d in self.distances)
        return sum(int(array[0, 0].size) for array in self._state.values()) * pairs

    def settings(self) -> dict[str, Any]:
        """Distances and variances."""
        return {"distances": list(self.distances), "variance": self.variance_json()}

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The networks."""
        return {**self._state, "temperature": self._temperature_LD}

    @classmethod
    def from_state(cls, spec: MoESpec, settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Self:
        """Rebuild."""
        return cls(
            spec,
            {name: tensors[name] for name in NAMES},
            settings["distances"],
            tensors["temperature"],
            cls.variance_from_json(settings["variance"]),
        )

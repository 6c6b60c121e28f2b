"""The paper's predictor: copies of gates, fine-tuned where the raw gate is not accurate enough (arXiv 2603.06350).

Axes: L MoE layers, E experts, H hidden size, D distances.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from moeless.predictors.gate_reuse import GateReuse, _gates
from moeless.predictors.gates import Gates
from moeless.predictors.variance import Variance
from moeless.spec import MoESpec

if TYPE_CHECKING:
    from moeless.predictors.fitting import FitInput

Pair = tuple[int, int]


class LayerAware(GateReuse):
    """One linear layer per (layer, distance): the target's gate, or its fine-tuned copy.

    Args:
        tuned: weight ``[E, H]``, bias ``[E]`` and temperature of each fine-tuned (layer, distance).
        distances: the distances that were profiled; others fall back to history.
        accuracy: profiled top-k recall of each (layer, distance), raw and as kept.
    """

    name = "layer_aware"
    needs_fitting = True

    def __init__(
        self,
        spec: MoESpec,
        gates: Gates | None = None,
        variance: Mapping[Pair, Variance] | None = None,
        *,
        tuned: Mapping[Pair, tuple[NDArray[np.float32], NDArray[np.float32], float]] | None = None,
        distances: Sequence[int] = (),
        accuracy: Mapping[Pair, tuple[float, float]] | None = None,
        threshold: float = 0.8,
    ) -> None:
        super().__init__(spec, gates, variance)
        self.distances = tuple(distances)
        self.accuracy = dict(accuracy or {})
        self.threshold = threshold
        self._tuned = {
            pair: (weight.astype(np.float16), bias.astype(np.float32), float(temperature))
            for pair, (weight, bias, temperature) in (tuned or {}).items()
        }
        self._heads = {
            pair: (torch.from_numpy(weight.astype(np.float32)), torch.from_numpy(bias))
            for pair, (weight, bias, _) in self._tuned.items()
        }

    @classmethod
    def fit(cls, given: FitInput) -> LayerAware:
        """Fit on a trace; see :func:`moeless.predictors.fit_gates.fit_layer_aware`."""
        from moeless.predictors.fit_gates import fit_layer_aware

        return fit_layer_aware(given)

    def to(self, device: str | torch.device) -> Self:
        """Gates and their copies on a device."""
        self._heads = {pair: (weight.to(device), bias.to(device)) for pair, (weight, bias) in self._heads.items()}
        return super().to(device)

    @property
    def tuned_pairs(self) -> list[Pair]:
        """The (layer, distance) whose gate was fine-tuned."""
        return sorted(self._tuned)

    def covers(self, layer: int, distance: int) -> bool:
        """Pairs that were profiled."""
        return distance in self.distances and super().covers(layer, distance)

    def scores(self, input_TX: torch.Tensor, layer: int, distance: int) -> torch.Tensor:
        """Selection scores of the fine-tuned copy, or of the raw gate."""
        if (layer, distance) not in self._heads:
            return super().scores(input_TX, layer, distance)
        weight_EH, bias_E = self._heads[layer, distance]
        return self._score(input_TX, weight_EH, bias_E, layer + distance)

    def temperature(self, layer: int, distance: int) -> float:
        """Fitted with the copy."""
        return self._tuned[layer, distance][2] if (layer, distance) in self._tuned else 1.0

    def settings(self) -> dict[str, Any]:
        """The rule, what was profiled, and which pairs were fine-tuned."""
        return super().settings() | {
            "distances": list(self.distances),
            "threshold": self.threshold,
            "accuracy": [[layer, d, raw, kept] for (layer, d), (raw, kept) in sorted(self.accuracy.items())],
            "tuned": [[layer, d, self._tuned[layer, d][2]] for layer, d in self.tuned_pairs],
        }

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The raw gates, which untuned pairs share, and the copies."""
        arrays = super().tensors()
        if self._tuned:
            arrays["tuned_weight"] = np.stack([self._tuned[pair][0] for pair in self.tuned_pairs])
            arrays["tuned_bias"] = np.stack([self._tuned[pair][1] for pair in self.tuned_pairs])
        return arrays

    @classmethod
    def from_state(cls, spec: MoESpec, settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Self:
        """Rebuild."""
        tuned = {
            (int(layer), int(d)): (
                tensors["tuned_weight"][index].astype(np.float32),
                tensors["tuned_bias"][index],
                float(temperature),
            )
            for index, (layer, d, temperature) in enumerate(settings["tuned"])
        }
        return cls(
            spec,
            _gates(settings, tensors),
            cls.variance_from_json(settings["variance"]),
            tuned=tuned,
            distances=settings["distances"],
            accuracy={(int(row[0]), int(row[1])): (float(row[2]), float(row[3])) for row in settings["accuracy"]},
            threshold=float(settings["threshold"]),
        )

"""The paper's predictor: copies of gates, fine-tuned where a gate alone is not accurate enough (arXiv 2603.06350).

Axes: L MoE layers, E experts, H hidden size, D distances.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from moeless.predictors.fitting import FitInput, calibrated, number, parsed
from moeless.predictors.gate_reuse import GateReuse, checked_gates, gates_from
from moeless.predictors.gates import Gates
from moeless.predictors.gradient_fit import HeadFit, TrainOptions
from moeless.predictors.token_level import Pair
from moeless.predictors.variance import Variance
from moeless.spec import MoESpec


@dataclass(frozen=True)
class LayerAwareOptions(TrainOptions):
    """Parameters; the paper states only ``threshold``. Gates converge within a few epochs.

    Attributes:
        threshold: h; a (layer, distance) with less top-k recall is fine-tuned. Recall is the share of the experts
            chosen by a token that were forecast.
        learning_rate: of AdamW; 5e-3 reaches in 6 epochs what 2e-3 reaches in 10 on the bundled model.
    """

    threshold: float = number(0.8, 0, 1)
    learning_rate: float = number(5e-3, 1e-9, 1)
    epochs: int = number(8, 1)


class LayerAware(GateReuse):
    """One linear layer per (layer, distance): the target's gate, or its fine-tuned copy.

    Args:
        tuned: weight ``[E, H]``, bias ``[E]`` and temperature of each fine-tuned (layer, distance).
        distances: the distances that were fitted; others are forecast from history.
        accuracy: top-k recall of each (layer, distance) on the validation sample, with the gate and as kept.
    """

    name = "layer_aware"
    needs_fitting = True

    def __init__(
        self,
        spec: MoESpec,
        gates: Gates,
        variance: Mapping[Pair, Variance] | None = None,
        *,
        tuned: Mapping[Pair, tuple[NDArray[Any], NDArray[Any], float]],
        distances: Sequence[int],
        accuracy: Mapping[Pair, tuple[float, float]],
        threshold: float,
    ) -> None:
        self.tuned_pairs = sorted(tuned)
        arrays: dict[str, NDArray[Any]] = {}
        if tuned:
            arrays["tuned_weight"] = np.stack([tuned[pair][0].astype(np.float16) for pair in self.tuned_pairs])
            arrays["tuned_bias"] = np.stack([tuned[pair][1].astype(np.float32) for pair in self.tuned_pairs])
        super().__init__(spec, gates, variance, arrays=arrays, distances=distances)
        self.accuracy, self.threshold = dict(accuracy), threshold
        self._tuned = {pair: (at, tuned[pair][2]) for at, pair in enumerate(self.tuned_pairs)}

    @classmethod
    def fit(cls, given: FitInput) -> Self:
        """Measure the gates' recall for every pair; fine-tune copies of those that miss the threshold."""
        options = parsed(LayerAwareOptions, given.options)
        gates, spec, distances = checked_gates(given, cls.name), given.rows.spec, given.distances
        bias_LE = np.zeros((spec.L, spec.E), np.float32) if gates.bias_LE is None else gates.bias_LE
        target_LD = np.minimum(np.arange(spec.L)[:, None] + distances, spec.L - 1)
        fitted = HeadFit(
            given,
            cls.name,
            {"weight": torch.from_numpy(gates.weight_LEH[target_LD]), "bias": torch.from_numpy(bias_LE[target_LD])},
            linear_logits,
            options,
            rule=gates.rule,
            correction_LE=gates.correction_LE,
            # logits come out of training at their own scale; scores within 0..1 need a small temperature
            temperature=1.0 if gates.rule.uses_logits(gates.correction_LE is not None) else 0.1,
        ).run(given.sample(cls.reads), given.sample(cls.reads, validation=True), below=options.threshold)
        raw_LD, kept_LD = fitted.start_LD.numpy(force=True), fitted.best_LD.numpy(force=True)
        tuned, accuracy = {}, {}
        for index, distance in enumerate(distances):
            for layer in range(spec.L - distance):
                at, raw, kept = (layer, index), float(raw_LD[layer, index]), float(kept_LD[layer, index])
                accuracy[layer, distance] = raw, kept
                if raw < options.threshold and kept > raw:
                    weight, bias = fitted.best["weight"][at].numpy(), fitted.best["bias"][at].numpy()
                    tuned[layer, distance] = weight, bias, float(fitted.temperature_LD[at])
        made = cls(spec, gates, tuned=tuned, distances=distances, accuracy=accuracy, threshold=options.threshold)
        return calibrated(made, given)

    def scores(self, input_TX: torch.Tensor, layer: int, distance: int) -> torch.Tensor:
        """See :class:`TokenLevel`; from the fine-tuned copy, or else the gate."""
        if (layer, distance) not in self._tuned:
            return super().scores(input_TX, layer, distance)
        at = self._tuned[layer, distance][0]
        weight_EH, bias_E = self._computed["tuned_weight"][at], self._computed["tuned_bias"][at]
        return self._score(input_TX, weight_EH, bias_E, layer + distance)

    def temperature(self, layer: int, distance: int) -> float:
        """See :class:`TokenLevel`; fitted with the copy, 1 for a gate."""
        return self._tuned[layer, distance][1] if (layer, distance) in self._tuned else 1.0

    def settings(self) -> dict[str, Any]:
        """As the base class, with each pair's recall and the temperatures of the fine-tuned pairs."""
        return super().settings() | {
            "distances": list(self.distances or ()),
            "threshold": self.threshold,
            "accuracy": [[layer, d, raw, kept] for (layer, d), (raw, kept) in sorted(self.accuracy.items())],
            "tuned": [[layer, d, temperature] for (layer, d), (_, temperature) in self._tuned.items()],
        }

    @classmethod
    def from_state(cls, spec: MoESpec, settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Self:
        """See :class:`LoadPredictor`."""
        return cls(
            spec,
            gates_from(settings, tensors),
            cls.variance_from(settings),
            tuned={
                (int(layer), int(d)): (tensors["tuned_weight"][at], tensors["tuned_bias"][at], float(temperature))
                for at, (layer, d, temperature) in enumerate(settings["tuned"])
            },
            distances=settings["distances"],
            accuracy={(int(row[0]), int(row[1])): (float(row[2]), float(row[3])) for row in settings["accuracy"]},
            threshold=float(settings["threshold"]),
        )


def linear_logits(parameters: Mapping[str, torch.Tensor], input_LTH: torch.Tensor) -> torch.Tensor:
    """Logits ``[L, D, T, E]`` of inputs ``[L, T, H]``, one linear layer for each pair."""
    weight_LDEH, bias_LDE = parameters["weight"], parameters["bias"]
    logits = torch.baddbmm(bias_LDE.flatten(1).unsqueeze(1), input_LTH, weight_LDEH.flatten(1, 2).transpose(1, 2))
    return logits.unflatten(-1, weight_LDEH.shape[1:3]).permute(0, 2, 1, 3)

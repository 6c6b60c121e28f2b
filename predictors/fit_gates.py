"""Fitting the methods that start from the model's gates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from moeless.errors import UserError
from moeless.predictors.fitting import FitInput, calibrate, pairs_of
from moeless.predictors.gate_reuse import GateReuse
from moeless.predictors.gates import Gates
from moeless.predictors.layer_aware import LayerAware
from moeless.predictors.training import LinearHeads, Problem, TrainSettings, fit_heads, recall_of

#: A model's own gates reproduce its routing up to rounding of what they see; another checkpoint's do not.
EXPLAINED = 0.97
CHECK_TOKENS = 512


@dataclass(frozen=True)
class LayerAwareOptions:
    """Parameters of the paper's predictor; the paper states ``threshold`` alone.

    Attributes:
        threshold: h, the top-k recall below which a (layer, distance) is fine-tuned. Recall is the share of a token's
            chosen experts that are forecast, which is what a load forecast counts.
        learning_rate: Adam's; 5e-3 reaches in 6 epochs what 2e-3 reaches in 10 on the bundled model.
        epochs, patience: early stop by validation recall; gates converge within a few passes.
    """

    threshold: float = 0.8
    learning_rate: float = 5e-3
    epochs: int = 8
    patience: int = 2
    batch_tokens: int = 1024

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise UserError(f"the threshold h is a share of experts found, between 0 and 1, not {self.threshold}")


@dataclass(frozen=True)
class NoOptions:
    """The method has no parameters."""


def fit_gate_reuse(given: FitInput) -> GateReuse:
    """The raw gates, with variances calibrated on validation requests."""
    given.options(NoOptions)
    gates = _gates(given, "gate_reuse")
    spec = given.rows.spec
    raw = GateReuse(spec, gates)
    return GateReuse(spec, gates, calibrate(raw, given, pairs_of(spec.L, given.settings.distances)))


def fit_layer_aware(given: FitInput) -> LayerAware:
    """Profile every pair with the raw gate; fine-tune copies of the gates that miss the threshold."""
    options: LayerAwareOptions = given.options(LayerAwareOptions)
    gates = _gates(given, "layer_aware")
    rows, settings = given.rows, given.settings
    spec, distances = rows.spec, settings.distances
    layers = spec.L
    problem = Problem(
        distances,
        layers,
        spec.K,
        gates.rule,
        None if gates.correction_LE is None else torch.from_numpy(gates.correction_LE),
        torch.device(settings.device),
    )
    target_LD = problem.target_LD.cpu()
    weight_LDEH = torch.from_numpy(gates.weight_LEH)[target_LD]
    bias = np.zeros((layers, spec.E), np.float32) if gates.bias_LE is None else gates.bias_LE
    sample, validation = given.sample("router_inputs"), given.sample("router_inputs", validation=True)
    heads = LinearHeads(weight_LDEH, torch.from_numpy(bias)[target_LD])
    monotone = gates.rule.uses_logits(gates.correction_LE is not None)
    raw_LD = recall_of(heads, problem, validation, options.batch_tokens)
    weak_LD = torch.from_numpy(raw_LD < options.threshold)
    fitted = fit_heads(
        heads,
        problem,
        sample,
        validation,
        TrainSettings(options.epochs, options.patience, options.learning_rate, options.batch_tokens),
        seed=settings.seed,
        checkpoint=given.checkpoint("layer_aware"),
        # logits come out of training at their own scale; scores within 0..1 need a small temperature
        temperature=1.0 if monotone else 0.1,
        wanted_LD=weak_LD,
        on_epoch=lambda epoch, values: given.report("layer_aware", epoch, values),
    )
    tuned = {}
    accuracy = {}
    for index, distance in enumerate(distances):
        for layer in range(layers - distance):
            kept = float(fitted.recall_LD[layer, index])
            accuracy[layer, distance] = (float(raw_LD[layer, index]), kept)
            if weak_LD[layer, index] and kept > raw_LD[layer, index]:
                tuned[layer, distance] = (
                    fitted.state["weight"][layer, index].numpy(),
                    fitted.state["bias"][layer, index].numpy(),
                    float(fitted.temperature_LD[layer, index]),
                )
    made = LayerAware(spec, gates, tuned=tuned, distances=distances, accuracy=accuracy, threshold=options.threshold)
    made.variance = calibrate(made, given, pairs_of(layers, distances))
    return made


def _gates(given: FitInput, name: str) -> Gates:
    if given.gates is None:
        raise UserError(f"predictor {name!r} starts from the model's gates; name the model with --model")
    given.gates.check(given.rows.spec)
    raw = GateReuse(given.rows.spec, given.gates)
    row_T = given.rows.of(given.split.fit)[:CHECK_TOKENS]
    input_TLH = given.rows.inputs(row_T)
    found = []
    for layer in range(given.rows.spec.L):
        chosen_TK = raw.predict_topk(input_TLH[:, layer], layer, 0)
        true_TK = given.rows.topk_TLK[row_T, layer].astype(np.int64)
        found.append(float((true_TK[:, :, None] == chosen_TK[:, None, :]).any(2).mean()))
    if min(found) < EXPLAINED:
        raise UserError(
            f"the gates of {given.gates.source} are not those that made {given.rows.trace.path}: at layer "
            f"{int(np.argmin(found))} they explain {100 * min(found):.0f} % of its routing; name its model, or record "
            "the trace again"
        )
    return given.gates

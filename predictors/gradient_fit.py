"""Gradient descent for the networks ("heads") of all (layer, distance) pairs at once, over streamed tokens.

All layers are one batched matrix product, so they train in parallel on any device. Each pair keeps the parameters of
its own best epoch, by top-k recall on the validation sample. An interrupted fit resumes from its checkpoint and ends in
the same bytes.

Axes: L MoE layers, D distances, T tokens, E experts, K experts per token, X input width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from moeless.predictors.fitting import FitInput, number
from moeless.predictors.router import RouterRule
from moeless.predictors.trace_rows import Block, Sample

#: Logits ``[L, D, T, E]`` from parameters by name and inputs ``[L, T, X]``.
Logits = Callable[[Mapping[str, torch.Tensor], torch.Tensor], torch.Tensor]
TEMPERATURE = "log_temperature"


@dataclass(frozen=True)
class TrainOptions:
    """Parameters of gradient descent; methods add their own and set their own defaults.

    Attributes:
        epochs: passes over the training sample at most.
        patience: fitting stops after this many epochs in which no pair's validation recall improved.
        learning_rate: the peak rate of AdamW; it falls to a tenth along a cosine.
        batch_tokens: tokens of one optimiser step.
    """

    epochs: int = number(10, 1)
    patience: int = number(2, 1)
    learning_rate: float = number(2e-3, 1e-9, 1)
    batch_tokens: int = number(1024, 1)


class HeadFit:
    """One fit of all pairs; deterministic for a seed on one machine.

    The loss is the cross-entropy between the softmax of the router's selection scores, divided by a fitted temperature,
    and the chosen experts at weight 1/K each. It is least where K times the softmax is the expected assignment, so that
    sums over tokens are unbiased loads.

    Args:
        stage: name of the fit in progress reports and in the checkpoint.
        parameters: initial parameters by name; their first axes are (L, D).
        logits: computes logits ``[L, D, T, E]`` from parameters and inputs ``[L, T, X]``.
        distances: the axis D; those of ``given`` by default.
        rule, correction_LE: the router whose choices are learnt.
        weight_decay: of AdamW; 0 keeps fine-tuned gates near their start.
        temperature: initial temperature; None for scores without one.

    Attributes:
        start_LD, best_LD: top-k recall on the validation sample before the first and after the best epoch; NaN where
            ``l + d >= L``.
    """

    def __init__(
        self,
        given: FitInput,
        stage: str,
        parameters: Mapping[str, torch.Tensor],
        logits: Logits,
        options: TrainOptions,
        *,
        distances: tuple[int, ...] | None = None,
        rule: RouterRule | None = None,
        correction_LE: NDArray[np.float32] | None = None,
        weight_decay: float = 0.0,
        temperature: float | None = 1.0,
    ) -> None:
        self._given, self._stage, self._logits, self._options = given, stage, logits, options
        self._rule, self._top_k = rule or RouterRule(), given.rows.spec.K
        self._device, layers = torch.device(given.device), given.rows.spec.L
        target_LD = torch.arange(layers).unsqueeze(1) + torch.tensor(distances or given.distances)
        self._valid_LD = (target_LD < layers).to(self._device)
        self._target_LD = target_LD.clamp(max=layers - 1).to(self._device)
        self._correction = None
        if correction_LE is not None:
            self._correction = torch.from_numpy(correction_LE).to(self._device)[self._target_LD].unsqueeze(2)
        start = {**parameters, TEMPERATURE: torch.full(self._valid_LD.shape, float(np.log(temperature or 1.0)))}
        self._values = {name: torch.nn.Parameter(value.clone().to(self._device)) for name, value in start.items()}
        self._values[TEMPERATURE].requires_grad_(temperature is not None)
        self._optimiser = torch.optim.AdamW(
            [
                {"params": [self._values[name] for name in parameters], "weight_decay": weight_decay, "peak": 1.0},
                {"params": [self._values[TEMPERATURE]], "weight_decay": 0.0, "peak": 10.0},
            ],
            lr=options.learning_rate,
        )
        self._rng = np.random.default_rng(given.seed)
        self._epoch, self._step, self._since_better = 0, 0, 0
        self._best = {name: value.detach().clone() for name, value in self._values.items()}
        self.start_LD = self.best_LD = torch.empty(0)

    @property
    def best(self) -> dict[str, torch.Tensor]:
        """Each pair's parameters of its best epoch, on the CPU."""
        return {name: value.cpu() for name, value in self._best.items()}

    @property
    def temperature_LD(self) -> torch.Tensor:
        """Each pair's temperature, which scores are divided by before a softmax, on the CPU."""
        return torch.exp(self._best[TEMPERATURE]).cpu()

    def run(self, sample: Sample, validation: Sample, below: float = math.inf) -> Self:
        """Fit the pairs whose initial recall is under ``below``; the others keep their initial parameters."""
        options, optimiser = self._options, self._optimiser
        if not self.resume():
            self.start_LD = self.best_LD = self._recall(validation)
        wanted_LD = self._valid_LD & (self.start_LD < below)
        steps = options.epochs * -(-sample.tokens // options.batch_tokens)
        while bool(wanted_LD.any()) and self._epoch < options.epochs and self._since_better < options.patience:
            total_LD, count = torch.zeros_like(self._values[TEMPERATURE]), 0
            for block in sample.blocks(self._rng, options.batch_tokens):
                loss_LD = self._loss(block)
                # a sum, so that each pair's step does not depend on how many others there are
                loss = torch.where(wanted_LD, loss_LD, 0.0).sum()
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                for group in optimiser.param_groups:
                    group["lr"] = group["peak"] * options.learning_rate * _cosine(self._step / max(1, steps))
                optimiser.step()
                self._step, total_LD, count = self._step + 1, total_LD + loss_LD.detach(), count + 1
            recall_LD = self._recall(validation)
            self.end_epoch(wanted_LD & (recall_LD > self.best_LD), recall_LD)
            curves = _curves({"loss": total_LD / max(1, count), "validation_recall": recall_LD}, wanted_LD)
            self._given.report(self._stage, self._epoch, curves)
        return self

    def end_epoch(self, better_LD: torch.Tensor, recall_LD: torch.Tensor) -> None:
        """Keep the parameters of the pairs that improved, and save the state."""
        for name, value in self._values.items():
            self._best[name][better_LD] = value.detach()[better_LD]
        self.best_LD = torch.where(better_LD, recall_LD, self.best_LD)
        self._epoch += 1
        self._since_better = 0 if bool(better_LD.any()) else self._since_better + 1
        if self._given.checkpoints is not None:
            state = {
                "values": {name: value.detach() for name, value in self._values.items()},
                "best": self._best,
                "recall": (self.start_LD, self.best_LD),
                "optimiser": self._optimiser.state_dict(),
                "counts": (self._epoch, self._step, self._since_better),
                "rng": json.dumps(self._rng.bit_generator.state),
            }
            self._given.checkpoints.save(self._stage, state)

    def resume(self) -> bool:
        """Load the saved state; returns whether there was one."""
        state = None if self._given.checkpoints is None else self._given.checkpoints.load(self._stage)
        if state is None:
            return False
        with torch.no_grad():
            for name, value in self._values.items():
                value.copy_(state["values"][name])
        self._best = {name: value.to(self._device) for name, value in state["best"].items()}
        self.start_LD, self.best_LD = (recall_LD.to(self._device) for recall_LD in state["recall"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._epoch, self._step, self._since_better = state["counts"]
        self._rng.bit_generator.state = json.loads(state["rng"])
        return True

    def _scores(self, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
        """Selection scores ``[L, D, T, E]`` and the experts chosen in the target layers ``[L, D, T, K]``."""
        # a view: matrix products read tokens at any stride, and a copy in the other order takes longer than they do
        inputs = torch.from_numpy(block.input_TLX).to(self._device).transpose(0, 1)
        chosen = torch.from_numpy(block.topk_TLK).to(self._device).transpose(0, 1).contiguous()
        return self._rule.scores(self._logits(self._values, inputs), self._correction), chosen[self._target_LD]

    def _loss(self, block: Block) -> torch.Tensor:
        """Mean cross-entropy ``[L, D]`` of each pair; 0 where there is no target."""
        scores, chosen = self._scores(block)
        logp = torch.log_softmax(scores * torch.exp(-self._values[TEMPERATURE])[:, :, None, None], -1)
        return torch.where(self._valid_LD, -logp.gather(-1, chosen).mean((-1, -2)), 0.0)

    @torch.inference_mode()
    def _recall(self, sample: Sample) -> torch.Tensor:
        """Share ``[L, D]`` of the chosen experts that were forecast."""
        hits = torch.zeros(self._valid_LD.shape, dtype=torch.float64, device=self._device)
        for block in sample.blocks(size=self._options.batch_tokens):
            scores, chosen = self._scores(block)
            forecast = torch.zeros(scores.shape, dtype=torch.bool, device=self._device)
            forecast.scatter_(-1, self._rule.select(scores, self._top_k), True)
            hits += forecast.gather(-1, chosen).sum((-1, -2))
        return torch.where(self._valid_LD, hits / max(1, sample.tokens * self._top_k), float("nan"))


def _curves(value_LD: Mapping[str, torch.Tensor], wanted: torch.Tensor) -> dict[str, Any]:
    """Means over the fitted pairs, and over those of each source layer (``loss/layer_03``, ...)."""
    made = {name: float(value[wanted].mean()) for name, value in value_LD.items()}
    for layer in torch.nonzero(wanted.any(1)).flatten().tolist():
        for name, value in value_LD.items():
            made[f"{name}/layer_{layer:02d}"] = float(value[layer][wanted[layer]].mean())
    return made


def _cosine(progress: float) -> float:
    """Factor on the peak learning rate: from 1 down to 0.1."""
    return 0.1 + 0.45 * (1 + float(np.cos(np.pi * min(1.0, progress))))

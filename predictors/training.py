"""Fitting the heads of all (layer, distance) pairs at once, by gradient, over streamed tokens.

Heads that read the same layer are one matrix product, and all layers are one batched product, so layers train in
parallel on any device. Every pair keeps the weights of its own best epoch on the validation sample.

Axes: L MoE layers, D distances, T tokens, E experts, K experts per token, X input width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moeless.errors import UserError
from moeless.predictors.checkpoints import Checkpoint
from moeless.predictors.data import Block, Sample
from moeless.predictors.fit_state import FitState
from moeless.predictors.router import RouterRule


@dataclass(frozen=True)
class TrainSettings:
    """How heads are fitted by gradient.

    Attributes:
        epochs: passes over the sample at most.
        patience: epochs without a better validation recall of any pair before fitting stops.
        learning_rate: Adam's, at its peak; falls to a tenth along a cosine.
        batch_tokens: tokens of one step.
        weight_decay: decoupled; none for fine-tuned gates, which start where they should stay near.
    """

    epochs: int = 10
    patience: int = 2
    learning_rate: float = 2e-3
    batch_tokens: int = 1024
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.patience < 1 or self.batch_tokens < 1:
            raise UserError("epochs, patience and batch tokens must be at least 1")
        if not 0 < self.learning_rate < 1 or self.weight_decay < 0:
            raise UserError("the learning rate must lie between 0 and 1, and the weight decay must not be negative")


class Heads(torch.nn.Module):
    """Heads of every source layer and distance: ``forward([L, T, X]) -> logits [L, D, T, E]``."""

    def pair_state(self) -> dict[str, torch.Tensor]:
        """Parameters whose first two axes are (source layer, distance)."""
        return dict(self.named_parameters())


class LinearHeads(Heads):
    """One linear layer per pair, started from given weights ``[L, D, E, H]`` and biases ``[L, D, E]``."""

    def __init__(self, weight_LDEH: torch.Tensor, bias_LDE: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight_LDEH.clone())
        self.bias = torch.nn.Parameter(bias_LDE.clone())

    def forward(self, input_LTX: torch.Tensor) -> torch.Tensor:
        """Logits ``[L, D, T, E]``."""
        layers, distances, experts, width = self.weight.shape
        flat = self.weight.reshape(layers, distances * experts, width)
        logits = torch.baddbmm(self.bias.reshape(layers, 1, -1), input_LTX, flat.transpose(1, 2))
        return logits.unflatten(-1, (distances, experts)).permute(0, 2, 1, 3)


class PerceptronHeads(Heads):
    """One network with a hidden layer per pair, started at random; those without a target are not computed."""

    def __init__(self, layers: int, distances: Sequence[int], width: int, hidden: int, experts: int, seed: int) -> None:
        super().__init__()
        self.distances = tuple(distances)
        shape = layers, len(self.distances)
        generator = torch.Generator().manual_seed(seed)
        first = torch.randn(*shape, hidden, width, generator=generator) * (2.0 / width) ** 0.5
        second = torch.randn(*shape, experts, hidden, generator=generator) * (1.0 / hidden) ** 0.5
        self.first = torch.nn.Parameter(first)
        self.first_bias = torch.nn.Parameter(torch.zeros(*shape, hidden))
        self.second = torch.nn.Parameter(second)
        self.second_bias = torch.nn.Parameter(torch.zeros(*shape, experts))

    def forward(self, input_LTX: torch.Tensor) -> torch.Tensor:
        """Logits ``[L, D, T, E]``."""
        found = []
        for at, distance in enumerate(self.distances):
            # source layers that have a target; the others' logits are zero and count for nothing
            here = slice(0, len(input_LTX) - distance)
            first_bias, second_bias = self.first_bias[here, at].unsqueeze(1), self.second_bias[here, at].unsqueeze(1)
            inner = torch.baddbmm(first_bias, input_LTX[here], self.first[here, at].transpose(1, 2)).relu()
            logits = torch.baddbmm(second_bias, inner, self.second[here, at].transpose(1, 2))
            found.append(torch.nn.functional.pad(logits, (0, 0, 0, 0, 0, distance)))
        return torch.stack(found, 1)


@dataclass
class Fitted:
    """Result of :func:`fit_heads`.

    Attributes:
        state: each pair's best parameters, first axes (L, D).
        temperature_LD: what scores are divided by before a softmax.
        start_recall_LD, recall_LD: top-k recall on the validation sample before and after; NaN where ``l + d >= L``.
    """

    state: dict[str, torch.Tensor]
    temperature_LD: torch.Tensor
    start_recall_LD: np.ndarray[Any, Any]
    recall_LD: np.ndarray[Any, Any]
    epochs: int


class Problem:
    """Targets, masks and loss shared by all kinds of heads.

    The loss is the cross-entropy between a softmax of the router's own selection scores over a fitted temperature
    and the chosen experts at weight 1/K each: minimised where K times the softmax is the expected assignment, so
    that sums over tokens are unbiased loads.
    """

    def __init__(
        self,
        distances: Sequence[int],
        num_layers: int,
        top_k: int,
        rule: RouterRule,
        correction_LE: torch.Tensor | None,
        device: torch.device,
    ) -> None:
        self.top_k, self.rule, self.device = top_k, rule, device
        source = torch.arange(num_layers).unsqueeze(1)
        target_LD = source + torch.tensor(list(distances)).unsqueeze(0)
        self.valid_LD = (target_LD < num_layers).to(device)
        self.target_LD = target_LD.clamp(max=num_layers - 1).to(device)
        self.correction = None if correction_LE is None else correction_LE.to(device)[self.target_LD].unsqueeze(2)

    def load(self, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs ``[L, T, X]`` and chosen experts ``[L, T, K]`` on the device."""
        # a view: matrix products read tokens at any stride, and a copy in the other order takes longer than they do
        inputs = torch.from_numpy(block.input_TLX).to(self.device).transpose(0, 1)
        chosen = torch.from_numpy(block.topk_TLK).to(self.device).transpose(0, 1).contiguous()
        return inputs, chosen

    def scores(self, heads: Heads, input_LTX: torch.Tensor) -> torch.Tensor:
        """Selection scores ``[L, D, T, E]``."""
        return self.rule.scores(heads(input_LTX), self.correction)

    def loss_LD(self, scores: torch.Tensor, chosen_LTK: torch.Tensor, log_temperature: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of each pair; 0 where there is no target."""
        logp = torch.log_softmax(scores * torch.exp(-log_temperature)[:, :, None, None], -1)
        picked = logp.gather(-1, chosen_LTK[self.target_LD])
        return torch.where(self.valid_LD, -picked.mean((-1, -2)), 0.0)

    def hits_LD(self, scores: torch.Tensor, chosen_LTK: torch.Tensor) -> torch.Tensor:
        """Chosen experts that were forecast, summed over tokens."""
        forecast = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
        forecast.scatter_(-1, self.rule.select(scores, self.top_k), True)
        return forecast.gather(-1, chosen_LTK[self.target_LD]).sum((-1, -2))


def fit_heads(
    heads: Heads,
    problem: Problem,
    sample: Sample,
    validation: Sample,
    settings: TrainSettings,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    tempered: bool = True,
    wanted_LD: torch.Tensor | None = None,
    on_epoch: Callable[[int, Mapping[str, float]], None] | None = None,
    checkpoint: Checkpoint | None = None,
) -> Fitted:
    """Fit all pairs; deterministic for a seed on one machine.

    Args:
        tempered: whether a temperature is fitted with the heads.
        wanted_LD: pairs to fit, None for all; the others keep their start.
        on_epoch: called with the epoch and its curves: training loss and validation recall, their means over the pairs
            fitted (``loss``, ``validation_recall``) and over each source layer's (``loss/layer_03``, ...).
        checkpoint: where the state is kept after each epoch and taken up from, None for nowhere.
    """
    heads = heads.to(problem.device)
    wanted = problem.valid_LD if wanted_LD is None else problem.valid_LD & wanted_LD.to(problem.device)
    log_temperature = torch.nn.Parameter(
        torch.full(problem.valid_LD.shape, float(np.log(temperature)), device=problem.device),
        requires_grad=tempered,
    )
    optimiser = torch.optim.AdamW(
        [
            {"params": list(heads.parameters()), "weight_decay": settings.weight_decay, "peak": 1.0},
            {"params": [log_temperature], "weight_decay": 0.0, "peak": 10.0},
        ],
        lr=settings.learning_rate,
    )
    rng = np.random.default_rng(seed)
    state = FitState(heads, log_temperature, optimiser, rng, checkpoint)
    if not state.resume():
        state.start(_recall(heads, problem, validation, settings.batch_tokens))
    steps = settings.epochs * -(-sample.tokens // settings.batch_tokens)
    while bool(wanted.any()) and state.epoch < settings.epochs and state.since_better < settings.patience:
        total_LD, count = torch.zeros_like(log_temperature), 0
        for block in sample.blocks(rng, settings.batch_tokens):
            inputs, chosen = problem.load(block)
            loss_LD = problem.loss_LD(problem.scores(heads, inputs), chosen, log_temperature)
            # a sum, so that each pair's step does not depend on how many others there are
            loss = torch.where(wanted, loss_LD, 0.0).sum()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * settings.learning_rate * _cosine(state.step / max(1, steps))
            optimiser.step()
            state.step += 1
            total_LD, count = total_LD + loss_LD.detach(), count + 1
        recall_LD = _recall(heads, problem, validation, settings.batch_tokens)
        state.end_epoch(wanted & (recall_LD > state.best_LD), recall_LD)
        if on_epoch is not None:
            on_epoch(state.epoch, _curves({"loss": total_LD / max(1, count), "validation_recall": recall_LD}, wanted))
    return Fitted(
        {name: tensor.cpu() for name, tensor in state.best.items()},
        torch.exp(state.best_temperature).cpu(),
        state.start_LD.numpy(force=True),
        state.best_LD.numpy(force=True),
        state.epoch,
    )


def _curves(value_LD: Mapping[str, torch.Tensor], wanted: torch.Tensor) -> dict[str, float]:
    """Means over the pairs fitted, then over those of each source layer that has some."""
    made = {name: float(value[wanted].mean()) for name, value in value_LD.items()}
    for layer in torch.nonzero(wanted.any(1)).flatten().tolist():
        for name, value in value_LD.items():
            made[f"{name}/layer_{layer:02d}"] = float(value[layer][wanted[layer]].mean())
    return made


def _cosine(progress: float) -> float:
    """Share of the peak learning rate: 1 at first, falling to a tenth."""
    return 0.1 + 0.45 * (1 + float(np.cos(np.pi * min(1.0, progress))))


def recall_of(heads: Heads, problem: Problem, sample: Sample, size: int) -> np.ndarray[Any, Any]:
    """Top-k recall of every pair on a sample, ``[L, D]``; NaN where ``l + d >= L``."""
    recall: np.ndarray[Any, Any] = _recall(heads.to(problem.device), problem, sample, size).numpy(force=True)
    return recall


@torch.inference_mode()
def _recall(heads: Heads, problem: Problem, sample: Sample, size: int) -> torch.Tensor:
    hits = torch.zeros(problem.valid_LD.shape, dtype=torch.float64, device=problem.device)
    for block in sample.blocks(size=size):
        inputs, chosen = problem.load(block)
        hits += problem.hits_LD(problem.scores(heads, inputs), chosen)
    recall = hits / max(1, sample.tokens * problem.top_k)
    return torch.where(problem.valid_LD, recall, float("nan"))

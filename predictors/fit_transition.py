"""Fitting the transition predictor by gradient, on iterations of many sizes and kinds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from moeless.errors import UserError
from moeless.predictors.data import Block, Sample
from moeless.predictors.fitting import FitInput, calibrate, pairs_of
from moeless.predictors.router import RouterRule
from moeless.predictors.training import Heads, Problem, TrainSettings, fit_heads
from moeless.predictors.transition import Transition, cuts, iteration_mean, marks


@dataclass(frozen=True)
class TransitionOptions:
    """Parameters.

    Attributes:
        hidden: units of the token's network; ``mean_hidden``: of the iteration's.
        learning_rate, epochs: 5e-3 over 10 epochs was best of {3e-3, 5e-3} x {4, 8, 10} on validation requests.
        batch_tokens: tokens of a training iteration; a quarter of them are composed like decode steps, and some are
            cut short, so that small and mixed iterations are met too.
    """

    hidden: int = 64
    mean_hidden: int = 32
    learning_rate: float = 5e-3
    epochs: int = 10
    patience: int = 3
    batch_tokens: int = 512

    def __post_init__(self) -> None:
        if self.hidden < 1 or self.mean_hidden < 1:
            raise UserError("hidden sizes must be at least 1")


class TransitionHeads(Heads):
    """All pairs' parameters; ``forward`` takes expert ids ``[L, T, K]``."""

    def __init__(
        self, mean_LE: torch.Tensor, share_LDE: torch.Tensor, top_k: int, hidden: int, mean_hidden: int, seed: int
    ) -> None:
        super().__init__()
        layers, distances, experts = share_LDE.shape
        width = len(cuts(top_k)) * experts
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(layers, distances, *shape, generator=generator) * scale)

        def zeros(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.zeros(layers, distances, *shape))

        self.mean_LE = mean_LE
        self.bias = torch.nn.Parameter(share_LDE.clamp_min(1e-6).log().unsqueeze(2))
        self.direct = zeros(width, experts)
        self.inner, self.inner_bias = normal(width, hidden, scale=width**-0.5), zeros(1, hidden)
        self.mean_inner, self.outer = normal(experts, hidden, scale=0.1), zeros(hidden, experts)
        self.mean_first, self.mean_bias = normal(experts, mean_hidden, scale=1.0), zeros(1, mean_hidden)
        self.mean_second = zeros(mean_hidden, experts)

    def forward(self, input_LTX: torch.Tensor) -> torch.Tensor:
        """Logits ``[L, D, T, E]``."""
        mark = marks(input_LTX, self.mean_LE.shape[-1])
        mean = iteration_mean(mark, self.mean_LE.to(mark.device)).unsqueeze(1)
        mark = mark.unsqueeze(1)
        inner = (self.inner_bias + mean @ self.mean_inner + mark @ self.inner).relu()
        shared = (self.mean_bias + mean @ self.mean_first).relu() @ self.mean_second
        return self.bias + mark @ self.direct + inner @ self.outer + shared


class MixedSample(Sample):
    """A sample whose training iterations are recomposed every epoch."""

    def blocks(self, rng: np.random.Generator | None = None, size: int = 512) -> Iterator[Block]:
        """Iterations of ``size`` tokens; with ``rng`` shuffled requests, a quarter scattered, a quarter shorter."""
        if rng is None:
            yield from self._cut(self.row_T, size)
            return
        rows = self._rows
        row_T = rows.of(rng.permutation(self.requests))[: self.tokens]
        starts = rng.permutation(np.arange(int(rng.integers(size)), max(1, len(row_T) - size // 2), size))
        for start in starts.tolist() or [0]:
            kind = rng.random()
            if kind < 0.25:
                part = rng.choice(row_T, size)
            elif kind < 0.5:
                part = row_T[start : start + max(8, int(size * 2 ** -rng.uniform(0, 4)))]
            else:
                part = row_T[start : start + size]
            yield from self._cut(part, size)

    def _cut(self, row_T: np.ndarray, size: int) -> Iterator[Block]:
        for start in range(0, len(row_T), size):
            topk_TLK = self._rows.topk_TLK[row_T[start : start + size]].astype(np.int64)
            yield Block(topk_TLK, topk_TLK)


def fit_transition(given: FitInput) -> Transition:
    """Fit every (layer, distance) at once."""
    options: TransitionOptions = given.options(TransitionOptions)
    rows, settings = given.rows, given.settings
    spec, distances = rows.spec, settings.distances
    problem = Problem(distances, spec.L, spec.K, RouterRule("softmax"), None, torch.device(settings.device))
    sample = MixedSample(rows, given.split.fit, "topk", settings.max_tokens, settings.seed)
    validation = MixedSample(rows, given.split.validation, "topk", max(1, settings.max_tokens // 4), settings.seed)
    share_LE = torch.from_numpy(rows.share_LE(sample.requests)).to(torch.float32)
    heads = TransitionHeads(
        share_LE * spec.K,
        share_LE[problem.target_LD.cpu()],
        spec.K,
        options.hidden,
        options.mean_hidden,
        settings.seed,
    )
    fitted = fit_heads(
        heads,
        problem,
        sample,
        validation,
        TrainSettings(options.epochs, options.patience, options.learning_rate, options.batch_tokens),
        seed=settings.seed,
        checkpoint=given.checkpoint("transition"),
        on_epoch=lambda epoch, values: given.report("transition", epoch, values),
        tempered=False,
    )
    state = {name: tensor.detach().numpy() for name, tensor in fitted.state.items()}
    state["mean"] = (share_LE * spec.K).numpy()
    made = Transition(spec, state, distances)
    made.variance = calibrate(made, given, pairs_of(spec.L, distances))
    return made

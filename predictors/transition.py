"""Forecasts of layer l + d from the expert ids of layer l alone, for traces and engines without gate inputs.

A token's expert ids say much about its next experts. The ids of all tokens of the iteration say what the texts are
about, which a single token does not show. The logits of a token are

    b + W x + U relu(c + V x + S m) + A relu(a + B m)

with x the token's marks (1 for each expert among its best, its best half, and all of its K) and m the mean marks of the
iteration minus those of training. m is multiplied by T / (T + 64), so that chance counts less in small iterations. The
fit uses iterations of many sizes and kinds.

Axes: T tokens, E experts, K experts per token, X marks, F hidden units, L layers, D distances.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from moeless.contracts import IntArray
from moeless.predictors.fitting import FitInput, calibrated, number, parsed
from moeless.predictors.gradient_fit import HeadFit, TrainOptions
from moeless.predictors.token_level import PairNetworks
from moeless.predictors.trace_rows import Block, Sample
from moeless.spec import MoESpec

#: Tokens at which an iteration's mean counts half.
SHRINK_TOKENS = 64.0
#: Factor that brings the mean's deviations to the size of a mark.
MEAN_SCALE = 4.0
NETWORK = ("direct", "bias", "inner", "inner_bias", "mean_inner", "outer", "mean_first", "mean_bias", "mean_second")


@dataclass(frozen=True)
class TransitionOptions(TrainOptions):
    """Parameters.

    Attributes:
        hidden: hidden units for the token's marks; ``mean_hidden``: for the iteration's mean.
        learning_rate, epochs: 5e-3 over 10 epochs was best of {3e-3, 5e-3} x {4, 8, 10} on validation requests.
        batch_tokens: tokens of a training iteration; a quarter of the iterations are composed like decode steps and a
            quarter are shorter.
    """

    hidden: int = number(64, 1)
    mean_hidden: int = number(32, 1)
    learning_rate: float = number(5e-3, 1e-9, 1)
    patience: int = number(3, 1)
    batch_tokens: int = number(512, 1)


class Transition(PairNetworks):
    """A small network for each (layer, distance), and the training mean ``[L, E]`` of the marks of all K experts."""

    name = "transition"
    reads = "topk"
    counting = "probability"
    batch_context = True
    dtypes = dict.fromkeys((*NETWORK, "mean"), np.float16)

    @classmethod
    def fit(cls, given: FitInput) -> Self:
        """Fit every (layer, distance) at once."""
        options, spec, rows = parsed(TransitionOptions, given.options), given.rows.spec, given.rows
        sample = given.sample(cls.reads, kind=MixedSample)
        share_LE = torch.from_numpy(rows.share_LE(sample.requests)).to(torch.float32)
        target_LD = np.minimum(np.arange(spec.L)[:, None] + given.distances, spec.L - 1)
        mean_LE = share_LE * spec.K

        def logits(parameters: Mapping[str, torch.Tensor], input_LTK: torch.Tensor) -> torch.Tensor:
            mark = marks(input_LTK, spec.E)
            mean = iteration_mean(mark, mean_LE.to(mark.device)).unsqueeze(1)
            return network_logits(parameters, mark.unsqueeze(1), mean)

        fitted = HeadFit(
            given, cls.name, _start(share_LE[target_LD], spec, options, given.seed), logits, options, temperature=None
        ).run(sample, given.sample(cls.reads, validation=True, kind=MixedSample))
        arrays = {name: tensor.numpy() for name, tensor in fitted.best.items()}
        return calibrated(cls(spec, arrays | {"mean": mean_LE.numpy()}, given.distances), given)

    def scores(self, input_TX: torch.Tensor, layer: int, distance: int) -> torch.Tensor:
        """See :class:`TokenLevel`; the logits depend on all tokens given."""
        part = {name: self._computed[name][self.at(layer, distance)] for name in NETWORK}
        mark_TX = marks(input_TX, self.spec.E)
        return network_logits(part, mark_TX, iteration_mean(mark_TX, self._computed["mean"][layer]))


def cuts(top_k: int) -> tuple[int, ...]:
    """How many of a token's best experts are marked, for each of the blocks of E marks."""
    return tuple(sorted({1, max(1, top_k // 2), top_k}))


def marks(ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Marks ``[..., X]`` of expert ids ``[..., K]``, best first; the last E marks are those of all K."""
    none = torch.zeros(*ids.shape[:-1], num_experts, device=ids.device)
    return torch.cat([none.scatter(-1, ids[..., :cut], 1.0) for cut in cuts(ids.shape[-1])], -1)


def iteration_mean(mark_TX: torch.Tensor, mean_E: torch.Tensor) -> torch.Tensor:
    """Deviation ``[..., 1, E]`` of an iteration's mean marks from the training mean ``[..., E]``, shrunk and scaled."""
    tokens = mark_TX.shape[-2]
    deviation = mark_TX[..., -mean_E.shape[-1] :].mean(-2) - mean_E
    return (deviation * (MEAN_SCALE * tokens / (tokens + SHRINK_TOKENS))).unsqueeze(-2)


def network_logits(parameters: Mapping[str, torch.Tensor], mark: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Logits ``[..., T, E]`` of marks ``[..., T, X]`` and the iteration's mean ``[..., 1, E]``; see the module."""
    p = parameters
    inner = (p["inner_bias"] + mean @ p["mean_inner"] + mark @ p["inner"]).relu()
    shared = (p["mean_bias"] + mean @ p["mean_first"]).relu() @ p["mean_second"]
    return p["bias"] + mark @ p["direct"] + inner @ p["outer"] + shared


def _start(share_LDE: torch.Tensor, spec: MoESpec, options: TransitionOptions, seed: int) -> dict[str, torch.Tensor]:
    """Initial parameters: the biases give the targets' training shares, hidden layers are random."""
    pairs, experts, generator = share_LDE.shape[:2], spec.E, torch.Generator().manual_seed(seed)
    width, hidden, mean_hidden = len(cuts(spec.K)) * experts, options.hidden, options.mean_hidden

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*pairs, *shape, generator=generator)

    return {
        "bias": share_LDE.clamp_min(1e-6).log().unsqueeze(2),
        "direct": torch.zeros(*pairs, width, experts),
        "inner": normal(width, hidden) * width**-0.5,
        "inner_bias": torch.zeros(*pairs, 1, hidden),
        "mean_inner": normal(experts, hidden) * 0.1,
        "outer": torch.zeros(*pairs, hidden, experts),
        "mean_first": normal(experts, mean_hidden),
        "mean_bias": torch.zeros(*pairs, 1, mean_hidden),
        "mean_second": torch.zeros(*pairs, mean_hidden, experts),
    }


class MixedSample(Sample):
    """A sample that composes new training iterations in every epoch."""

    def blocks(self, rng: np.random.Generator | None = None, size: int = 512) -> Iterator[Block]:
        """Iterations of ``size`` tokens; with ``rng``, requests are shuffled, a quarter of the iterations are scattered
        tokens and a quarter are shorter.
        """
        if rng is None:
            yield from self._cut(self.row_T, size)
            return
        row_T = self.rows.of(rng.permutation(self.requests))[: self.tokens]
        starts = rng.permutation(np.arange(int(rng.integers(size)), max(1, len(row_T) - size // 2), size))
        for start in starts.tolist() or [0]:
            kind, part_T = rng.random(), row_T[start : start + size]
            if kind < 0.25:
                part_T = rng.choice(row_T, size)
            elif kind < 0.5:
                part_T = row_T[start : start + max(8, int(size * 2 ** -rng.uniform(0, 4)))]
            yield from self._cut(part_T, size)

    def _cut(self, row_T: IntArray, size: int) -> Iterator[Block]:
        for start in range(0, len(row_T), size):
            yield self.block(row_T[start : start + size])

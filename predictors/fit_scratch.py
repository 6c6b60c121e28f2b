"""Fitting networks from scratch, after a search that gives them their best chance.

Axes: L MoE layers, D distances, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from moeless.errors import UserError
from moeless.predictors.data import Block, Sample
from moeless.predictors.fitting import FitInput, calibrate, pairs_of
from moeless.predictors.from_scratch import TABLE_2_HIDDEN, FromScratch
from moeless.predictors.router import RouterRule
from moeless.predictors.training import Fitted, PerceptronHeads, Problem, TrainSettings, fit_heads

#: Learning rates and weight decays that the search tries.
RATES = (1e-3, 3e-3, 1e-2)
DECAYS = (0.0, 0.1)


@dataclass(frozen=True)
class ScratchOptions:
    """Parameters; ProMoE and the paper state none but the size.

    Attributes:
        hidden: units of the hidden layer; 512 gives the memory of the paper's Table 2.
        learning_rate, weight_decay: searched where negative, by validation recall over a part of the sample at the
            shortest and the longest distance: first the rate, then the decay at the best rate.
        search_epochs, search_share: length of the search's fits and their share of the training tokens.
        epochs, patience: as for the fine-tuned gates, but longer: nothing is there to start from.
    """

    hidden: int = TABLE_2_HIDDEN
    learning_rate: float = -1.0
    weight_decay: float = -1.0
    search_epochs: int = 3
    search_share: float = 0.5
    epochs: int = 12
    patience: int = 2
    batch_tokens: int = 1024

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise UserError("the hidden size must be at least 1")
        if self.search_epochs < 1 or not 0 < self.search_share <= 1:
            raise UserError("the search needs at least 1 epoch and a share of the tokens between 0 and 1")


class ScaledProblem(Problem):
    """Inputs of every layer divided by their root mean square, which is as much as a network from scratch may know."""

    scale_L: torch.Tensor

    def load(self, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
        """Scaled inputs ``[L, T, H]`` and chosen experts ``[L, T, K]``."""
        inputs, chosen = super().load(block)
        return inputs / self.scale_L[:, None, None], chosen


def fit_from_scratch(given: FitInput) -> FromScratch:
    """Search, then fit every (layer, distance) at once."""
    options: ScratchOptions = given.options(ScratchOptions)
    spec, settings = given.rows.spec, given.settings
    sample, validation = given.sample("router_inputs"), given.sample("router_inputs", validation=True)
    scale_L = _scales(sample).to(settings.device)

    def run(distances: tuple[int, ...], tried: TrainSettings, data: Sample, what: str) -> Fitted:
        problem = ScaledProblem(
            distances, spec.L, spec.K, RouterRule("softmax"), None, torch.device(settings.device)
        )  # fmt: skip
        problem.scale_L = scale_L
        heads = PerceptronHeads(spec.L, distances, spec.hidden_size, options.hidden, spec.E, settings.seed)
        return fit_heads(
            heads,
            problem,
            data,
            validation,
            tried,
            seed=settings.seed,
            checkpoint=given.checkpoint(what),
            on_epoch=lambda epoch, values: given.report(what, epoch, values),
        )

    chosen = TrainSettings(
        options.epochs,
        options.patience,
        max(options.learning_rate, 0.0) or RATES[0],
        options.batch_tokens,
        max(options.weight_decay, 0.0),
    )
    part = given.sample("router_inputs", share=options.search_share)
    ends = tuple(sorted({min(settings.distances), max(settings.distances)}))

    recall_of: dict[TrainSettings, float] = {}

    def best(tried: list[TrainSettings]) -> TrainSettings:
        if len(tried) == 1:
            return tried[0]
        for entry in tried:
            if entry not in recall_of:
                short = replace(entry, epochs=options.search_epochs, patience=options.search_epochs)
                name = f"search-{entry.learning_rate:g}-{entry.weight_decay:g}"
                recall_of[entry] = float(np.nanmean(run(ends, short, part, name).recall_LD))
        return max(tried, key=lambda entry: recall_of[entry])

    if options.learning_rate < 0:
        chosen = best([replace(chosen, learning_rate=rate) for rate in RATES])
    if options.weight_decay < 0:
        chosen = best([replace(chosen, weight_decay=decay) for decay in DECAYS])
    fitted = run(settings.distances, chosen, sample, "from_scratch")
    state = {name: tensor.numpy() for name, tensor in fitted.state.items()}
    state["first"] = state["first"] / scale_L.cpu().numpy()[:, None, None, None]
    made = FromScratch(spec, state, settings.distances, fitted.temperature_LD.numpy())
    made.variance = calibrate(made, given, pairs_of(spec.L, settings.distances))
    return made


def _scales(sample: Sample) -> torch.Tensor:
    """Root mean square of each layer's inputs over the first block, ``[L]``."""
    block = next(iter(sample.blocks()))
    square_L = (block.input_TLX.astype(np.float64) ** 2).mean((0, 2))
    return torch.from_numpy(np.sqrt(np.maximum(square_L, 1e-12))).to(torch.float32)

"""Networks trained from scratch, one per (layer, distance), as ProMoE has them (arXiv 2410.22134).

Their size is that of the paper's Table 2: H × 512 × E in 16 bits gives its ProMoE column. They see the same gate inputs
and tokens as the fine-tuned gates, but not the model's gates. Learning rate and weight decay are searched, so that the
comparison is fair.

Axes: L MoE layers, D distances, E experts, H hidden size, F hidden units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch

from moeless.predictors.fitting import FitInput, calibrated, number, parsed
from moeless.predictors.gradient_fit import HeadFit, TrainOptions
from moeless.predictors.token_level import PairNetworks
from moeless.predictors.trace_rows import Sample

#: Learning rates and weight decays that the search tries.
RATES = (1e-3, 3e-3, 1e-2)
DECAYS = (0.0, 0.1)
NETWORK = ("first", "first_bias", "second", "second_bias")


@dataclass(frozen=True)
class ScratchOptions(TrainOptions):
    """Parameters; ProMoE and the paper state only the size. Epochs are more than for gates, which start near the goal.

    Attributes:
        hidden: units of the hidden layer; 512 gives the memory of the paper's Table 2.
        learning_rate, weight_decay: if negative, the ones with the best validation recall at the shortest and the
            longest distance: first the rate is searched, then the decay at the best rate.
        search_epochs, search_share: epochs of the search's fits and their share of the training tokens.
    """

    hidden: int = number(512, 1)
    learning_rate: float = number(-1.0, -1, 1)
    weight_decay: float = number(-1.0, -1)
    search_epochs: int = number(3, 1)
    search_share: float = number(0.5, 1e-9, 1)
    epochs: int = number(12, 1)


class FromScratch(PairNetworks):
    """Two-layer networks with a ReLU between.

    Args:
        arrays: ``first [L, D, F, H]``, ``first_bias [L, D, F]``, ``second [L, D, E, F]``, ``second_bias [L, D, E]``,
            and ``temperature [L, D]``, which scores are divided by before a softmax.
    """

    name = "from_scratch"
    reads = "router_inputs"
    dtypes = dict.fromkeys(NETWORK, np.float16) | {"temperature": np.float32}

    @classmethod
    def fit(cls, given: FitInput) -> Self:
        """Search learning rate and weight decay, then fit all (layer, distance) at once."""
        options, spec = parsed(ScratchOptions, given.options), given.rows.spec
        sample, validation = given.sample(cls.reads), given.sample(cls.reads, validation=True)
        part = given.sample(cls.reads, share=options.search_share)
        scale_L = _scales(sample).to(given.device)

        def run(what: str, distances: tuple[int, ...], tried: ScratchOptions, data: Sample) -> HeadFit:
            start = _start(spec.L, len(distances), spec.hidden_size, options.hidden, spec.E, given.seed)

            def logits(parameters: Mapping[str, torch.Tensor], input_LTH: torch.Tensor) -> torch.Tensor:
                return perceptron_logits(parameters, input_LTH / scale_L[:, None, None], distances)

            fit = HeadFit(given, what, start, logits, tried, distances=distances, weight_decay=tried.weight_decay)
            return fit.run(data, validation)

        ends = tuple(sorted({min(given.distances), max(given.distances)}))
        recall_of: dict[ScratchOptions, float] = {}

        def best(tried: list[ScratchOptions]) -> ScratchOptions:
            for entry in tried:
                if entry not in recall_of:
                    short = replace(entry, epochs=options.search_epochs, patience=options.search_epochs)
                    name = f"search-{entry.learning_rate:g}-{entry.weight_decay:g}"
                    recall_of[entry] = float(np.nanmean(run(name, ends, short, part).best_LD.numpy(force=True)))
            return max(tried, key=lambda entry: recall_of[entry])

        chosen = replace(
            options,
            learning_rate=max(options.learning_rate, 0.0) or RATES[0],
            weight_decay=max(options.weight_decay, 0.0),
        )
        if options.learning_rate < 0:
            chosen = best([replace(chosen, learning_rate=rate) for rate in RATES])
        if options.weight_decay < 0:
            chosen = best([replace(chosen, weight_decay=decay) for decay in DECAYS])
        fitted = run(cls.name, given.distances, chosen, sample)
        arrays = {name: tensor.numpy() for name, tensor in fitted.best.items()}
        arrays["first"] = arrays["first"] / scale_L.cpu().numpy()[:, None, None, None]
        arrays["temperature"] = fitted.temperature_LD.numpy()
        return calibrated(cls(spec, arrays, given.distances), given)

    def scores(self, input_TX: torch.Tensor, layer: int, distance: int) -> torch.Tensor:
        """Logits ``[T, E]``."""
        part = {name: self._computed[name][self.at(layer, distance)] for name in NETWORK}
        inner = torch.nn.functional.linear(input_TX, part["first"], part["first_bias"]).relu()
        return torch.nn.functional.linear(inner, part["second"], part["second_bias"])

    def temperature(self, layer: int, distance: int) -> float:
        """See :class:`TokenLevel`; fitted with the network."""
        return float(self._kept["temperature"][self.at(layer, distance)])

    @property
    def memory_bytes(self) -> int:
        """Bytes of the networks that have a target; the arrays also have rows for the last layers, which have none."""
        return 2 * self.num_parameters

    @property
    def num_parameters(self) -> int:
        """Parameters of the networks that have a target."""
        pairs = sum(self.spec.L - d for d in self.distances or ())
        return sum(int(self._kept[name][0, 0].size) for name in NETWORK) * pairs


def perceptron_logits(
    parameters: Mapping[str, torch.Tensor], input_LTH: torch.Tensor, distances: tuple[int, ...]
) -> torch.Tensor:
    """Logits ``[L, D, T, E]`` of inputs ``[L, T, H]``; zero for source layers without a target."""
    found = []
    for at, distance in enumerate(distances):
        here = slice(0, len(input_LTH) - distance)
        part = {name: tensor[here, at] for name, tensor in parameters.items()}
        first_bias, second_bias = part["first_bias"].unsqueeze(1), part["second_bias"].unsqueeze(1)
        inner = torch.baddbmm(first_bias, input_LTH[here], part["first"].transpose(1, 2)).relu()
        logits = torch.baddbmm(second_bias, inner, part["second"].transpose(1, 2))
        found.append(torch.nn.functional.pad(logits, (0, 0, 0, 0, 0, distance)))
    return torch.stack(found, 1)


def _start(layers: int, distances: int, width: int, hidden: int, experts: int, seed: int) -> dict[str, torch.Tensor]:
    """Random parameters to start from."""
    shape, generator = (layers, distances), torch.Generator().manual_seed(seed)
    return {
        "first": torch.randn(*shape, hidden, width, generator=generator) * (2.0 / width) ** 0.5,
        "second": torch.randn(*shape, experts, hidden, generator=generator) * (1.0 / hidden) ** 0.5,
        "first_bias": torch.zeros(*shape, hidden),
        "second_bias": torch.zeros(*shape, experts),
    }


def _scales(sample: Sample) -> torch.Tensor:
    """Root mean square ``[L]`` of each layer's inputs over the first block, to scale them by."""
    block = next(iter(sample.blocks()))
    square_L = (block.input_TLX.astype(np.float64) ** 2).mean((0, 2))
    return torch.from_numpy(np.sqrt(np.maximum(square_L, 1e-12))).to(torch.float32)

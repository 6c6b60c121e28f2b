"""Everything that changes while heads are fitted, and its way to a checkpoint and back.

Axes: L MoE layers, D distances.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from moeless.predictors.checkpoints import Checkpoint

if TYPE_CHECKING:
    from moeless.predictors.training import Heads

#: What Adam keeps of each parameter.
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class FitState:
    """Heads in training, their optimiser and random numbers, and the best of each pair so far.

    Attributes:
        epoch, step: passes and optimiser steps done.
        since_better: epochs in a row in which no pair's validation recall rose.
        best, best_temperature, best_LD: parameters, log temperature and recall of each pair's best epoch.
        start_LD: recall before the first step.
    """

    def __init__(
        self,
        heads: Heads,
        log_temperature: torch.nn.Parameter,
        optimiser: torch.optim.Optimizer,
        rng: np.random.Generator,
        checkpoint: Checkpoint | None,
    ) -> None:
        self.heads, self.log_temperature, self.optimiser = heads, log_temperature, optimiser
        self.rng, self.checkpoint = rng, checkpoint
        self.epoch, self.step, self.since_better = 0, 0, 0
        self.best = {name: tensor.detach().clone() for name, tensor in heads.pair_state().items()}
        self.best_temperature = log_temperature.detach().clone()
        self.best_LD = self.start_LD = torch.empty(0)

    def start(self, recall_LD: torch.Tensor) -> None:
        """Note how good the heads are untrained."""
        self.start_LD, self.best_LD = recall_LD, recall_LD.clone()

    def end_epoch(self, better_LD: torch.Tensor, recall_LD: torch.Tensor) -> None:
        """Keep the pairs that got better, and the state on disk."""
        for name, tensor in self.heads.pair_state().items():
            self.best[name][better_LD] = tensor.detach()[better_LD]
        self.best_temperature[better_LD] = self.log_temperature.detach()[better_LD]
        self.best_LD = torch.where(better_LD, recall_LD, self.best_LD)
        self.epoch += 1
        self.since_better = 0 if bool(better_LD.any()) else self.since_better + 1
        if self.checkpoint is not None:
            notes = {"epoch": self.epoch, "step": self.step, "since_better": self.since_better}
            self.checkpoint.save(self._tensors(), notes | {"rng": self.rng.bit_generator.state})

    def resume(self) -> bool:
        """Take up the state on disk, if there is one."""
        found = None if self.checkpoint is None else self.checkpoint.load()
        if found is None:
            return False
        tensors, notes = found
        self.epoch, self.step, self.since_better = notes["epoch"], notes["step"], notes["since_better"]
        self.rng.bit_generator.state = notes["rng"]
        moments = {
            index: {name: tensors[f"moment.{index}.{name}"] for name in MOMENTS}
            for index in range(len(self._parameters()))
            if f"moment.{index}.step" in tensors
        }
        self.optimiser.load_state_dict(self.optimiser.state_dict() | {"state": moments})
        with torch.no_grad():
            for name, tensor in self._values().items():
                tensor.copy_(tensors[name])
        device = self.log_temperature.device
        self.start_LD, self.best_LD = tensors["start"].to(device), tensors["best_recall"].to(device)
        return True

    def _parameters(self) -> list[torch.Tensor]:
        return [parameter for group in self.optimiser.param_groups for parameter in group["params"]]

    def _values(self) -> dict[str, torch.Tensor]:
        """Tensors that are copied into, by name."""
        made: dict[str, torch.Tensor] = {f"heads.{name}": value for name, value in self.heads.named_parameters()}
        made |= {f"best.{name}": value for name, value in self.best.items()}
        return made | {"temperature": self.log_temperature, "best_temperature": self.best_temperature}

    def _tensors(self) -> dict[str, torch.Tensor]:
        made = self._values() | {"start": self.start_LD, "best_recall": self.best_LD}
        for index, parameter in enumerate(self._parameters()):
            for name, value in self.optimiser.state.get(parameter, {}).items():
                made[f"moment.{index}.{name}"] = value
        return made

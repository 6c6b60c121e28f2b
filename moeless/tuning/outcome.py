"""What a study found: its front, each point tested on held-out data, written as presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial

from moeless.contracts import FloatArray
from moeless.files import write_json
from moeless.metrics.result import Cell
from moeless.tuning.presets import Preset
from moeless.tuning.space import Value
from moeless.tuning.study import Tuning
from moeless.tuning.workers import REASON

#: Points of the front that are tested on held-out data, at most; each costs a simulation.
TESTED = 8
DEFAULT = "default"


@dataclass(frozen=True)
class Found:
    """One set of parameters: its objectives while tuning (None: not tried) and on held-out data."""

    name: str
    trial: int | None
    params: Mapping[str, Value]
    tuned: Mapping[str, float | None]
    held_out: Mapping[str, float | None]

    def to_json(self) -> dict[str, Any]:
        """For ``tuning.json``."""
        return {key: dict(value) if isinstance(value, Mapping) else value for key, value in vars(self).items()}


@dataclass(frozen=True)
class Outcome:
    """The study's conclusion.

    Attributes:
        rows: the default first, then the tested points of the front; ``recommended`` names one of them.
        cells: held-out cells, in the order of ``rows``.
        values_NM: objectives of every trial that ended with a value, ``trial_N`` their numbers.
    """

    rows: tuple[Found, ...]
    recommended: str
    cells: tuple[Cell, ...]
    values_NM: FloatArray
    trial_N: tuple[int, ...]
    front: tuple[int, ...]
    trials: tuple[Mapping[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """Content of ``tuning.json``."""
        return {
            "format": 1,
            "recommended": self.recommended,
            "front": list(self.front),
            "points": [row.to_json() for row in self.rows],
            "trials": [dict(trial) for trial in self.trials],
        }


def conclude(tuning: Tuning, study: optuna.Study, folder: Path) -> Outcome:
    """Test the front on held-out data; write ``preset.json`` (recommended), ``presets/`` and ``tuning.json``.

    The recommended point is the knee of the front as tuning saw it; held-out data only judges it.
    """
    front = tuning.pareto(study)
    knee = tuning.knee(front)
    tested = _spread(front, knee)
    names = tuning.config.objective_names
    default = Preset.split(DEFAULT, tuning.policy, tuning.default_values)
    presets = [tuning.preset(trial, "tuned" if trial is knee else f"trial-{trial.number}") for trial in tested]
    cells = tuning.held_out([default, *presets])
    held = [{o.objective: o.of(cell) for o in tuning.objectives} for cell in cells]
    first = next((t for t in study.trials if t.values is not None and t.params == tuning.default_values), None)
    rows = [Found(DEFAULT, first.number if first else None, tuning.default_values, _values(names, first), held[0])]
    for trial, preset, values in zip(tested, presets, held[1:], strict=True):
        rows.append(Found(preset.name, trial.number, trial.params, _values(names, trial), values))
        provenance = {**preset.provenance, "held_out": values, "held_out_default": held[0]}
        done = replace(preset, provenance=provenance)
        done.save(folder / "presets" / f"{preset.name}.json")
        if trial is knee:
            done.save(folder / "preset.json")
    ended = [trial for trial in study.trials if trial.values is not None]
    outcome = Outcome(
        rows=tuple(rows),
        recommended="tuned",
        cells=tuple(cells),
        values_NM=np.array([trial.values for trial in ended], np.float64),
        trial_N=tuple(trial.number for trial in ended),
        front=tuple(trial.number for trial in front),
        trials=tuple(_trial(names, trial) for trial in study.trials),
    )
    write_json(folder / "tuning.json", outcome.to_json())
    return outcome


def _spread(front: list[FrozenTrial], knee: FrozenTrial) -> list[FrozenTrial]:
    """Ends, knee, and points evenly between."""
    picks = {front[index].number for index in np.linspace(0, len(front) - 1, min(TESTED - 1, len(front))).astype(int)}
    return [trial for trial in front if trial.number in picks or trial is knee]


def _values(names: tuple[str, ...], trial: FrozenTrial | None) -> dict[str, float | None]:
    values = trial.values if trial is not None and trial.values is not None else [None] * len(names)
    return dict(zip(names, values, strict=True))


def _trial(names: tuple[str, ...], trial: FrozenTrial) -> dict[str, Any]:
    return {
        "trial": trial.number,
        "state": trial.state.name.lower(),
        "params": trial.params,
        "values": _values(names, trial),
        "figures": trial.user_attrs.get("figures"),
        "reason": trial.user_attrs.get(REASON),
    }

"""Tuned presets: a policy with its parameters, in a file that ``serve-bench`` takes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from moeless.contracts import Policy
from moeless.errors import UserError
from moeless.files import read_json, write_json
from moeless.metrics.result import Cell
from moeless.placement import PLANNERS
from moeless.placement.params import make_params
from moeless.serverless.keep_alive import KeepAlive
from moeless.simulator import Simulation
from moeless.simulator.bench import Bench
from moeless.tuning.space import SERVERLESS, Value

FORMAT = 1


@dataclass(frozen=True)
class Preset:
    """What a policy runs with.

    Attributes:
        name: shown beside the policy.
        planner_params: values that replace the planner's defaults.
        settings: values of ``moeless.tuning.space.SERVERLESS``.
        provenance: study, data, objectives, values there and on held-out data.
    """

    name: str
    policy: Policy
    planner_params: Mapping[str, Value] = field(default_factory=dict)
    settings: Mapping[str, Value] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = set(self.settings) - set(SERVERLESS)
        if unknown:
            raise UserError(f"a preset sets {', '.join(sorted(unknown))}; it may set {', '.join(SERVERLESS)}")
        for name, value in self.settings.items():
            _check_setting(self.name, name, value)
        make_params(PLANNERS.get(self.policy.planner), self.planner_params)

    @classmethod
    def split(cls, name: str, policy: Policy, values: Mapping[str, Value], **more: Any) -> Preset:
        """A preset from searched values, which name parameters and settings alike."""
        settings = {key: value for key, value in values.items() if key in SERVERLESS}
        return cls(name, policy, {k: v for k, v in values.items() if k not in settings}, settings, **more)

    def save(self, path: Path) -> None:
        """Write the file, atomically."""
        data = {
            "format": FORMAT,
            "kind": "preset",
            "name": self.name,
            "policy": str(self.policy),
            "planner_params": dict(self.planner_params),
            "settings": dict(self.settings),
            "provenance": dict(self.provenance),
        }
        write_json(path, data)


def _check_setting(preset: str, name: str, value: Any) -> None:
    kind = SERVERLESS[name]
    if kind is KeepAlive:
        KeepAlive.parse(str(value))
    elif kind is bool:
        if not isinstance(value, bool):
            raise UserError(f"preset {preset!r}: {name} must be true or false, got {value!r}")
    elif isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise UserError(f"preset {preset!r}: {name} must be a number of at least 0, got {value!r}")
    elif kind is int and value != int(value):
        raise UserError(f"preset {preset!r}: {name} must be a whole number, got {value!r}")


def load_preset(path: Path) -> Preset:
    """Read and check a preset file.

    Raises:
        UserError: it is missing, no preset, or names a planner or parameter that does not exist.
    """
    data = read_json(path)
    if not isinstance(data, dict) or data.get("kind") != "preset" or data.get("format") != FORMAT:
        raise UserError(f"{path} is not a preset; `moeless tune` makes them")
    try:
        return Preset(
            str(data["name"]),
            Policy.parse(str(data["policy"])),
            dict(data["planner_params"]),
            dict(data["settings"]),
            dict(data.get("provenance", {})),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a preset ({error!r})") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def apply_preset(bench: Bench, preset: Preset) -> Bench:
    """The same workload with the preset's parameters; run ``preset.policy`` on it.

    Raises:
        UserError: the preset's predictor is not at hand.
    """
    made = copy.copy(bench)
    params = make_params(PLANNERS.get(preset.policy.planner), preset.planner_params)
    chosen = {key: getattr(params, key.replace("-", "_")) for key in preset.planner_params}
    settings: dict[str, Any] = dict(preset.settings)
    made.config = replace(
        bench.config,
        policies=(preset.policy,),
        planner_params={**bench.config.planner_params, preset.policy.planner: chosen},
        **settings,
    )
    return made


def run_presets(
    bench: Bench, presets: Sequence[Preset], progress: Callable[[str, int], None] | None = None
) -> Iterator[Simulation]:
    """Each preset under each of the benchmark's cost models; its name is put behind the policy's."""
    for preset in presets:
        made = apply_preset(bench, preset)
        for costs in bench.config.costs:
            report = None if progress is None else partial(progress, f"{costs} {preset.policy}@{preset.name}")
            done = made.run_cell(costs, preset.policy, report)
            yield replace(done, cell=named(done.cell, preset))


def named(cell: Cell, preset: Preset) -> Cell:
    """The cell under the preset's name, with what it sets; a warning where it was tuned for something else."""
    tuned = preset.provenance.get("tuned_on", {})
    found = {"costs": cell.costs, "cluster": cell.cluster, "model": cell.model}
    others = [f"{key} {tuned[key]}" for key, value in found.items() if tuned.get(key, value) != value]
    warnings = (*cell.warnings, f"preset {preset.name} was tuned for {', '.join(others)}") if others else cell.warnings
    settings = {**cell.settings, "preset": preset.name, **preset.planner_params, **preset.settings}
    return replace(cell, policy=f"{cell.policy}@{preset.name}", warnings=warnings, settings=settings)

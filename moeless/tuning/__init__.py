"""Tuning a policy's parameters through the simulator."""

from moeless.metrics.catalogue import OBJECTIVES
from moeless.tuning.presets import Preset, apply_preset, load_preset
from moeless.tuning.space import Axis, parse_ranges, search_space
from moeless.tuning.study import Tuning, TuningConfig

__all__ = [
    "OBJECTIVES",
    "Axis",
    "Preset",
    "Tuning",
    "TuningConfig",
    "apply_preset",
    "load_preset",
    "parse_ranges",
    "search_space",
]

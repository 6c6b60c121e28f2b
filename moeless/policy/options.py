"""Options of policies: which ones, with what memory, and how often they plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeless.configuration import Component, option


@dataclass(frozen=True, kw_only=True)
class Policies(Component, group="Policies"):
    """What is compared. ``planner_params`` are parameters other than the defaults, by planner."""

    policies: tuple[Any, ...] = option(
        ("static", "eplb:history", "oracle"),
        "--policy",
        "planner[:predictor[:distance or auto]].",
        kind=list[str],
    )
    predictors: tuple[Path, ...] = option((), "--predictor", "Fitted predictor.", metavar="DIR")
    extra_slots: int = option(1, "--extra-slots", "Extra copies per GPU and layer.", minimum=0, tune=(0, 4))
    keep_alive: float | str = option(
        10.0,
        "--keep-alive",
        "Of idle copies: SECONDS, lru, or adaptive[:SECONDS].",
        kind=str,
        show=lambda value: value if isinstance(value, str) else f"{value:g}",
        tune=(0.1, 100.0, "log"),
    )
    replan_seconds: float = option(600.0, "--replan", "Seconds between EPLB's plans.", tune=(10.0, 1800.0, "log"))
    plan_every: int = option(
        1, "--plan-every", "Iterations between plans of moeless, elastic; 1: the paper.", minimum=1
    )
    planner_params: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

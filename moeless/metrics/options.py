"""Options of what is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeless.configuration import Component, option

if TYPE_CHECKING:
    from moeless.metrics.requests import Objective


def _objectives(texts: Sequence[str]) -> tuple[Objective, ...]:
    from moeless.metrics.requests import parse_goodput

    return parse_goodput(texts)


def _objective_texts(objectives: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"{limit['metric']}:{limit['milliseconds']}" for limit in objectives]


@dataclass(frozen=True, kw_only=True)
class Measuring(Component, group="Measuring"):
    """Which figures a result holds."""

    objectives: tuple[Objective, ...] = option(
        (),
        "--goodput",
        "Objectives such as ttft:500 tpot:50, in milliseconds.",
        kind=list[str],
        read=_objectives,
        show=_objective_texts,
    )
    warmup: int = option(0, "--warmup", "First iterations left out of layer figures.", minimum=0)

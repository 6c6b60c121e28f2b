"""Options of what is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moeless.configuration import Component, option

if TYPE_CHECKING:
    from moeless.metrics.requests import Objective


def _objectives(texts: Sequence[str]) -> tuple[Objective, ...]:
    from moeless.metrics.requests import parse_goodput

    return parse_goodput(texts)


@dataclass(frozen=True, kw_only=True)
class Measuring(Component, group="Measuring"):
    """Which figures a result holds."""

    objectives: tuple[Objective, ...] = option(
        (),
        "--goodput",
        "Objectives such as ttft:500 tpot:50, in milliseconds.",
        read=_objectives,
        show=lambda limits: ["{metric}:{milliseconds}".format(**limit) for limit in limits],
    )
    warmup: int = option(0, "--warmup", "First iterations left out of layer figures.", minimum=0)

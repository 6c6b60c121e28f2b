"""Planners: how many copies of each expert, where, and which of them serve which tokens."""

if not __name__.startswith("moeless."):
    raise ImportError(f"import this package as moeless.placement, not as {__name__!r}")

from moeless.placement.base import Planner
from moeless.registry import Registry

__all__ = ["PLANNERS", "Planner"]

#: Planners by name; each entry is a :class:`Planner`.
PLANNERS = Registry(
    "planner",
    "moeless.planners",
    {
        "static": "moeless.placement.static:PLANNER",
        "eplb": "moeless.placement.eplb:PLANNER",
        "eplb-hierarchical": "moeless.placement.eplb:HIERARCHICAL",
        "moeless": "moeless.placement.paper:PLANNER",
        "elastic": "moeless.placement.elastic:PLANNER",
        "elastic-ahead": "moeless.placement.elastic_ahead:PLANNER",
        "metro": "moeless.placement.metro:PLANNER",
        "llep": "moeless.placement.llep:PLANNER",
        "craft": "moeless.placement.craft:PLANNER",
        "milp": "moeless.placement.milp:PLANNER",
    },
)

"""Cost models: how long the parts of a layer take under stated assumptions."""

from functools import partial
from typing import Any

from moeless.costs.base import Control, CostModel, CostTerms
from moeless.errors import UserError
from moeless.registry import Registry

__all__ = ["COSTS", "Control", "CostModel", "CostTerms"]


class CostRegistry(Registry):
    """Cost models by name; ``measured:PROFILE`` is the measured one with a profile's file or shipped name."""

    def get(self, name: str) -> Any:
        base, colon, profile = name.partition(":")
        if not colon:
            return super().get(name)
        if base != "measured" or not profile:
            raise UserError(f"cost model {name!r} is not of the form measured:PROFILE; only measured takes a profile")
        from moeless.costs.profile_reader import load_profile

        return partial(super().get(base), profile=load_profile(profile))


#: Cost models by name; a factory takes ``(spec, cluster, **parameters)``.
COSTS = CostRegistry(
    "cost model",
    "moeless.costs",
    {
        "paper": "moeless.costs.paper:PaperCosts",
        "roofline": "moeless.costs.roofline:RooflineCosts",
        "measured": "moeless.costs.measured:MeasuredCosts",
    },
)

"""Cost models: how long the parts of a layer take under stated assumptions."""

from moeless.costs.base import CostModel, CostTerms, LayerTime
from moeless.registry import Registry

__all__ = ["COSTS", "CostModel", "CostTerms", "LayerTime"]

#: Cost models by name; a factory takes ``(spec, cluster, **parameters)``.
COSTS = Registry(
    "cost model",
    "moeless.costs",
    {
        "paper": "moeless.costs.paper:PaperCosts",
        "roofline": "moeless.costs.roofline:RooflineCosts",
        "measured": "moeless.costs.measured:MeasuredCosts",
    },
)

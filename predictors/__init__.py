"""Load predictors: from what layer l sees to the load of layer l + d."""

if not __name__.startswith("moeless."):
    raise ImportError(f"import this package as moeless.predictors, not as {__name__!r}")

from moeless.predictors.base import LoadPredictor, load_predictor
from moeless.registry import Registry

#: Load predictors by name; other packages add theirs under the entry-point group ``moeless.predictors``.
PREDICTORS = Registry(
    "predictor",
    "moeless.predictors",
    {
        "none": "moeless.predictors.past_loads:Uniform",
        "history": "moeless.predictors.past_loads:History",
        "window": "moeless.predictors.past_loads:Window",
        "last": "moeless.predictors.past_loads:Last",
        "oracle": "moeless.predictors.past_loads:Oracle",
        "gate_reuse": "moeless.predictors.gate_reuse:GateReuse",
        "frequency": "moeless.predictors.past_loads:Frequency",
        "transition": "moeless.predictors.transition:Transition",
        "layer_aware": "moeless.predictors.layer_aware:LayerAware",
        "from_scratch": "moeless.predictors.from_scratch:FromScratch",
        "blend": "moeless.predictors.blend:Blend",
    },
)

__all__ = ["PREDICTORS", "LoadPredictor", "load_predictor"]

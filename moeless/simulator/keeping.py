"""Which plans an iteration's forecasts leave as they are, so that nobody has to be asked.

Axes: L layers, E experts.
"""

from __future__ import annotations

import numpy as np

from moeless.contracts import BoolArray, FloatArray, LayerPlan
from moeless.placement import elastic, elastic_ahead
from moeless.placement.keep_kernels import KeepTerms, kept_layers
from moeless.placement.layout import static_layout
from moeless.policy import ResolvedPolicy


class Keeping:
    """Memory of the forecasts that plans were made for.

    Active for the elastic planners with forecasts from history, which are known for all layers as an iteration starts.
    Others are asked for every layer.

    Attributes:
        terms: for compiled loops; its arrays are updated in place.
    """

    def __init__(self, runtime: ResolvedPolicy) -> None:
        spec, gpus = runtime.spec, runtime.cluster.G
        ahead = runtime.planner.plan_layer is elastic_ahead.plan_layer
        active = (ahead or runtime.planner.plan_layer is elastic.plan_layer) and (
            runtime.predictor is not None and runtime.predictor.from_history
        )
        gpu_E, extra, skip = np.zeros(spec.E, np.int64), 0, -np.ones(spec.L)
        tolerance, doubt, normal_CE, numbers = 0.0, 0.0, np.zeros((0, spec.E)), (0.0, 0.0, 0.0)
        if active:
            params = runtime.params
            gpu_E, _, extra = static_layout(runtime.budget, spec, gpus)
            rates = elastic.rates_of(runtime.costs)
            tolerance, doubt, numbers = float(params.keep), float(params.decode_doubt), (rates.a, rates.b, rates.c)
            # shares fixed ahead may pay where dispatch does not: no bound on what dispatch saves keeps a layer static
            if not ahead:
                skip = np.array([elastic.skip_seconds(runtime.costs, layer, params) for layer in range(spec.L)])
            normal_CE = elastic._normal_CE(params.seed, params.scenarios, spec.E)
        self.gpu_E = gpu_E
        self.terms = KeepTerms(
            active,
            np.zeros((spec.L, spec.E)),
            np.zeros(spec.L, np.bool_),
            tolerance,
            np.ascontiguousarray(normal_CE),
            doubt,
            np.ascontiguousarray(gpu_E),
            gpus,
            int(extra),
            *numbers,
            skip,
        )

    @property
    def active(self) -> bool:
        """Whether any plan may be kept unasked."""
        return self.terms.active

    def kept(self, weight_LE: FloatArray, assignments: float) -> BoolArray:
        """Layers whose plan the next iteration leaves as it is, ``[L]``."""
        kept_L = np.zeros(len(self.terms.plain_L), np.bool_)
        if self.active:
            kept_layers(weight_LE, float(assignments), self.terms, kept_L)
        return kept_L

    def note(self, layer: int, mean_E: FloatArray, plan: LayerPlan) -> None:
        """A plan was made for this forecast."""
        self.terms.planned_LE[layer] = mean_E
        static = plan.num_extra == 0 and bool((plan.gpu_R == self.gpu_E[plan.expert_R]).all())
        self.terms.plain_L[layer] = static

    def forget(self) -> None:
        """Plans were changed for another reason than a forecast."""
        self.terms.planned_LE[:] = 0.0
        self.terms.plain_L[:] = False

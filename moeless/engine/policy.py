"""A policy for a live model: its predictor may be made from the model's gates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeless.cluster import Cluster
from moeless.contracts import Policy
from moeless.costs import COSTS
from moeless.policy import ResolvedPolicy, resolve
from moeless.policy.predictors import LivePredictors
from moeless.spec import MoESpec


def resolve_live(
    text: str,
    *,
    spec: MoESpec,
    cluster: Cluster,
    costs: str,
    extra_slots: int,
    model: Path,
    predictors: tuple[Path, ...] = (),
    params: Mapping[str, Any] | None = None,
) -> ResolvedPolicy:
    """Find the parts of ``planner[:predictor[:distance]]``; a live engine has as many slots in every layer.

    Raises:
        UserError: a name is unknown, or the predictor cannot run live.
    """
    return resolve(
        Policy.parse(text),
        spec=spec,
        cluster=cluster,
        costs=COSTS.get(costs)(spec, cluster),
        extra_slots=extra_slots,
        predictors=LivePredictors(spec, predictors, model),
        params=params,
        even_layers=True,
    )

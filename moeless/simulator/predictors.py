"""The predictors that policies name, made or loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeless.contracts import Policy
from moeless.errors import UserError
from moeless.placement import PLANNERS
from moeless.simulator.runtime import ORACLE
from moeless.spec import MoESpec


def wanted_predictors(policies: Sequence[Policy]) -> list[str]:
    """Names of the predictors that are asked for layer by layer, each once, in order."""
    names: list[str] = []
    for policy in policies:
        if policy.planner == ORACLE:
            continue
        planner = PLANNERS.get(policy.planner)
        if planner.needs_forecast and planner.cadence == "iteration":
            name = planner.default_predictor if policy.predictor == "none" else policy.predictor
            if name not in names:
                names.append(name)
    return names


def load_predictors(
    policies: Sequence[Policy], folders: Sequence[Path], spec: MoESpec, has_router_inputs: bool
) -> dict[str, Any]:
    """Predictors by name: fitted ones from their folders, the others as their registry makes them.

    Raises:
        UserError: a folder is no predictor of this model, a name is unknown or needs fitting first, or a predictor
            reads gate inputs that the trace does not hold.
    """
    names = wanted_predictors(policies)
    if not names:
        return {}
    from moeless.predictors import PREDICTORS
    from moeless.predictors.base import load_predictor

    fitted = {}
    for folder in folders:
        loaded = load_predictor(folder)
        loaded.check_spec(spec, "the trace")
        fitted[loaded.name] = loaded
    made: dict[str, Any] = {}
    for name in names:
        made[name] = fitted[name] if name in fitted else _unfitted(PREDICTORS.get(name), spec)
        if made[name].reads == "router_inputs" and not has_router_inputs:
            raise UserError(
                f"predictor {name!r} reads gate inputs, which the trace does not hold; record it with "
                "`moeless trace --router-inputs`, or use history"
            )
    return made


def _unfitted(kind: Any, spec: MoESpec) -> Any:
    try:
        return kind(spec)
    except TypeError:
        raise UserError(
            f"predictor {kind.name!r} has to be fitted first: run `moeless train-predictor` and give --predictor DIR"
        ) from None

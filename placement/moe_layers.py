"""Absolute indices of the layers that a plan is about."""

from __future__ import annotations

from moeless.contracts import ModelPlan
from moeless.errors import UserError
from moeless.spec import PRESETS, preset


def layers_of(plan: ModelPlan, model: str | None = None) -> tuple[tuple[int, ...], int]:
    """MoE layer indices and the number of all layers.

    From the named preset, else from what the plan's notes record, else from the preset of the plan's model.

    Raises:
        UserError: none of these is known, or it does not match the plan.
    """
    recorded = plan.notes.get("moe_layers"), plan.notes.get("num_layers")
    if model is None and isinstance(recorded[0], list) and isinstance(recorded[1], int):
        layers, total = tuple(int(layer) for layer in recorded[0]), recorded[1]
    else:
        name = model or plan.model
        if model is None and name not in PRESETS:
            raise UserError(
                f"the plan does not say which layers of {name!r} are MoE layers; name a preset with --model"
            )
        spec = preset(name)
        if spec.num_experts != plan.num_experts:
            raise UserError(f"{spec.name} has {spec.num_experts} experts, the plan is for {plan.num_experts}")
        layers, total = spec.moe_layers, spec.num_layers
    if len(layers) != len(plan.layers):
        raise UserError(f"the model has {len(layers)} MoE layers, the plan has {len(plan.layers)}")
    return layers, total

"""Model plans in the forms that serving engines read, checked against each engine's rules.

SGLang ``--init-expert-location`` (a JSON file), TensorRT-LLM's EPLB configuration (YAML), and the arrays of vLLM's
and DeepSeek's EPLB (``phy2log``, ``log2phy``, ``logcnt``). All number slots GPU by GPU and need as many on each, and
none has a place for shares: these engines split an expert's tokens evenly over its copies, or by rules of their own.

Axes: L MoE layers, E experts, P slots of a layer, X copies of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeless.contracts import IntArray, ModelPlan
from moeless.errors import UserError
from moeless.files import write_atomic, write_json, write_text

ENGINES = ("sglang", "tensorrt-llm", "vllm")


@dataclass(frozen=True)
class SlotTable:
    """Experts by slot: ``expert_LP``, slot p on GPU ``p // (P / G)``; ``filled`` slots repeat an expert."""

    expert_LP: IntArray
    num_gpus: int
    filled: int


def slot_table(plan: ModelPlan, *, fill: bool = False) -> SlotTable:
    """A plan as equal rows of slots.

    Engines need as many slots on every GPU and in every layer. ``fill`` evens a plan out by repeating experts that
    a GPU already holds, which costs memory and changes no placement.

    Raises:
        UserError: the plan has unequal slots and ``fill`` is off, or a GPU has none to repeat.
    """
    slots_LG = np.array([layer.slots_G(plan.num_gpus) for layer in plan.layers])
    most = int(slots_LG.max())
    if (slots_LG != most).any() and not fill:
        where, gpu = (int(i) for i in np.argwhere(slots_LG != most)[0])
        raise UserError(
            f"the plan holds {int(slots_LG[where, gpu])} replicas on GPU {gpu} in layer {where} and up to {most} "
            f"elsewhere, engines need as many slots on every GPU and in every layer: plan with eplb, or fill empty "
            f"slots with copies (--fill)"
        )
    expert_LP = np.empty((len(plan.layers), plan.num_gpus * most), np.int64)
    for row, layer in zip(expert_LP, plan.layers, strict=True):
        for gpu in range(plan.num_gpus):
            held = layer.expert_R[layer.gpu_R == gpu]
            if not len(held):
                raise UserError(f"GPU {gpu} holds no expert in layer {layer.layer}, engines need one at least")
            row[gpu * most : (gpu + 1) * most] = np.resize(held, most)
    return SlotTable(expert_LP, plan.num_gpus, int(expert_LP.size - slots_LG.sum()))


def check_shares(plan: ModelPlan) -> None:
    """Refuse a plan whose copies are to serve unequal parts of their experts, which no engine's file can say.

    Raises:
        UserError: a layer fixes shares that are not equal.
    """
    unequal = []
    for layer in plan.layers:
        if layer.share_R is not None:
            even_R = 1.0 / layer.replicas_E(plan.num_experts)[layer.expert_R]
            if not np.allclose(layer.share_R, even_R, atol=0.01):
                unequal.append(layer.layer)
    if unequal:
        raise UserError(
            f"the plan fixes unequal shares of an expert's copies in {len(unequal)} of {len(plan.layers)} layers "
            f"(first in layer {unequal[0]}), and these engines split evenly: plan with elastic or eplb, or give the "
            "engine the placement alone (--equal-shares)"
        )


def log2phy(table: SlotTable, num_experts: int) -> tuple[IntArray, IntArray]:
    """Slots of each expert ``[L, E, X]`` (-1 pads) and copies of each ``[L, E]``."""
    logcnt = np.stack([np.bincount(row, minlength=num_experts) for row in table.expert_LP]).astype(np.int64)
    found = np.full((*logcnt.shape, int(logcnt.max())), -1, np.int64)
    for layer, row in enumerate(table.expert_LP):
        seen = np.zeros(num_experts, np.int64)
        for slot, expert in enumerate(row.tolist()):
            found[layer, expert, seen[expert]] = slot
            seen[expert] += 1
    return found, logcnt


def _check_layers(plan: ModelPlan, moe_layers: Sequence[int], num_layers: int) -> None:
    if len(moe_layers) != len(plan.layers):
        raise UserError(f"{plan.model} has {len(moe_layers)} MoE layers, the plan has {len(plan.layers)}")
    if list(moe_layers) != sorted(set(moe_layers)) or moe_layers[0] < 0 or moe_layers[-1] >= num_layers:
        raise UserError(f"MoE layers must ascend and lie below {num_layers}")


def to_sglang(plan: ModelPlan, table: SlotTable, moe_layers: Sequence[int], num_layers: int) -> dict[str, Any]:
    """``physical_to_logical_map`` ``[layers, P]`` as the only key, with a row for each dense layer too.

    Raises:
        UserError: the plan does not cover the model's MoE layers.
    """
    _check_layers(plan, moe_layers, num_layers)
    # the rows of dense layers are never read but must name every expert
    rows = [[slot % plan.num_experts for slot in range(table.expert_LP.shape[1])] for _ in range(num_layers)]
    for layer, experts in zip(moe_layers, table.expert_LP, strict=True):
        rows[layer] = experts.tolist()
    return {"physical_to_logical_map": rows}


def to_tensorrt_llm(plan: ModelPlan, table: SlotTable, moe_layers: Sequence[int], num_layers: int) -> str:
    """EPLB configuration in YAML: ``num_slots``, ``layer_updates_per_iter`` 0, assignments by absolute layer.

    Raises:
        UserError: the plan does not cover the model's MoE layers.
    """
    _check_layers(plan, moe_layers, num_layers)
    lines = [f"num_slots: {table.expert_LP.shape[1]}", "layer_updates_per_iter: 0", "initial_global_assignments:"]
    lines += [
        f"  {layer}: [{', '.join(map(str, experts.tolist()))}]"
        for layer, experts in zip(moe_layers, table.expert_LP, strict=True)
    ]
    return "\n".join(lines) + "\n"


def to_arrays(plan: ModelPlan, table: SlotTable) -> dict[str, IntArray]:
    """DeepSeek's and vLLM's arrays, MoE layers only."""
    slots, counts = log2phy(table, plan.num_experts)
    return {"phy2log": table.expert_LP, "log2phy": slots, "logcnt": counts}


def check_sglang(data: Any, num_experts: int, num_layers: int, ep_size: int) -> None:
    """What SGLang enforces, and what it does not but breaks by.

    Raises:
        UserError: a rule is broken.
    """
    if not isinstance(data, dict) or set(data) != {"physical_to_logical_map"}:
        raise UserError("SGLang's expert location must hold physical_to_logical_map and nothing else")
    rows = data["physical_to_logical_map"]
    if len(rows) != num_layers:
        raise UserError(f"SGLang needs a row for each of {num_layers} layers, dense ones too, got {len(rows)}")
    _check_rows(dict(enumerate(rows)), num_experts, ep_size)


def check_tensorrt_llm(data: Any, num_experts: int, moe_layers: Sequence[int], ep_size: int) -> None:
    """What TensorRT-LLM's loader demands of the parsed YAML.

    Raises:
        UserError: a rule is broken.
    """
    keys = {"num_slots", "layer_updates_per_iter", "initial_global_assignments"}
    if not isinstance(data, dict) or set(data) != keys:
        raise UserError(f"TensorRT-LLM's EPLB file must hold exactly {', '.join(sorted(keys))}")
    rows = data["initial_global_assignments"]
    if list(rows) != list(moe_layers):
        raise UserError("TensorRT-LLM needs an assignment for every MoE layer, by its absolute index")
    _check_rows(rows, num_experts, ep_size)
    if any(len(row) != data["num_slots"] for row in rows.values()):
        raise UserError(f"TensorRT-LLM: every assignment must have num_slots = {data['num_slots']} entries")


def _check_rows(rows: dict[int, list[int]], num_experts: int, ep_size: int) -> None:
    widths = {len(row) for row in rows.values()}
    if len(widths) != 1 or next(iter(widths)) % ep_size:
        raise UserError(f"every layer must have the same number of slots, a multiple of {ep_size} GPUs")
    for layer, row in rows.items():
        if set(row) != set(range(num_experts)):
            raise UserError(f"layer {layer}: the slots must hold each of {num_experts} experts, and nothing else")


def write_export(
    plan: ModelPlan,
    engine: str,
    out: Path,
    *,
    moe_layers: Sequence[int],
    num_layers: int,
    fill: bool = False,
    equal_shares: bool = False,
) -> SlotTable:
    """Write a plan for an engine and check what was written; arrays go to an ``.npz`` or a ``.json``.

    ``equal_shares`` lets the engine split evenly where the plan fixes shares.

    Raises:
        UserError: the engine is unknown, the plan cannot be expressed, or the file's ending is not the engine's.
    """
    if engine not in ENGINES:
        raise UserError(f"no engine is called {engine!r}; there are: {', '.join(ENGINES)}")
    endings = {"sglang": (".json",), "tensorrt-llm": (".yaml", ".yml"), "vllm": (".npz", ".json")}[engine]
    if out.suffix not in endings:
        raise UserError(f"{engine} plans are written to {' or '.join(endings)} files, not to {out.name!r}")
    if not equal_shares:
        check_shares(plan)
    table = slot_table(plan, fill=fill)
    if engine == "sglang":
        data = to_sglang(plan, table, moe_layers, num_layers)
        check_sglang(data, plan.num_experts, num_layers, plan.num_gpus)
        write_json(out, data)
    elif engine == "tensorrt-llm":
        import yaml

        text = to_tensorrt_llm(plan, table, moe_layers, num_layers)
        check_tensorrt_llm(yaml.safe_load(text), plan.num_experts, moe_layers, plan.num_gpus)
        write_text(out, text)
    else:
        arrays = to_arrays(plan, table)
        if out.suffix == ".json":
            write_json(out, {name: array.tolist() for name, array in arrays.items()})
        else:

            def write(partial: Path) -> None:
                with partial.open("wb") as handle:
                    np.savez_compressed(handle, **arrays)  # type: ignore[arg-type]

            write_atomic(out, write)
    return table

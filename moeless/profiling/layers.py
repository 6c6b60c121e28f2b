"""The engine's own MoE layer among ranks, beside the sum of its parts.

Parts timed in a loop of their own find warm caches and ranks that are awake; in a layer they do not, and there is
Python between them. So forked ranks run the engine's layers, with attention and router of the model's shapes between
them and the head after them, on made-up routing; medians of what a layer takes beyond its parts go into the profile,
over a rank's tokens.

Run as a program of its own, for ranks are forked from a process that has computed nothing:
``python -m moeless.profiling.layers RANKS SPEC.json OUT.npz [--quick]``.

Axes: N layers measured, S source ranks, E experts, T tokens of a rank, H hidden, K top-k.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional

from moeless.allocator import keep_freed_memory
from moeless.cluster import Cluster, cluster
from moeless.contracts import Phase
from moeless.costs.measured import MeasuredCosts
from moeless.costs.profile_reader import parse_profile
from moeless.engine import groups, room
from moeless.engine.controller import Controller, ControlSettings
from moeless.engine.elastic import PARTS, ElasticExperts
from moeless.engine.exchange import Exchange
from moeless.engine.ffn import GatedFFN, silu_gate
from moeless.engine.flat import FlatSpan, KVCache, attend
from moeless.engine.hostmem import shared_experts
from moeless.engine.launch import ForkedRanks
from moeless.engine.policy import resolve_live
from moeless.engine.store import ReplicaStore
from moeless.placement.static import static_plan
from moeless.profiling.monotone import monotone_curve
from moeless.profiling.parts import AttentionBlock, route
from moeless.profiling.ranks import run_program
from moeless.spec import MoESpec

#: Tokens of each rank.
TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256, 512, 1024)
#: Times that all numbers of tokens are gone through, for a machine's speed changes from second to second, and walks
#: through the layers in each of them, the fewest for the largest numbers of tokens.
ROUNDS, WALKS = 6, (4, 1)
QUICK_ROUNDS, QUICK_WALKS = 1, (3, 2)
#: Weights of the layers that are gone through; a model of which not even one fits is not measured so.
LAYER_BYTES = 2**30
#: Weights of the head, at most: enough to drive a layer's out of any cache.
HEAD_BYTES = 2**27
#: Up to so many tokens of a rank are decoding requests with so many positions behind them; more are prompts of so many.
DECODING, CONTEXT, PROMPT = 32, 128, 128
TIMEOUT_SECONDS = 240


def layer_fits(spec: MoESpec) -> bool:
    """Whether a layer's experts are few enough bytes to be held by forked ranks."""
    return spec.E * spec.expert_params * 4 <= LAYER_BYTES


def measure_layers(spec: MoESpec, ranks: int, quick: bool) -> dict[str, np.ndarray]:
    """Loads and seconds of layers, as :func:`_rank_main` leaves them.

    Raises:
        RunFailed: the ranks ended without a result.
    """
    with tempfile.TemporaryDirectory(prefix="moeless-layers-") as folder:
        out, shapes = Path(folder) / "layers.npz", Path(folder) / "spec.json"
        shapes.write_text(json.dumps(spec.to_json()), encoding="utf-8")
        arguments, what = [str(ranks), str(shapes), str(out)], f"the engine's layer among {ranks} ranks"
        run_program("moeless.profiling.layers", arguments, out, quick=quick, what=what)
        with np.load(out) as arrays:
            return dict(arrays)


def beyond_parts(document: Mapping[str, Any], spec: MoESpec, layers: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """An exchange's ``engine`` entry: per number of tokens, the median of what layers took beyond the profile's parts.

    Args:
        document: the profile without that entry.
        layers: from :func:`measure_layers`.
    """
    load_NSE = layers["load_NSE"]
    costs = MeasuredCosts(spec, _machine(load_NSE.shape[1]), parse_profile(document, "just measured"))
    plan = static_plan(0, spec.E, load_NSE.shape[1])
    parts = [costs.layer_seconds(np.ascontiguousarray(load_SE[:, plan.expert_R]), plan) for load_SE in load_NSE]
    expert_N = layers["expert_N"] - np.array([part.expert for part in parts])
    rest_N = layers["layer_N"] - layers["expert_N"] - np.array([part.all_to_all for part in parts])
    tokens = np.unique(layers["tokens_N"])

    def middle(values_N: np.ndarray) -> list[float]:
        return [float(np.median(values_N[layers["tokens_N"] == count])) for count in tokens]

    def curve(beyond_N: np.ndarray) -> list[float]:
        # parts may be dearer alone than together; a curve is of positive times
        return monotone_curve(np.maximum(middle(beyond_N), 1e-6)).tolist()

    return {
        "tokens": tokens.tolist(),
        "expert_seconds": curve(expert_N),
        "rest_seconds": curve(rest_N),
        "layer": middle(layers["layer_N"]),
        "layer_expert": middle(layers["expert_N"]),
        "layers": len(load_NSE),
    }


def _machine(ranks: int) -> Cluster:
    return cluster("cpu2" if ranks <= 2 else "cpu8").with_gpus(ranks)


def _rank_main(rank: int, ranks: int, spec: MoESpec, out: Path, quick: bool, meeting: groups.Meeting) -> None:
    """Run the layers; rank 0 writes loads ``load_NSE``, ``tokens_N``, and seconds ``layer_N`` and ``expert_N``."""
    torch.manual_seed(0)
    keep_freed_memory()
    at = groups.join(rank, ranks, meeting=meeting, timeout_seconds=float(TIMEOUT_SECONDS))
    exchange = Exchange(at)
    depth = int(np.clip(LAYER_BYTES // (spec.E * spec.expert_params * 4), 1, spec.L))
    spec = dataclasses.replace(spec, num_layers=depth, moe_layers=tuple(range(depth)))
    width = spec.expert_intermediate_size
    gated = spec.expert_matrices == 3
    shapes = {"up": (width * (2 if gated else 1), spec.hidden_size), "down": (spec.hidden_size, width)}
    ffn = GatedFFN(shapes, torch.float32, silu_gate if gated else functional.gelu)
    size = spec.L * spec.E * sum(math.prod(shape) for shape in shapes.values()) * 4
    # a file on a disk would be written back while layers are timed
    folder, _ = room.place(room.Needs(size, size, ranks), room.look())
    weights = shared_experts(folder, spec.L, spec.E, shapes, torch.float32, exchange)
    for layer in range(rank, spec.L, ranks):
        for expert in range(spec.E):
            weights.fill(
                layer, expert, {name: torch.randn(shape) * shape[-1] ** -0.5 for name, shape in shapes.items()}
            )
    exchange.barrier()
    machine = _machine(ranks)
    policy = resolve_live("static", spec=spec, cluster=machine, costs="roofline", extra_slots=0, model=Path())
    store = ReplicaStore(
        weights, spec.L, int(policy.budget.slots_G.max()), at.device, torch.float32, rank=rank, group=at.moves
    )
    experts = ElasticExperts(Controller(policy, exchange, store, ControlSettings()), ffn)
    found: list[tuple[int, np.ndarray, float, float]] = []
    with torch.inference_mode():
        model = _Around(spec, at.device)
        many, few = QUICK_WALKS if quick else WALKS
        for _ in range(QUICK_ROUNDS if quick else ROUNDS):
            for count in TOKENS[:: 3 if quick else 1]:
                for walk in range((many if count <= TOKENS[-6] else few) + 1):
                    layers = _walk(experts, model, spec, count)
                    # the first one finds nothing in place
                    found += layers if walk else []
    experts.controller.close()
    store.close()
    if rank == 0:
        tokens, loads, seconds, computing = zip(*found, strict=True)
        arrays = {"tokens_N": np.array(tokens), "load_NSE": np.stack(loads)}
        np.savez(out, **arrays, layer_N=np.array(seconds), expert_N=np.array(computing))  # type: ignore[arg-type]
    exchange.barrier()
    groups.leave()


class _Around:
    """Random weights of what lies around the experts: each layer's own attention and gate, and the head."""

    def __init__(self, spec: MoESpec, device: torch.device) -> None:
        self.attention_L = [AttentionBlock(spec, torch.float32, device) for _ in range(spec.L)]
        self.gate_LEH = torch.randn(spec.L, spec.E, spec.hidden_size) * spec.hidden_size**-0.5
        rows = min(spec.vocab_size, HEAD_BYTES // (4 * spec.hidden_size))
        self.head_VH = torch.randn(rows, spec.hidden_size) * spec.hidden_size**-0.5


def _walk(
    experts: ElasticExperts, model: _Around, spec: MoESpec, count: int
) -> list[tuple[int, np.ndarray, float, float]]:
    """One iteration of ``count`` tokens a rank: tokens, loads ``[S, E]``, seconds of each layer and of its experts."""
    controller = experts.controller
    hidden_TH = torch.randn(count, spec.hidden_size)
    controller.begin(Phase.MIXED, count * controller.world, 0.0)
    experts.rows.clear()
    attended, chosen = _attention(model.attention_L, count), []
    for layer in range(spec.L):
        hidden_TH = hidden_TH + attended(layer, _norm(hidden_TH))
        normal_TH = _norm(hidden_TH)
        topk_TK, weights_TK = route(normal_TH, model.gate_LEH[layer], spec.K)
        hidden_TH = hidden_TH + experts(layer, normal_TH, topk_TK, weights_TK)
        chosen.append(np.bincount(topk_TK.numpy().reshape(-1), minlength=spec.E))
    # one answer's logits for each request, as many as decode
    functional.linear(_norm(hidden_TH[:DECODING]), model.head_VH).argmax(-1)
    rows = torch.tensor([row[: len(PARTS)] for row in experts.rows], dtype=torch.float64)
    words = torch.cat([torch.tensor(np.array(chosen), dtype=torch.float64), rows], 1)
    every = [torch.empty_like(words) for _ in range(controller.world)]
    dist.all_gather(every, words)
    all_SLX = torch.stack(every).numpy()
    part = {name: all_SLX[..., spec.E + at] for at, name in enumerate(PARTS)}
    # from when the last rank came, as live layers are timed
    late = part["gather"] - part["gather"].min(0)
    seconds, computing = (part["total"] - late).max(0), part["compute"].max(0)
    loads = all_SLX[..., : spec.E].astype(np.int64)
    return [(count, loads[:, at], float(seconds[at]), float(computing[at])) for at in range(spec.L)]


def _norm(values: torch.Tensor) -> torch.Tensor:
    """RMS norm in the single steps that Transformers takes."""
    single = values.to(torch.float32)
    return (single * torch.rsqrt(single.pow(2).mean(-1, keepdim=True) + 1e-6)).to(values.dtype)


def _rotated(values_THD: torch.Tensor, angle_TD: torch.Tensor) -> torch.Tensor:
    """Rotary positions."""
    left, right = values_THD.chunk(2, -1)
    cos, sin = angle_TD.cos()[:, None], angle_TD.sin()[:, None]
    return values_THD * cos + torch.cat([-right, left], -1) * sin


def _attention(block_L: Sequence[AttentionBlock], count: int) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """The engine's own attention over a rank's requests, from a layer's normal input to its output."""
    start, each = (CONTEXT, 1) if count <= DECODING else (0, PROMPT)
    spans = [FlatSpan(at, start, start + min(each, count - at), start + each) for at in range(0, count, each)]
    cache = KVCache()

    def run(layer: int, normal_TH: torch.Tensor) -> torch.Tensor:
        block = block_L[layer]
        query_THD, key_TGD, value_TGD = block.project(normal_TH)
        angle_TD = torch.arange(count)[:, None] * torch.ones(query_THD.shape[-1])
        query_THD, key_TGD = (_rotated(_norm(part), angle_TD) for part in (query_THD, key_TGD))
        if start:
            for span in spans:
                before = dataclasses.replace(span, start=0, stop=start)
                cache.append(
                    layer,
                    before,
                    key_TGD.new_zeros((start, *key_TGD.shape[1:])),
                    value_TGD.new_zeros((start, *value_TGD.shape[1:])),
                )
        scale = query_THD.shape[-1] ** -0.5
        mixed = attend(layer, cache, spans, query_THD, key_TGD, value_TGD, scale=scale)
        return functional.linear(mixed.reshape(len(normal_TH), -1), block.out)

    return run


def main(arguments: list[str]) -> int:
    """Fork the ranks and wait for them."""
    ranks, out = int(arguments[0]), Path(arguments[2])
    spec = MoESpec.from_json(json.loads(Path(arguments[1]).read_text(encoding="utf-8")))
    torch.set_num_threads(1)
    with groups.Meeting() as meeting:
        ForkedRanks(lambda rank: _rank_main(rank, ranks, spec, out, "--quick" in arguments, meeting), ranks).wait()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

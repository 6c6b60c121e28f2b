"""Each policy's wall-clock time against static EP on two ranks, conclusively: paired, interleaved, with its noise.

Two ranks with one thread each, every rank on a core of its own: the only CPU setting in which wall time says something
about balance. All policies serve the same batches in turn, in an order that changes with every batch, so that a
disturbance of the machine hits them alike; a ratio is the median over batches of policy / static, with a bootstrap 90 %
interval. ``undisturbed`` compares the tenth percentiles of both policies' times, ``own ratio`` the processor time of
experts on the slowest rank, which says the same on a busy machine. ``static again`` is a second static policy: how far
its ratio lies from 1 is the noise. ``elastic, no extras`` pays for elastic control and dispatch without having a copy
to use: the dispatch overhead.

    python benchmarks/bench_live.py [--batches N] [--tokens N] [--out JSON]

Workloads: the bundled model on prompts of one domain (real routing), and a wide random Mixtral-type model whose router
favours one rank's experts (synthetic), in which expert compute outweighs the exchange.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from moeless.cluster import cluster
from moeless.contracts import Phase
from moeless.engine import groups
from moeless.engine.controller import Controller, ControlSettings
from moeless.engine.elastic import COLUMNS, ElasticExperts, columns
from moeless.engine.exchange import Exchange
from moeless.engine.flat import FlatBatch, FlatSpan
from moeless.engine.hostmem import HostExperts
from moeless.engine.hosts import load_host
from moeless.engine.launch import run_forked
from moeless.engine.policy import resolve_live
from moeless.engine.store import ReplicaStore
from moeless.machine import cores
from moeless.predictors.gates import checkpoint_folder
from moeless.spec import MoESpec
from moeless.traces.specs import resolve_spec
from moeless.workloads import prompts

RANKS, WARMUP = 2, 6


@dataclass(frozen=True)
class Entry:
    """A row of the table: its name, a policy, and the extra slots that it gets."""

    name: str
    policy: str
    extra_slots: int = 1


ENTRIES = (
    Entry("static", "static"),
    Entry("static again", "static"),
    Entry("elastic, no extras", "elastic:history", 0),
    Entry("eplb:history", "eplb:history"),
    Entry("moeless:history", "moeless:history"),
    Entry("elastic:history", "elastic:history"),
    Entry("oracle (lossy)", "oracle"),
)


def wide_model(folder: Path) -> Path:
    """A random model with experts of 6.3 MB each, and a router that favours the first four of sixteen."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_local_experts=16,
        num_experts_per_tok=2,
    )
    model = transformers.MixtralForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[:4] *= 4.0
    model.save_pretrained(folder)
    return folder


def batches(model: Path, spec: MoESpec, domain: str | None, tokens: int, count: int) -> list[list[list[int]]]:
    """Per batch and rank, ``tokens`` token ids: one prompt after the other of a domain, or random ones."""
    random = np.random.default_rng(0)
    if domain is None:
        return random.integers(0, spec.vocab_size, (count, RANKS, tokens)).tolist()  # type: ignore[no-any-return]
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model)
    texts = [p.text for p in prompts.load(None, max_requests=10_000, seed=0) if p.category == domain]
    stream = [token for text in texts for token in tokenizer(text)["input_ids"]]
    starts = random.integers(0, max(1, len(stream) - tokens), (count, RANKS))
    return [[(stream * 2)[a : a + tokens] for a in row] for row in starts.tolist()]


def serve(
    rank: int, model: Path, spec: MoESpec, work: list[list[list[int]]], folder: Path, meeting: groups.Meeting
) -> None:
    """One rank: every batch under every entry, in turning order; leaves its seconds in ``folder``."""
    ranks = groups.join(rank, RANKS, meeting=meeting)
    exchange = Exchange(ranks)
    host = load_host("transformers", model, spec=spec, device=ranks.device, dtype=torch.float32)
    experts = HostExperts(folder / "experts", spec.L, spec.E, host.ffn.shapes, torch.float32)
    for layer in range(spec.L):
        for expert in range(rank, spec.E, RANKS):
            experts.fill(layer, expert, host.read_expert(layer, expert))
    exchange.barrier()
    layers = []
    for entry in ENTRIES:
        policy = resolve_live(
            entry.policy,
            spec=spec,
            cluster=cluster("cpu2"),
            costs="roofline",
            extra_slots=entry.extra_slots,
            model=model,
        )
        policy.warm_up()
        slots = int(policy.budget.slots_G.max()) + 1
        # host memory only: the stores' threads would share the group of peers
        store = ReplicaStore(experts, spec.L, slots, ranks.device, torch.float32, rank=rank)
        layers.append(ElasticExperts(Controller(policy, exchange, store, ControlSettings(5.0)), host.ffn))
    step_BP, rows = np.empty((len(work), len(ENTRIES))), [[] for _ in ENTRIES]  # type: list[list[Any]]
    for index, tokens_of_rank in enumerate(work):
        tokens = torch.tensor(tokens_of_rank[rank])
        span = FlatSpan(0, 0, len(tokens), len(tokens))
        batch = FlatBatch((span,), tokens, torch.arange(len(tokens)), torch.tensor([len(tokens) - 1]))
        for turn in range(len(ENTRIES)):
            at = (index + turn) % len(ENTRIES)
            layer = host.moe = layers[at]
            layer.rows.clear()
            layer.first_token = rank * len(tokens)
            layer.controller.begin(Phase.PREFILL, RANKS * len(tokens), float(index))
            host.cache.clear()
            exchange.barrier()
            began = time.perf_counter()
            host.step(batch)
            exchange.barrier()
            step_BP[index, at] = time.perf_counter() - began
            rows[at].append(columns(layer.rows, spec.L)[0])
    np.savez(folder / f"rank-{rank}.npz", step_BP=step_BP, rows_PBLC=np.array(rows))


def interval(ratio_B: Any, seed: int = 0) -> tuple[float, float, float]:
    """Median, and its bootstrap 90 % interval."""
    drawn = np.random.default_rng(seed).choice(ratio_B, (2000, len(ratio_B)))
    low, high = np.quantile(np.median(drawn, 1), [0.05, 0.95])
    return float(np.median(ratio_B)), float(low), float(high)


def measure(name: str, model: Path, domain: str | None, tokens: int, count: int) -> dict[str, Any]:
    """One workload's table, printed and returned."""
    spec = dataclasses.replace(resolve_spec(str(model)), dtype="float32", expert_dtype="float32")
    work = batches(model, spec, domain, tokens, count + WARMUP)
    with tempfile.TemporaryDirectory() as scratch, groups.Meeting() as meeting:
        run_forked(lambda rank: serve(rank, model, spec, work, Path(scratch), meeting), RANKS)
        found = [np.load(Path(scratch) / f"rank-{rank}.npz") for rank in range(RANKS)]
        rows_SPBLC = np.stack([f["rows_PBLC"] for f in found])[:, :, WARMUP:]
        step_PB = np.stack([f["step_BP"] for f in found]).max(0)[WARMUP:].T
    column = {part: rows_SPBLC[..., COLUMNS.index(part)] for part in COLUMNS}
    moe_PB = column["total"].max(0).sum(-1)
    expert_PB = column["compute"].max(0).sum(-1)
    static_ms = 1e3 * float(moe_PB[0].mean())
    print(f"\n{name}: {count} batches of {RANKS} x {tokens} tokens, {spec.L} layers, static {static_ms:.1f} ms")
    print(
        f"{'policy':20s} {'MoE time / static':>24s} {'step / static':>24s} "
        "undisturbed imbal  copies  expert  own ratio control  wait ms"
    )
    table = []
    for index, entry in enumerate(ENTRIES):
        moe, step = (interval(x[index] / x[0]) for x in (moe_PB, step_PB))
        tokens_SBL = column["tokens"][:, index]
        line = {
            "policy": entry.name,
            "moe_ratio": moe,
            "step_ratio": step,
            # what other programs do to this machine lengthens times, never shortens them
            "undisturbed_ratio": float(np.quantile(moe_PB[index], 0.1) / np.quantile(moe_PB[0], 0.1)),
            "expert_ratio": float(expert_PB[index].sum() / expert_PB[0].sum()),
            "imbalance": float((tokens_SBL.max(0) / tokens_SBL.mean(0)).mean()),
            "copies": float(column["replicas"][0, index].mean()),
            "expert_ms": 1e3 * float(column["compute"][:, index].max(0).mean()),
            "control_ms": 1e3 * float(column["control"][:, index].max(0).mean()),
            "plan_wait_ms": 1e3 * float(column["plan_wait"][:, index].max(0).mean()),
        }
        table.append(line)
        shown = (f"{x[0]:.3f} [{x[1]:.3f}, {x[2]:.3f}]" for x in (moe, step))
        print(
            f"{entry.name:20s} {next(shown):>24s} {next(shown):>24s} {line['undisturbed_ratio']:11.3f} "
            f"{line['imbalance']:5.3f} {line['copies']:7.2f} {line['expert_ms']:7.3f} {line['expert_ratio']:10.3f} "
            f"{line['control_ms']:7.3f} {line['plan_wait_ms']:8.3f}"
        )
    return {
        "workload": name,
        "batches": count,
        "tokens": tokens,
        "static_moe_ms": 1e3 * moe_PB[0].mean(),
        "rows": table,
    }


def main() -> None:
    """Both workloads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--domain", default="code")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {cores()} cores, 2 ranks, one thread each")
    with tempfile.TemporaryDirectory() as scratch:
        tables = [
            measure(
                f"bundled model, {given.domain} prompts",
                checkpoint_folder("bundled"),
                given.domain,
                given.tokens,
                given.batches,
            ),
            measure("wide random model (synthetic)", wide_model(Path(scratch)), None, given.tokens, given.batches),
        ]
    if given.out:
        given.out.write_text(json.dumps(tables, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

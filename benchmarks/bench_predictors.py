"""How long fitting and forecasting take at Mixtral-8x7B's size, on made gate inputs.

Every pair misses the threshold and is fine-tuned, which is the longest a fit can take. Prints seconds to fit, against
the paper's under 5 minutes on one GPU, and microseconds of one layer's forecast, against its under 0.2 ms.

Example: python benchmarks/bench_predictors.py --tokens 50000 --device cuda
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from moeless.allocator import keep_freed_memory
from moeless.predictors.evaluation import predict_microseconds
from moeless.predictors.fitting import FitInput
from moeless.predictors.gates import Gates
from moeless.predictors.layer_aware import LayerAware
from moeless.predictors.request_split import split_requests
from moeless.predictors.router import RouterRule
from moeless.predictors.trace_rows import Rows
from moeless.spec import MoESpec, preset

#: Different rows of made inputs; a larger trace repeats them, which changes no time.
POOL = 1024
REQUEST = 128


class MadeTrace:
    """Looks like a trace of gate inputs; a full one would be 13 GiB."""

    def __init__(self, spec: MoESpec, tokens: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.spec, self.num_rows, self.path, self.has_router_inputs = spec, tokens, Path("made inputs"), True
        self.requests = SimpleNamespace(first_row=np.arange(0, tokens, REQUEST))
        self.phase_T = np.zeros(tokens, np.uint8)
        self.gate_LEH = rng.standard_normal((spec.L, spec.E, spec.hidden_size), np.float32) / spec.hidden_size**0.5
        self._pool = rng.standard_normal((POOL, spec.L, spec.hidden_size), np.float32).astype(np.float16)
        ids = np.empty((POOL, spec.L, spec.K), np.uint16)
        for layer in range(spec.L):
            logits = self._pool[:, layer].astype(np.float32) @ self.gate_LEH[layer].astype(np.float16).T
            ids[:, layer] = np.argsort(-logits, 1)[:, : spec.K]
        self._ids = ids

    def router_inputs(self, start: int, stop: int) -> Any:
        """f32 ``[T, L, H]``."""
        if start // POOL == (stop - 1) // POOL:
            return self._pool[start % POOL : (stop - 1) % POOL + 1].astype(np.float32)
        return self._pool[np.arange(start, stop) % POOL].astype(np.float32)

    def load_topk(self) -> Any:
        """u16 ``[T, L, K]``."""
        return self._ids[np.arange(self.num_rows) % POOL]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mixtral-8x7b", help="preset")
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--distances", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    keep_freed_memory()
    spec = preset(args.model)
    trace = MadeTrace(spec, args.tokens, args.seed)
    rows: Any = Rows(trace)  # type: ignore[arg-type]
    split = split_requests([""] * len(trace.requests.first_row), "request", args.seed)
    gates = Gates(trace.gate_LEH, None, None, RouterRule("softmax"), "made gates")
    options = {"threshold": 1.0, "epochs": args.epochs, "patience": args.epochs}
    given = FitInput(
        rows, split, tuple(range(1, args.distances + 1)), args.tokens, args.seed, args.device, options, gates
    )  # fmt: skip
    print(f"{spec.name}: {spec.L} layers, {spec.E} experts, hidden size {spec.hidden_size}; d = 1..{args.distances}")
    print(f"{args.tokens:,} tokens, {args.device}, {torch.get_num_threads()} threads")
    started = time.perf_counter()
    predictor = LayerAware.fit(given)
    seconds = time.perf_counter() - started
    print(f"layer_aware, {args.epochs} epochs: {seconds:.1f} s to fit, {seconds / 300:.2f} of the paper's 5 minutes")
    print(f"  memory {predictor.memory_bytes / 2**20:.2f} MiB")
    for tokens, micro in predict_microseconds(predictor, 1, (1, 32, 512), device=args.device).items():
        print(f"  forecast of one layer, {tokens:>4} tokens: {micro:8.1f} us, {micro / 200:.2f} of the paper's 0.2 ms")


if __name__ == "__main__":
    main()

"""Defaults of the elastic planners, chosen on training requests alone: the protocol's test requests are never seen.

    python benchmarks/choose_elastic.py [--pairs N] [--planner NAME ...] [--know history noisy] [--out FILE]

The training requests are split once more, 70/30 by the same seed: history is the first part's mean load, iterations
are drawn from the second. Each line changes one parameter of the defaults: gap closed in the six regimes at one extra
slot a GPU, control zero for ``elastic``, charged for ``elastic-ahead`` (where the two differ), its mean, and the extras
held. What is chosen: the highest mean; of those within 0.005 of it the one that holds the fewest extras.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench_gap_closed import head_of
from gap_cells import Question, ask
from gap_protocol import REGIMES, SEED, Routing, load_routing

#: Values tried, the default always among them.
TRIED: dict[str, dict[str, tuple[Any, ...]]] = {
    "elastic": {
        "doubt": (0.3, 0.7),
        "decode_doubt": (0.15, 0.4),
        "economy": (2e-4, 3e-3, 1e-2),
        "fuel": (200, 800),
        "depth": (3, 5),
    },
    "elastic-ahead": {
        "spread": (0.1, 0.4),
        "decode_spread": (0.05, 0.2),
        "caution": (0.0, 0.4, 0.8),
    },
}
#: Means that are taken to be alike.
ALIKE = 0.005


def inner(routing: Routing) -> Routing:
    """The training requests as a routing of their own, split by the protocol's rule."""
    order = np.random.default_rng(SEED).permutation(routing.train)
    cut = round(0.7 * len(order))
    return dataclasses.replace(routing, train=np.sort(order[:cut]), test=np.sort(order[cut:]))


def judge(routing: Routing, planner: str, params: dict[str, Any], know: str, pairs: int) -> dict[str, Any]:
    """One line: gap closed by regime, mean gap, mean extras."""
    charged = planner == "elastic-ahead"
    cells = [
        ask(routing, Question(8, 1, regime, know, planner, params=tuple(params.items())), pairs, None)[charged]
        for regime in REGIMES
    ]
    gaps = [cell.gap for cell in cells]
    extras = float(np.mean([cell.extras for cell in cells]))
    return {"params": params, "know": know, "gaps": gaps, "mean": float(np.mean(gaps)), "extras": extras}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=96)
    parser.add_argument("--planner", choices=list(TRIED), nargs="+", default=list(TRIED))
    parser.add_argument("--know", choices=("history", "noisy"), nargs="+", default=["history"])
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    command = "python benchmarks/choose_elastic.py " + " ".join(sys.argv[1:])
    print("command:", command, flush=True)
    started, routing, lines = time.perf_counter(), inner(load_routing()), []
    for planner in options.planner:
        for know in options.know:
            mine = []
            settings = [{}, *({name: value} for name, values in TRIED[planner].items() for value in values)]
            for params in settings:
                line = judge(routing, planner, params, know, options.pairs)
                mine.append(line | {"planner": planner})
                gaps = " ".join(f"{gap:6.3f}" for gap in line["gaps"])
                print(
                    f"{planner:<14} {know:<8} {params!s:<24} {gaps} | {line['mean']:.4f} {line['extras']:.1f}x",
                    flush=True,
                )
            best = max(line["mean"] for line in mine)
            chosen = min((line for line in mine if line["mean"] >= best - ALIKE), key=lambda line: line["extras"])
            print(f"{planner}, {know}: chosen {chosen['params'] or 'the defaults'}", flush=True)
            lines += mine
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        head = head_of(command, time.perf_counter() - started, None, synthetic=False)
        options.out.write_text(json.dumps(head | {"lines": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()

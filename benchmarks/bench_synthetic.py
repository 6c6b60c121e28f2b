"""Synthetic routing: calibrated on one part of a real trace, compared with the other part.

    python benchmarks/bench_synthetic.py TRACE [--trials 60] [--seed 0]

TRACE is a trace folder of kind tokens. Prints the fitted parameters and, per measure, the held-out requests' value
beside that of synthetic requests of the same lengths (mean over three draws of router weights that the fit never saw).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from moeless.traces import TokenTrace, open_trace
from moeless.traces.calibration import calibrate


def main() -> None:
    """Calibrate and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    trace = open_trace(options.trace)
    if not isinstance(trace, TokenTrace):
        raise SystemExit(f"{options.trace} is of kind {trace.info.kind}; tokens are needed")
    found = calibrate(trace, trials=options.trials, seed=options.seed)
    print(f"command: python {' '.join(sys.argv)}")
    for name, value in dataclasses.asdict(found.params).items():
        print(f"  {name} {value:.4g}")
    print(f"{'':60} {'real':>9} {'synthetic':>9}")
    for name, real, synthetic in found.report:
        print(f"{name:60} {real:>9.3f} {synthetic:>9.3f}")


if __name__ == "__main__":
    main()

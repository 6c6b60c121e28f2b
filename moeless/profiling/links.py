"""Link models from measured collectives: tables of bytes and seconds, made from CSV files of one row a measurement.

Run: ``python -m moeless.profiling.links FOLDER OUT.json``. The files are those of the Vidur simulator (MIT licence):
columns ``size`` (bytes), ``num_workers``, ``devices_per_node`` and ``time_stats.<collective>.median`` (milliseconds of
the GPU kernel, launches left out). Only derived figures are kept: medians over bins of size, and a fitted line.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np

from moeless.errors import UserError
from moeless.files import sha256, write_json
from moeless.profiling.monotone import monotone_curve

#: Bins per factor of ten in size; sizes in the files are evenly spaced, so small ones are few.
BINS = 6


def read_measurements(path: Path, workers: int, per_node: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and seconds of one file's rows with that many workers, sorted by bytes.

    Raises:
        UserError: a column is missing, or no row fits.
    """
    with path.open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    median = next((name for name in (rows[0] if rows else {}) if name.endswith(".median")), None)
    needed = {"size", "num_workers", "devices_per_node"}
    if median is None or not needed <= set(rows[0]):
        raise UserError(f"{path} is not a table of collectives: it needs {', '.join(sorted(needed))} and a median")
    picked = [
        (int(row["size"]), float(row[median]) / 1e3)
        for row in rows
        if int(row["num_workers"]) == workers and int(row["devices_per_node"]) == per_node
    ]
    if not picked:
        raise UserError(f"{path} has no row of {workers} workers, {per_node} on a node")
    size, seconds = map(np.array, zip(*sorted(picked), strict=True))
    return size.astype(np.float64), seconds.astype(np.float64)


def tabulate(size: np.ndarray, seconds: np.ndarray) -> dict[str, Any]:
    """Median seconds over bins of size, made monotone, and the line ``latency + bytes / bandwidth`` nearest to them."""
    edges = np.unique(np.floor(np.log10(size) * BINS))
    table = []
    for edge in edges:
        inside = np.floor(np.log10(size) * BINS) == edge
        table.append((float(np.median(size[inside])), float(np.median(seconds[inside])), int(inside.sum())))
    x, y = np.array([row[0] for row in table]), monotone_curve(np.array([row[1] for row in table]))
    columns = np.stack([np.ones_like(x), x], axis=1) / y[:, None]
    (latency, per_byte), *_ = np.linalg.lstsq(columns, np.ones(len(x)), rcond=None)
    line = latency + per_byte * x
    return {
        "bytes": x.tolist(),
        "seconds": y.tolist(),
        "rows": [row[2] for row in table],
        "line": {
            "latency_seconds": float(latency),
            "bytes_per_second": float(1.0 / per_byte),
            "median_relative_error": float(np.median(np.abs(line / y - 1))),
            "largest_relative_error": float(np.abs(line / y - 1).max()),
        },
    }


def bus_rate(path: Path, workers: int) -> dict[str, float]:
    """Bytes a second that each GPU's link carried in the largest all-reduce: ``2 (n - 1) / n * bytes / seconds``."""
    size, seconds = read_measurements(path, workers, workers)
    return {
        "workers": workers,
        "bytes": float(size[-1]),
        "bus_bytes_per_second": float(2 * (workers - 1) / workers * size[-1] / np.median(seconds[-5:])),
    }


def all_reduce_as_link(path: Path, workers: int) -> dict[str, Any]:
    """A table of link bytes and seconds out of all-reduces: each byte puts ``2 (n - 1) / n`` bytes on each link."""
    size, seconds = read_measurements(path, workers, workers)
    return tabulate(2 * (workers - 1) / workers * size, seconds)


def build(folder: Path) -> dict[str, Any]:
    """The link models that the files of ``folder`` support."""
    dgx, dgx_reduce = folder / "h100_dgx-send_recv.csv", folder / "h100_dgx-all_reduce.csv"
    a100, a40 = folder / "a100_pairwise_nvlink-all_reduce.csv", folder / "a40_pairwise_nvlink-send_recv.csv"
    for path in (dgx, dgx_reduce, a100, a40):
        if not path.is_file():
            raise UserError(f"{path} is missing: the link models need the four files of measured collectives")
    return {
        "format": 1,
        "kind": "link-models",
        "source": {
            "origin": "measurements published with the Vidur simulator (microsoft/vidur), MIT licence; these are "
            "derived medians, the files are not included",
            "files": {path.name: sha256(path) for path in (dgx, dgx_reduce, a100, a40)},
            "method": "bytes and median kernel time of one message, GPU launch left out; an all-to-all's time is taken "
            "as that of one message as large as the fullest link's bytes: contention among many peers is not in it",
        },
        "links": {
            "h100-dgx": {
                "measured": "send/recv between 2 GPUs of one node (fast) and of two nodes (slow)",
                "fast": tabulate(*read_measurements(dgx, 2, 2)),
                "slow": tabulate(*read_measurements(dgx, 2, 1)),
                "cross_check": [bus_rate(dgx_reduce, workers) for workers in (2, 4, 8)],
            },
            "a100-pairwise-nvlink": {
                "measured": "all-reduce among 2 GPUs of one NVLink pair (fast) and among 4 across pairs (slow), as "
                "bytes on each link",
                "fast": all_reduce_as_link(a100, 2),
                "slow": all_reduce_as_link(a100, 4),
            },
            "a40-pairwise-nvlink": {
                "measured": "send/recv between 2 GPUs of one node (fast) and of two nodes (slow)",
                "fast": tabulate(*read_measurements(a40, 2, 2)),
                "slow": tabulate(*read_measurements(a40, 2, 1)),
            },
        },
    }


def main(arguments: list[str]) -> int:
    """Command line: folder of CSV files, output path."""
    if len(arguments) != 2:
        sys.stderr.write("usage: python -m moeless.profiling.links FOLDER OUT.json\n")
        return 2
    try:
        write_json(Path(arguments[1]), build(Path(arguments[0])))
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

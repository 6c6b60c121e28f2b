"""The few figures that tell what a profile says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def summarise(document: Mapping[str, Any]) -> dict[str, float | str]:
    """Achieved rates against ceilings, errors of interpolation, links."""
    ceilings = document["ceilings"]
    found: dict[str, float | str] = {
        "memory copy (GB/s, read + written)": ceilings["copy_bytes_per_second"] / 1e9,
        "launch (µs)": ceilings["launch_seconds"] * 1e6,
    }
    for dtype, rate in ceilings["flops"].items():
        found[f"matrix product, {dtype} (GFLOP/s)"] = rate / 1e9
    for grid in document["experts"]:
        label = f"experts {grid['kernel']}/{grid['dtype']}"
        found[f"{label}: best GFLOP/s"] = grid["best_flops"] / 1e9
        found[f"{label}: share of the matrix product's rate"] = grid["best_flops"] / ceilings["flops"][grid["dtype"]]
        found[f"{label}: 1 token (µs)"] = grid["measured"][0][0] * 1e6
        for axis, error in grid["leave_one_out"].items():
            if axis.endswith("median"):
                found[f"{label}: leave-one-out error, {axis.replace('_', ', ')} (%)"] = 100 * error
        found[f"{label}: largest correction to be monotone (%)"] = 100 * grid["correction"]["max"]
    for entry in document["exchange"]:
        found[f"all-to-all among {entry['ranks']}, shortest (µs)"] = entry["seconds"][0] * 1e6
    if not document["exchange"]:
        found["exchange"] = f"link model {document['links']}" if document["links"] else "not measured"
    if "disk_to_host" not in document["copies"]:
        found["storage"] = f"not measured: {document['machine']['storage']}"
    if document["machine"]["busy"]:
        found["measured although"] = "; ".join(document["machine"]["busy"])
    return found

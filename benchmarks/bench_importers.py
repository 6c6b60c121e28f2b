"""Importers: memory and speed at two sizes of file.

    python benchmarks/bench_importers.py [--tokens 200000]

Each format's file is written twice, once with four times the tokens, and imported in a process of its own. Growth is
the most memory of its own (anonymous pages: not those of mapped files, which the system takes back at will) that the
process held during the import, beyond what it held before. Requests have 500 tokens, steps 500 tokens a rank, the
model is the bundled one's shape (8 layers, 16 experts, top-2).
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from moeless.spec import preset
from moeless.traces.importers import IMPORTERS

SPEC = preset("bundled")
REQUEST = 500


def routing(tokens: int) -> np.ndarray:
    """Random distinct ids ``[T, L, K]``."""
    rng = np.random.default_rng(0)
    return np.argsort(rng.random((tokens, SPEC.L, SPEC.E), np.float32), axis=2)[..., : SPEC.K].astype(np.int32)


def write_npz(folder: Path, topk: np.ndarray) -> Path:
    """The documented NPZ layout, with weights."""
    offsets = np.arange(0, len(topk) + 1, REQUEST)
    np.savez(folder / "r.npz", experts=topk, probs=topk.astype(np.float32), offsets=offsets)
    return folder / "r.npz"


def write_parquet(folder: Path, topk: np.ndarray) -> Path:
    """The documented Parquet layout, in one row group."""
    ids = pa.FixedSizeListArray.from_arrays(pa.array(topk.reshape(-1)), SPEC.L * SPEC.K)
    table = pa.table({"request": np.arange(len(topk)) // REQUEST, "experts": ids})
    pq.write_table(table, folder / "r.parquet", row_group_size=len(topk))
    return folder / "r.parquet"


def write_sglang(folder: Path, topk: np.ndarray) -> Path:
    """A per_token dump of one rank."""
    import torch

    records = []
    for number, start in enumerate(range(0, len(topk), REQUEST)):
        rows = topk[start : start + REQUEST]
        ids = np.full((SPEC.num_layers, len(rows), 8), -1, np.int32)
        ids[list(SPEC.moe_layers), :, : SPEC.K] = rows.transpose(1, 0, 2)
        record = {"forward_pass_id": number, "rank": 0, "gatherer_key": "primary", "forward_mode": 1}
        count = torch.zeros((SPEC.num_layers, SPEC.E), dtype=torch.int32)
        records.append(record | {"topk_ids_of_layer": torch.from_numpy(ids), "global_physical_count": count})
    mapping = torch.arange(SPEC.E).repeat(SPEC.num_layers, 1)
    path = folder / "expert_distribution_recorder_1_0.pt"
    torch.save({"records": records, "last_physical_to_logical_map": mapping}, path)
    return path


def write_megatron(folder: Path, topk: np.ndarray) -> Path:
    """A router trace of one rank."""
    path = folder / "router_trace_rank0.jsonl"
    with path.open("w") as out:
        for step, start in enumerate(range(0, len(topk), REQUEST)):
            rows = np.sort(topk[start : start + REQUEST], axis=2)
            for index, layer in enumerate(SPEC.moe_layers):
                line = {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": 0}
                line |= {"num_tokens": len(rows), "topk": SPEC.K, "top_indices": rows[:, index].tolist()}
                out.write(json.dumps(line) + "\n")
    return path


def write_csv(folder: Path, topk: np.ndarray) -> Path:
    """One line per token and layer, with requests."""
    path = folder / "r.csv"
    with path.open("w") as out:
        out.write("request,layer,token,experts\n")
        for token, by_layer in enumerate(topk.tolist()):
            for layer, ids in enumerate(by_layer):
                out.write(f"{token // REQUEST},{layer},{token % REQUEST},{' '.join(map(str, ids))}\n")
    return path


def write_tensorrt(folder: Path, topk: np.ndarray) -> Path:
    """Statistics of one rank, an iteration per 20 tokens, so that the file is of a size that shows."""
    made = folder / "statistics"
    made.mkdir()
    (made / "meta_info.json").write_text(json.dumps({"num_experts": SPEC.E, "num_experts_per_token": SPEC.K}))
    tensors = {}
    for iteration, start in enumerate(range(0, len(topk), 20)):
        for index, layer in enumerate(SPEC.moe_layers):
            ids = topk[start : start + 20, index].ravel()
            tensors[f"{iteration}_{layer}"] = np.bincount(ids, minlength=SPEC.E).astype(np.int32)
    save_file(tensors, made / "rank0.safetensors")
    return made


WRITERS = {
    "npz": write_npz,
    "parquet": write_parquet,
    "sglang": write_sglang,
    "megatron": write_megatron,
    "csv": write_csv,
    "tensorrt-llm": write_tensorrt,
}


def anonymous() -> int:
    """Bytes of memory of its own that this process holds."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system does not tell a process's anonymous memory")


def measure(name: str, path: Path) -> None:
    """In a process of its own: import once, print the growth in bytes and the seconds."""
    importer = IMPORTERS.get(name)
    if name == "sglang":
        import torch  # noqa: F401 (its own memory is not the importer's)
    before, most, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.01):
            most = max(most, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    importer(path, path.parent / "out", SPEC)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    print(json.dumps({"growth": most - before, "seconds": seconds}))


def main() -> None:
    """Run all, or one import."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--formats", nargs="+", default=list(WRITERS), choices=list(WRITERS))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options.one[0], Path(options.one[1]))
        return
    print(f"command: python {' '.join(sys.argv)}; {platform.machine()}")
    print(f"{'format':>13} {'tokens':>9} {'file MB':>8} {'growth MB':>10} {'tokens/s':>10}")
    for name in options.formats:
        for tokens in (options.tokens, 4 * options.tokens):
            with tempfile.TemporaryDirectory() as folder:
                path = WRITERS[name](Path(folder), routing(tokens))
                size = sum(f.stat().st_size for f in ([path] if path.is_file() else path.iterdir()))
                ran = subprocess.run(
                    [sys.executable, __file__, "--one", name, str(path)], check=True, capture_output=True, text=True
                )
                made = json.loads(ran.stdout)
            speed = tokens / made["seconds"]
            print(
                f"{name:>13} {tokens:>9,} {size / 1e6:>8.1f} {made['growth'] / 1e6:>10.1f} {speed:>10,.0f}", flush=True
            )


if __name__ == "__main__":
    main()

"""Files in other systems' exact layouts are read faithfully; malformed ones are refused in a sentence."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import save_file

from moeless.errors import UserError
from moeless.spec import MoESpec
from moeless.traces import CountsTrace, IterationTrace, TokenTrace, open_trace
from moeless.traces.importers import IMPORTERS

# the small model: four layers, of which 1, 2, 3 are MoE; six experts, top-2


def load(name: str, path: Path, spec: MoESpec) -> Any:
    IMPORTERS.get(name)(path, path.parent / "out", spec)
    return open_trace(path.parent / "out", check=True)


def refused(name: str, path: Path, spec: MoESpec, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as raised:
        IMPORTERS.get(name)(path, path.parent / "out", spec)
    assert "\n" not in str(raised.value)
    assert not (path.parent / "out").exists()


# --- Parquet and CSV ---------------------------------------------------------------------------


def parquet_table(topk: np.ndarray, **changes: Any) -> pa.Table:
    columns = {
        "request": pa.array([5] * 4 + [2] * 6),
        "experts": pa.array(topk.astype(np.int64).tolist()),
        "probs": pa.array(np.full(topk.shape, 0.5).tolist()),
        "phase": pa.array([0, 0, 1, 1] + [0] * 6),
        "category": pa.array(["a"] * 4 + ["b"] * 6),
    }
    return pa.table(columns | changes)


def test_parquet_rows_become_requests(tmp_path: Path, spec: MoESpec, random_topk: Callable) -> None:
    topk = random_topk(np.random.default_rng(0), 10, spec)
    pq.write_table(parquet_table(topk), tmp_path / "r.parquet")
    trace = load("parquet", tmp_path / "r.parquet", spec)
    assert isinstance(trace, TokenTrace)
    np.testing.assert_array_equal(trace.load_topk(), topk)
    assert trace.requests.prompt_tokens.tolist() == [2, 6]
    assert trace.requests.category == ["a", "b"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"request": pa.array([1, 2] * 5)}, "consecutive"),
        ({"phase": pa.array([1, 0, 0, 0] + [0] * 6)}, "before its decode rows"),
        ({"experts": pa.array([[1, 2, 3, 4, 5, 0]] * 9 + [[1, 2]])}, "ragged"),
        ({"experts": pa.array([[1, 2]] * 10)}, "which make 6"),
        ({"experts": pa.array([[1, 2, 3, 4, 5, 9]] * 10)}, "got 9"),
        ({"experts": pa.array([["a"] * 6] * 10)}, "must be numbers"),
        ({"request": pa.array([0.5] * 10)}, "whole numbers"),
        ({"experts": pa.array([[1.0, 2, 3, 4, 5, 0]] * 10)}, "experts must be whole numbers"),
        ({"probs": pa.array([[1, 2, 3, 4, 5, 0]] * 10)}, "probs must be floating-point"),
    ],
)
def test_malformed_parquet_is_refused(
    tmp_path: Path, spec: MoESpec, random_topk: Callable, change: dict[str, Any], sentence: str
) -> None:
    topk = random_topk(np.random.default_rng(0), 10, spec)
    pq.write_table(parquet_table(topk, **change), tmp_path / "r.parquet")
    refused("parquet", tmp_path / "r.parquet", spec, sentence)
    (tmp_path / "r.parquet").write_bytes((tmp_path / "r.parquet").read_bytes()[:100])
    refused("parquet", tmp_path / "r.parquet", spec, "not a whole Parquet file")


def test_csv_requests_are_read_one_after_the_other(tmp_path: Path, spec: MoESpec, random_topk: Callable) -> None:
    topk = random_topk(np.random.default_rng(1), 5, spec)
    rows = [
        f"{7 - token // 3},{token % 3},{layer},{' '.join(map(str, topk[token, layer]))}"
        for token in range(5)
        for layer in range(3)
    ]
    head = "request,token,layer,experts\n"
    (tmp_path / "r.csv").write_text(head + "\n".join(rows) + "\n")
    trace = load("csv", tmp_path / "r.csv", spec)
    np.testing.assert_array_equal(trace.load_topk(), topk)
    assert trace.rows_N.tolist() == [3, 2]
    again = tmp_path / "again"
    again.mkdir()
    (again / "r.csv").write_text(head + "\n".join([*rows, rows[0]]) + "\n")
    refused("csv", again / "r.csv", spec, "must be consecutive")


def test_csv_rows_in_any_order_become_tokens(tmp_path: Path, spec: MoESpec, random_topk: Callable) -> None:
    rng = np.random.default_rng(1)
    topk = random_topk(rng, 5, spec)
    rows = [f"{layer},{token},{' '.join(map(str, topk[token, layer]))}" for token in range(5) for layer in range(3)]
    (tmp_path / "r.csv").write_text("layer,token,experts\n" + "\n".join(rng.permutation(rows)) + "\n")
    trace = load("csv", tmp_path / "r.csv", spec)
    np.testing.assert_array_equal(trace.load_topk(), topk)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("layer,token\n0,0\n", "no column 'experts'"),
        ("layer,token,experts\n", "0 tokens"),
        ("layer,token,experts\n0,0,1 2\n1,0,1 2\n", "one row for each of the layers 0 to 2"),
        ("layer,token,experts\n0,0,1 2\n1,0,1 2\n2,1,1 2\n", "one row for each"),
        ("layer,token,experts\n0,0,1 2 3\n", "line 2: 3 experts"),
        ("layer,token,experts\n0,x,1 2\n", "line 2"),
        ("layer,token,experts\n0,0,1 2\n1,0,1 2\n2,0,1 6\n", "got 6"),
    ],
)
def test_malformed_csv_is_refused(tmp_path: Path, spec: MoESpec, text: str, sentence: str) -> None:
    (tmp_path / "r.csv").write_text(text)
    refused("csv", tmp_path / "r.csv", spec, sentence)


# --- SGLang ------------------------------------------------------------------------------------


def sglang_per_token(topk_by_pass: list[np.ndarray], rank: int, spec: MoESpec) -> dict[str, Any]:
    """A dump as the recorder writes it: absolute layers, physical ids, padded to eight with -1."""
    physical = spec.E + 2
    mapping = np.stack([np.r_[np.roll(np.arange(spec.E), layer), 0, 1] for layer in range(spec.num_layers)])
    records = []
    for number, topk in enumerate(topk_by_pass):
        ids = np.full((spec.num_layers, len(topk), 8), -1, np.int32)
        for index, layer in enumerate(spec.moe_layers):
            position = np.argsort(mapping[layer, : spec.E])
            ids[layer, :, : spec.K] = position[topk[:, index]]
        records.append(
            {
                "forward_pass_id": number,
                "rank": rank,
                "gatherer_key": "primary",
                "global_physical_count": torch.zeros((spec.num_layers, physical), dtype=torch.int32),
                "input_ids": list(range(len(topk))),
                "positions": list(range(len(topk))),
                "extend_seq_lens": None,
                "forward_mode": 1 if number == 0 else 2,
                "topk_ids_of_layer": torch.from_numpy(ids),
                "misc_objects": [],
            }
        )
    return {"records": records, "last_physical_to_logical_map": torch.from_numpy(mapping)}


def test_sglang_per_token_maps_physical_ids_and_merges_ranks(
    tmp_path: Path, spec: MoESpec, random_topk: Callable
) -> None:
    rng = np.random.default_rng(2)
    passes = [[random_topk(rng, tokens, spec) for tokens in (7, 2)] for _ in range(2)]
    folder = tmp_path / "dumps"
    folder.mkdir()
    for rank in range(2):
        dump = sglang_per_token(passes[rank], rank, spec)
        torch.save(dump, folder / f"expert_distribution_recorder_1730000000.5_{rank}.pt")
    trace = load("sglang", folder, spec)
    assert isinstance(trace, IterationTrace)
    expected = np.concatenate([passes[0][0], passes[1][0], passes[0][1], passes[1][1]])
    np.testing.assert_array_equal(trace.load_topk(), expected)
    assert trace.num_iterations == 2
    assert trace.rank_T.tolist() == [0] * 7 + [1] * 7 + [0] * 2 + [1] * 2
    assert trace.phase_T.tolist() == [0] * 14 + [1] * 4
    assert trace.token_T[:7].tolist() == list(range(7))


def test_sglang_ranks_that_recorded_the_same_tokens_count_once(
    tmp_path: Path, spec: MoESpec, random_topk: Callable
) -> None:
    passes = [random_topk(np.random.default_rng(3), 5, spec)]
    folder = tmp_path / "dumps"
    folder.mkdir()
    for rank in range(4):
        torch.save(sglang_per_token(passes, rank, spec), folder / f"expert_distribution_recorder_1_{rank}.pt")
    trace = load("sglang", folder, spec)
    assert trace.num_tokens == 5
    assert any("4 ranks recorded the same tokens" in note for note in trace.info.notes)


def test_sglang_per_pass_and_stat_give_loads(tmp_path: Path, spec: MoESpec) -> None:
    rng = np.random.default_rng(4)
    mapping = np.tile(np.r_[np.arange(spec.E), 0, 1], (spec.num_layers, 1))
    count = rng.integers(0, 9, (3, spec.num_layers, spec.E + 2)).astype(np.int32)
    records = [
        {
            "forward_pass_id": i,
            "rank": 0,
            "gatherer_key": "primary",
            "global_physical_count": torch.from_numpy(count[i]),
        }
        for i in range(3)
    ]
    dump = {"records": records, "last_physical_to_logical_map": torch.from_numpy(mapping)}
    one = tmp_path / "a"
    one.mkdir()
    torch.save(dump, one / "expert_distribution_recorder_1_0.pt")
    trace = load("sglang", one / "expert_distribution_recorder_1_0.pt", spec)
    assert isinstance(trace, CountsTrace)
    logical = count[..., : spec.E].astype(np.int64)
    logical[..., :2] += count[..., spec.E :]
    np.testing.assert_array_equal(trace.loads(0, 3), logical[:, 1:])

    stat = np.zeros((10, spec.num_layers, spec.E), np.int32)
    stat[:4, 1:] = rng.integers(1, 9, (4, spec.L, spec.E))
    two = tmp_path / "b"
    two.mkdir()
    dump = {"rank": 0, "logical_count": torch.from_numpy(stat), "average_utilization_rate_over_window": None}
    torch.save(dump, two / "expert_distribution_recorder_1.pt")
    trace = load("sglang", two / "expert_distribution_recorder_1.pt", spec)
    np.testing.assert_array_equal(trace.loads(0, 4), stat[:4, 1:])
    assert trace.num_iterations == 4


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


def test_malformed_sglang_files_are_refused(
    tmp_path: Path, spec: MoESpec, random_topk: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "expert_distribution_recorder_1_0.pt"
    passes = [random_topk(np.random.default_rng(3), 5, spec)]

    def damaged(sentence: str, **changes: Any) -> None:
        dump = sglang_per_token(passes, 0, spec)
        dump["records"][0].update(changes)
        torch.save(dump, path)
        refused("sglang", path, spec, sentence)

    out_of_range = torch.full((spec.num_layers, 5, 8), -1, dtype=torch.int32)
    out_of_range[1:, :, :2] = spec.E + 2
    damaged(r"ids must lie in 0\.\.7", topk_ids_of_layer=out_of_range)
    damaged("whole numbers", topk_ids_of_layer=torch.zeros((spec.num_layers, 5, 8)))
    damaged("9 layers", topk_ids_of_layer=torch.zeros((9, 5, 8), dtype=torch.int32))
    damaged("0 tokens", topk_ids_of_layer=torch.zeros((spec.num_layers, 0, 8), dtype=torch.int32))
    damaged("3 entries for 5 tokens", input_ids=[1, 2, 3])
    torch.save(sglang_per_token(passes, 0, spec), path)
    path.write_bytes(path.read_bytes()[:500])
    refused("sglang", path, spec, "not a whole")
    with path.open("wb") as handle:
        pickle.dump({"records": Malicious()}, handle)
    refused("sglang", path, spec, "is not")
    torch.save({"records": Malicious()}, path)
    refused("sglang", path, spec, "other than tensors")
    assert not Path("executed").exists()
    torch.save({"something": 1}, path)
    refused("sglang", path, spec, "neither logical_count nor records")


# --- Megatron and TensorRT-LLM -----------------------------------------------------------------


def megatron_lines(topk_by_step: list[np.ndarray], rank: int, layers: list[int]) -> list[str]:
    lines = []
    for step, topk in enumerate(topk_by_step):
        for index, layer in enumerate(layers):
            rows = np.sort(topk[:, index]).tolist()
            record = {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": rank}
            lines.append(json.dumps(record | {"num_tokens": len(rows), "topk": 2, "top_indices": rows}))
        lines.append(
            json.dumps({**record, "block": "mtp", "layer": 0, "mtp_idx": 0, "num_tokens": 0, "top_indices": []})
        )
    return lines


@pytest.mark.parametrize(("first", "said"), [(1, "0-based layer indices"), (2, "1-based layer numbers")])
def test_megatron_traces_of_both_numberings_are_read(
    tmp_path: Path, spec: MoESpec, random_topk: Callable, first: int, said: str
) -> None:
    rng = np.random.default_rng(6)
    folder = tmp_path / "m"
    folder.mkdir()
    steps = {rank: [random_topk(rng, 4 + rank, spec) for _ in range(3)] for rank in range(2)}
    for rank, topk in steps.items():
        lines = megatron_lines(topk, rank, list(range(first, first + 3)))
        (folder / f"router_trace_rank{rank}.jsonl").write_text("\n".join(lines) + "\n")
    trace = load("megatron", folder, spec)
    assert isinstance(trace, IterationTrace)
    expected = np.concatenate([np.sort(steps[rank][step], axis=-1) for step in range(3) for rank in range(2)])
    np.testing.assert_array_equal(trace.load_topk(), expected)
    assert any(said in note for note in trace.info.notes)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda lines: [*lines[:-1], lines[-1][:40]], "cut short"),
        (lambda lines: [line.replace('"num_tokens": 4', '"num_tokens": 5') for line in lines], "num_tokens rows"),
        (lambda lines: [line.replace('"layer": 3', '"layer": 2') for line in lines], "twice|names layers"),
        (lambda lines: lines[:2] + lines[4:], "has layers"),
        (lambda _lines: [], "0 tokens|names layers"),
        (lambda lines: [line.replace("[[", "[[9, 9], [", 1) for line in lines], "num_tokens rows"),
        (
            lambda lines: [line.replace('"top_indices": [[', '"top_indices": [[0, ') for line in lines],
            "needs 2 experts",
        ),
    ],
)
def test_malformed_megatron_traces_are_refused(
    tmp_path: Path, spec: MoESpec, random_topk: Callable, change: Callable, sentence: str
) -> None:
    path = tmp_path / "router_trace_rank0.jsonl"
    topk = [random_topk(np.random.default_rng(0), 4, spec) for _ in range(2)]
    path.write_text("\n".join(change(megatron_lines(topk, 0, [1, 2, 3]))))
    refused("megatron", path, spec, sentence)


def write_tensorrt(folder: Path, spec: MoESpec, load_RILE: np.ndarray) -> None:
    folder.mkdir()
    (folder / "meta_info.json").write_text(json.dumps({"num_experts": spec.E, "num_experts_per_token": spec.K}))
    for rank, load_ILE in enumerate(load_RILE):
        tensors = {
            f"{iteration}_{layer}": load_ILE[iteration, index].copy()
            for iteration in range(len(load_ILE))
            for index, layer in enumerate(spec.moe_layers)
        }
        save_file(tensors, folder / f"rank{rank}.safetensors")


def test_tensorrt_statistics_are_summed_over_ranks(tmp_path: Path, spec: MoESpec) -> None:
    counts = np.random.default_rng(7).integers(0, 9, (2, 4, spec.L, spec.E)).astype(np.int32)
    write_tensorrt(tmp_path / "s", spec, counts)
    trace = load("tensorrt-llm", tmp_path / "s", spec)
    assert isinstance(trace, CountsTrace)
    np.testing.assert_array_equal(trace.loads(0, 4), counts.sum(axis=0))


def test_malformed_tensorrt_statistics_are_refused(tmp_path: Path, spec: MoESpec, make_spec: Callable) -> None:
    counts = np.ones((1, 2, spec.L, spec.E), np.int32)
    write_tensorrt(tmp_path / "s", spec, counts)
    refused("tensorrt-llm", tmp_path / "s", make_spec(num_experts=5), "num_experts 6, small has 5")
    rank = tmp_path / "s" / "rank0.safetensors"
    whole = rank.read_bytes()
    rank.write_bytes(whole[:50])
    refused("tensorrt-llm", tmp_path / "s", spec, "not a whole safetensors file")
    for counts in (np.ones(5, np.int32), np.ones(6, np.float32), -np.ones(6, np.int32)):
        save_file({f"0_{layer}": counts for layer in (1, 2, 3)}, rank)
        refused("tensorrt-llm", tmp_path / "s", spec, "must be 6 counts")
    save_file({"0_1": np.ones(6, np.int32)}, rank)
    refused("tensorrt-llm", tmp_path / "s", spec, "statistics of layers")
    save_file({"x": np.ones(6, np.int32)}, rank)
    refused("tensorrt-llm", tmp_path / "s", spec, "iteration_layer")
    save_file({f"{i}_{layer}": np.ones(6, np.int32) for i in (0, 2) for layer in (1, 2, 3)}, rank)
    refused("tensorrt-llm", tmp_path / "s", spec, "not contiguous")


def test_every_importer_says_that_a_file_is_missing(tmp_path: Path, spec: MoESpec) -> None:
    for name in IMPORTERS.names():
        with pytest.raises(UserError):
            IMPORTERS.get(name)(tmp_path / "missing", tmp_path / "out", spec)
    assert not list(tmp_path.iterdir())

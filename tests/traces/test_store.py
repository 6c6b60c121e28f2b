"""A trace folder gives back what was written, and refuses what is broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moeless.errors import UserError
from moeless.spec import MoESpec
from moeless.traces import (
    CountsTrace,
    IterationTrace,
    RequestRows,
    TokenTrace,
    TokenTraceWriter,
    TraceInfo,
    open_trace,
    require_kind,
)


def test_token_trace_gives_back_rows_requests_and_phases(tmp_path: Path, spec: MoESpec, random_topk: Callable) -> None:
    rng = np.random.default_rng(5)
    lengths = [(3, 4), (1, 0), (20, 30)]
    topk = [random_topk(rng, sum(pair), spec) for pair in lengths]
    weights = [rng.random((sum(pair), spec.L, spec.K)).astype(np.float16) for pair in lengths]
    writer = TokenTraceWriter(tmp_path / "t", TraceInfo("tokens", spec, {"model": "x"}), shard_rows=5)
    for request, (prompt, decode) in enumerate(lengths):
        token = np.arange(prompt + decode) if request else None
        rows = RequestRows(request * 2, topk[request], prompt, decode + 1, weights[request], token, category="c")
        writer.append([rows])
    writer.close()
    trace = open_trace(tmp_path / "t", check=True)
    assert isinstance(trace, TokenTrace)
    np.testing.assert_array_equal(trace.load_topk(), np.concatenate(topk))
    np.testing.assert_array_equal(trace.weights(0, trace.num_rows), np.concatenate(weights))
    np.testing.assert_array_equal(trace.topk(5, 40), np.concatenate(topk)[5:40])
    assert trace.rows(2) == slice(8, 58)
    assert trace.requests.request.tolist() == [0, 2, 4]
    assert trace.requests.output_tokens.tolist() == [5, 1, 31]
    assert trace.requests.category == ["c"] * 3
    assert trace.requests.source_id == [""] * 3
    assert trace.phase_T[:7].tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert trace.token_T[:9].tolist() == [-1] * 7 + [0, 0]
    assert trace.position_T[8:].tolist() == list(range(50))
    assert len(trace.info.shards) > 1


def test_iteration_and_counts_traces_give_back_their_rows(make_iterations: Callable, make_counts: Callable) -> None:
    iterations = open_trace(make_iterations(), check=True)
    assert isinstance(iterations, IterationTrace)
    assert iterations.num_iterations == 7
    assert sum(iterations.rows(i).stop - iterations.rows(i).start for i in range(7)) == iterations.num_tokens
    assert set(iterations.rank_T.tolist()) == {0, 1}
    assert not iterations.has_weights
    with pytest.raises(UserError, match="no gate weights"):
        iterations.weights(0, 1)
    counts = open_trace(make_counts(), check=True)
    assert isinstance(counts, CountsTrace)
    assert (counts.loads(0, 9).sum(axis=2) == 20 * counts.spec.K).all()
    np.testing.assert_array_equal(counts.loads(3, 6), counts.loads(0, 9)[3:6])
    assert counts.tokens_I.tolist() == [20] * 9
    with pytest.raises(UserError, match=r"evaluate needs a trace of kind tokens .*is of kind counts"):
        require_kind(counts, "tokens", command="evaluate")


def test_files_follow_the_documented_layout(token_trace: Path) -> None:
    shards = sorted(token_trace.glob("tokens-*.parquet"))
    file = pq.ParquetFile(shards[0])
    assert file.schema_arrow.names == ["request", "position", "phase", "token", "experts", "weights"]
    assert file.schema_arrow.field("experts").type.list_size == 6
    column = file.metadata.row_group(0).column(4)
    assert "DICTIONARY" not in "".join(column.encodings)
    described = json.loads((token_trace / "trace.json").read_text())
    assert described["format"] == 1
    assert described["complete"] is True
    assert [shard["file"] for shard in described["shards"]] == [shard.name for shard in shards]


def test_row_groups_stay_small(tmp_path: Path, spec: MoESpec, random_topk: Callable) -> None:
    writer = TokenTraceWriter(tmp_path / "t", TraceInfo("tokens", spec, {"model": "x"}, has_weights=False))
    writer.append([RequestRows(0, random_topk(np.random.default_rng(0), 40_000, spec), 40_000, 0)])
    writer.close()
    metadata = pq.ParquetFile(tmp_path / "t" / "tokens-00000.parquet").metadata
    assert max(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)) <= 16_384
    trace = open_trace(tmp_path / "t")
    whole = trace.load_topk()
    np.testing.assert_array_equal(trace.topk(16_000, 33_000), whole[16_000:33_000])


def _cut(folder: Path) -> None:
    shard = sorted(folder.glob("tokens-*.parquet"))[-1]
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


def _lose(folder: Path) -> None:
    sorted(folder.glob("tokens-*.parquet"))[0].unlink()


def _unfinished(folder: Path) -> None:
    path = folder / "trace.json"
    path.write_text(path.read_text().replace('"complete": true', '"complete": false'))


def _half_json(folder: Path) -> None:
    path = folder / "trace.json"
    path.write_text(path.read_text()[:300])


def _newer(folder: Path) -> None:
    path = folder / "trace.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))


def _no_requests(folder: Path) -> None:
    (folder / "requests.parquet").unlink()


def _escape(folder: Path) -> None:
    path = folder / "trace.json"
    path.write_text(path.read_text().replace("tokens-00000.parquet", "../tokens-00000.parquet"))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_cut, "bytes where trace.json says"),
        (_lose, "is missing"),
        (_unfinished, "is not complete"),
        (_half_json, "not valid JSON"),
        (_newer, "reads format 1"),
        (_no_requests, "is missing"),
        (_escape, "not a plain file name"),
    ],
)
def test_a_damaged_trace_is_refused_with_a_sentence(token_trace: Path, damage: Callable, sentence: str) -> None:
    damage(token_trace)
    with pytest.raises(UserError, match=sentence) as raised:
        open_trace(token_trace)
    assert "\n" not in str(raised.value)


def _same_size_other_ids(folder: Path) -> None:
    path = folder / "tokens-00000.parquet"
    content = bytearray(path.read_bytes())
    content[60] ^= 0xFF
    path.write_bytes(bytes(content))


def test_check_finds_a_changed_byte(token_trace: Path) -> None:
    _same_size_other_ids(token_trace)
    open_trace(token_trace)
    with pytest.raises(UserError, match="SHA-256"):
        open_trace(token_trace, check=True)


def test_expert_ids_beyond_the_model_are_refused_on_reading(token_trace: Path) -> None:
    path = token_trace / "trace.json"
    path.write_text(path.read_text().replace('"num_experts": 6', '"num_experts": 4'))
    trace = open_trace(token_trace)
    with pytest.raises(UserError, match="4 experts"):
        trace.load_topk()


def test_check_finds_phases_that_contradict_the_request_table(token_trace: Path) -> None:
    path = token_trace / "requests.parquet"
    table = pq.read_table(path)
    prompts = table.column("prompt_tokens").to_numpy().copy()
    prompts[0] -= 1
    changed = table.set_column(2, table.schema.field("prompt_tokens"), pa.array(prompts, pa.uint32()))
    pq.write_table(changed, path)
    described = json.loads((token_trace / "trace.json").read_text())
    for entry in described["files"]:
        if entry["file"] == path.name:
            from moeless.files import sha256

            entry |= {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (token_trace / "trace.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="phases"):
        open_trace(token_trace, check=True)


@pytest.mark.parametrize("change", ["id", "shape", "order", "weight"])
def test_writer_refuses_rows_that_break_the_format(
    tmp_path: Path, spec: MoESpec, random_topk: Callable, change: str
) -> None:
    topk = random_topk(np.random.default_rng(0), 4, spec)
    weights = np.ones(topk.shape, np.float32)
    writer = TokenTraceWriter(tmp_path / "t", TraceInfo("tokens", spec, {"model": "x"}))
    writer.append([RequestRows(3, topk, 2, 3, weights)])
    bad_id, bad_weight = topk.copy(), weights.copy()
    bad_id[0, 0, 0] = 6
    bad_weight[0, 0, 0] = np.inf
    rows = {
        "id": RequestRows(4, bad_id, 2, 3, weights),
        "shape": RequestRows(4, topk[:, :2], 2, 3, weights),
        "order": RequestRows(3, topk, 2, 3, weights),
        "weight": RequestRows(4, topk, 2, 3, bad_weight),
    }[change]
    with pytest.raises(UserError):
        writer.append([rows])


def test_writer_does_not_touch_a_folder_that_holds_something(tmp_path: Path, spec: MoESpec) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        TokenTraceWriter(tmp_path, TraceInfo("tokens", spec, {"model": "x"}))
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.txt"]


def test_a_resumed_trace_equals_an_uninterrupted_one(tmp_path: Path, spec: MoESpec, random_topk: Callable) -> None:
    rng = np.random.default_rng(3)
    batches = [
        [
            RequestRows(2 * b + i, random_topk(rng, 9, spec), 4, 6, rng.random((9, spec.L, spec.K)), source_id=str(b))
            for i in range(2)
        ]
        for b in range(6)
    ]
    info = TraceInfo("tokens", spec, {"model": "x"}, seed=1)

    def record(path: Path, stop: int | None = None, *, resume: bool = False) -> None:
        writer = TokenTraceWriter(path, info, shard_rows=30, resume=resume)
        for batch in batches[writer.num_requests // 2 : stop]:
            writer.append(batch)
        if stop is None:
            writer.close()

    record(tmp_path / "whole")
    record(tmp_path / "broken", 3)  # two batches in a shard, one lost in memory
    (tmp_path / "broken" / "tokens-00001.parquet").write_bytes(b"half a shard")
    record(tmp_path / "broken", 5, resume=True)
    record(tmp_path / "broken", resume=True)
    names = sorted(entry.name for entry in (tmp_path / "whole").iterdir())
    assert names == sorted(entry.name for entry in (tmp_path / "broken").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes(), name


def test_resuming_with_other_settings_is_refused(token_trace: Path, spec: MoESpec) -> None:
    with pytest.raises(UserError, match=r"another seed \(0, now 9\)"):
        TokenTraceWriter(token_trace, TraceInfo("tokens", spec, {"model": "test"}, seed=9), resume=True)

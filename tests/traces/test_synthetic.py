"""Synthetic routing is labelled, reproducible, and has the statistics it is given."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moeless.errors import UserError
from moeless.spec import MoESpec, preset
from moeless.traces import TokenTrace, open_trace
from moeless.traces import statistics as st
from moeless.traces.calibration import calibrate, measures
from moeless.traces.compose import total_load
from moeless.traces.edit import merge_traces, slice_trace
from moeless.traces.importers.histogram import import_histogram
from moeless.traces.synthetic import SyntheticParams, synthetic_model, write_synthetic


def made(path: Path, spec: MoESpec, **changes: object) -> TokenTrace:
    params = SyntheticParams(prompt_tokens=30, output_tokens=30, **changes)  # type: ignore[arg-type]
    write_synthetic(path, spec, requests=30, params=params, seed=1)
    trace = open_trace(path, check=True)
    assert isinstance(trace, TokenTrace)
    return trace


@pytest.mark.parametrize("name", ["mixtral-8x7b", "phi-3.5-moe", "llama-4-scout"])
def test_models_out_of_reach_get_labelled_traces(tmp_path: Path, name: str) -> None:
    params = SyntheticParams(prompt_tokens=8, output_tokens=8)
    info = write_synthetic(tmp_path / "t", preset(name), requests=5, params=params)
    assert info.synthetic
    trace = open_trace(tmp_path / "t", check=True)
    assert trace.spec == preset(name)
    assert "(synthetic)" in (tmp_path / "t" / "README.md").read_text()


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, spec: MoESpec) -> None:
    made(tmp_path / "a", spec)
    made(tmp_path / "b", spec)
    for name in ("tokens-00000.parquet", "requests.parquet", "trace.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_parameters_move_what_they_are_named_for(tmp_path: Path, spec: MoESpec) -> None:
    def measured(name: str, **changes: float) -> dict[str, float]:
        trace = made(tmp_path / name, spec, **changes)
        return measures(trace, np.arange(trace.num_requests), gpus=3)

    base = {"request": 0.0, "layer": 0.0, "category": 0.0, "persistence": 0.0, "neighbour": 0.0, "popularity": 0.1}
    plain = measured("plain", **base, token=1.0)
    steady = measured("steady", **(base | {"persistence": 0.9}), token=2.0)
    skewed = measured("skewed", **(base | {"popularity": 1.5}), token=1.0)
    linked = measured("linked", **(base | {"neighbour": 0.95}), token=3.0)
    assert steady["overlap of tokens 1 apart"] > plain["overlap of tokens 1 apart"] + 0.1
    assert skewed["imbalance of 16 requests"] > plain["imbalance of 16 requests"] + 0.1
    assert linked["next layer known better by"] > plain["next layer known better by"] + 0.1


def test_a_given_popularity_is_reproduced(spec: MoESpec) -> None:
    rng = np.random.default_rng(0)
    share = np.minimum(rng.dirichlet(np.full(spec.E, 3.0), size=spec.L), 0.4)
    share = share / share.sum(axis=1, keepdims=True)
    params = SyntheticParams(request=0.0, layer=0.0, token=2.0, persistence=0.0)
    model = synthetic_model(spec, params, share_CLE={"only": share})
    _, topk = model.request(20_000, rng)
    np.testing.assert_allclose(st.shares(total_load(topk, spec.E)), share, atol=0.015)


def test_a_request_continues_from_block_to_block(spec: MoESpec) -> None:
    params = SyntheticParams(popularity=0.0, category=0.0, request=0.0, token=8.0, persistence=0.999, neighbour=0.0)
    _, topk = synthetic_model(spec, params).request(600, np.random.default_rng(1))
    overlap = [float(st.overlap_L(topk[i : i + 1], topk[i + 1 : i + 2]).mean()) for i in (255, 511)]
    assert min(overlap) > 0.6


def test_histogram_of_mixtral_becomes_a_trace_with_its_popularity(shared_data: Path, tmp_path: Path) -> None:
    path, spec = shared_data / "routing" / "mixtral-8x7b-mmlu-popularity.json", preset("mixtral-8x7b")
    info = import_histogram(path, tmp_path / "t", spec)
    assert info.synthetic
    trace = open_trace(tmp_path / "t")
    assert isinstance(trace, TokenTrace)
    data = json.loads(path.read_text())
    stated = np.mean([st.shares(np.array(entry["expert_popularity"])) for entry in data.values()], axis=0)
    assert set(trace.requests.category) == set(data)
    assert np.abs(st.shares(total_load(trace.load_topk(), 8)) - stated).max() < 0.05


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[]", "object of data sets"),
        ('{"a": {}}', "no expert_popularity"),
        ('{"a": {"expert_popularity": [[1, 2]]}}', "has popularity of"),
    ],
)
def test_malformed_histograms_are_refused(tmp_path: Path, spec: MoESpec, content: str, sentence: str) -> None:
    (tmp_path / "h.json").write_text(content)
    with pytest.raises(UserError, match=sentence):
        import_histogram(tmp_path / "h.json", tmp_path / "t", spec)
    assert not (tmp_path / "t").exists()


def test_calibration_finds_the_imbalance_of_a_known_generator(tmp_path: Path, spec: MoESpec) -> None:
    trace = made(tmp_path / "known", spec, request=0.9, popularity=0.8, token=1.2)
    found = calibrate(trace, gpus=3, sample_requests=30, trials=30)
    for name, real, other in found.report:
        if name.startswith("imbalance"):
            assert other == pytest.approx(real, abs=0.2), name


def test_merge_and_slice_keep_every_row(tmp_path: Path, spec: MoESpec, make_tokens, make_spec) -> None:
    one, two = (
        open_trace(make_tokens([(3, 2), (4, 4)], name="one")),
        open_trace(make_tokens([(9, 1)], name="two", seed=5)),
    )
    assert isinstance(one, TokenTrace)
    assert isinstance(two, TokenTrace)
    merge_traces([one, two], tmp_path / "merged")
    merged = open_trace(tmp_path / "merged", check=True)
    assert isinstance(merged, TokenTrace)
    np.testing.assert_array_equal(merged.load_topk(), np.concatenate([one.load_topk(), two.load_topk()]))
    slice_trace(merged, [2, 0], tmp_path / "part")
    part = open_trace(tmp_path / "part", check=True)
    assert isinstance(part, TokenTrace)
    np.testing.assert_array_equal(part.load_topk(), np.concatenate([two.load_topk(), one.load_topk()[:5]]))
    np.testing.assert_array_equal(part.weights(0, 10), two.weights(0, 10))
    assert part.requests.source_id == ["s0", "s0"]
    with pytest.raises(UserError, match="requests 0 to 1"):
        slice_trace(part, [2], tmp_path / "none")
    other = made(tmp_path / "other", make_spec(num_experts=7))
    with pytest.raises(UserError, match="another shape"):
        merge_traces([one, other], tmp_path / "none")


def test_datasets_loads_a_trace_folder_as_it_is(make_tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import load_dataset

    folder = make_tokens([(3, 2), (4, 4)])
    rows = load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.num_rows == 13
    assert len(rows[0]["experts"]) == 6
    requests = load_dataset(str(folder), "requests", split="train", cache_dir=str(tmp_path / "cache"))
    assert requests["prompt_tokens"][:] == [3, 4]

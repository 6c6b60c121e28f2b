"""The work that is timed computes what it should, and the arithmetic around it is right."""

import csv
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.cluster import cluster
from moeless.contracts import LayerPlan
from moeless.costs.exchange import link_tables
from moeless.costs.measured import MeasuredCosts
from moeless.costs.profile_reader import parse_profile
from moeless.engine.triton_kernels import available
from moeless.errors import UserError
from moeless.profiling import links, timing
from moeless.profiling.ceilings import Ceilings
from moeless.profiling.collectives import measure_exchange
from moeless.profiling.emulate import RankWork, emulate_layer
from moeless.profiling.experts import kernels_for, measure_experts, random_weights, run_kernel
from moeless.profiling.hotpath import HotPath, relative_error
from moeless.profiling.monotone import leave_one_out, monotone_curve, monotone_grid, nonnegative_least_squares
from moeless.profiling.parts import AttentionBlock, combine, permute
from moeless.profiling.timing import Effort, measure
from moeless.spec import preset

CPU = torch.device("cpu")
TINY = Effort(budget=0.0, least=3, most=3)


def reference(rows, counts, weights):
    out = []
    for expert, part in enumerate(rows.double().split(counts)):
        gate, up = (part @ weights.up_PJH[expert].double().T).chunk(2, -1)
        out.append((torch.nn.functional.silu(gate) * up) @ weights.down_PHI[expert].double().T)
    return torch.cat(out)


@pytest.mark.parametrize("kernel", kernels_for(CPU, torch.float32))
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 0, 7], [1, 1, 1, 1]])
def test_expert_kernels_compute_the_experts(kernel, counts):
    weights = random_weights(preset("bundled"), 4, torch.float32, CPU)
    rows = torch.randn(sum(counts), 192)
    assert relative_error(run_kernel(kernel, counts, weights)(rows), reference(rows, counts, weights)) < 1e-5


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_permute_sorts_and_combine_puts_back(ids):
    rows, replica = torch.randn(len(ids), 4), torch.tensor(ids)
    ordered, order = permute(rows, replica)
    assert (replica[order].diff() >= 0).all()
    assert torch.equal(combine(ordered, order, torch.full((len(ids),), 2.0)), 2 * rows)


@pytest.mark.parametrize("model", ["bundled", "deepseek-v3"])
def test_attention_of_a_prefill_ends_where_decoding_would(model):
    spec = preset(model)
    shapes = spec.to_json()
    if model == "deepseek-v3":
        shapes["attention"] = shapes["attention"] | {"heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16}
        shapes["hidden_size"] = 32
    block = AttentionBlock(type(spec).from_json(shapes), torch.float32, CPU)
    hidden = torch.randn(6, shapes["hidden_size"])
    whole = block.prefill(hidden)
    _, key, value = block.project(hidden)
    last = block.decode(hidden[-1:], key.transpose(0, 1).unsqueeze(0), value.transpose(0, 1).unsqueeze(0))
    assert relative_error(last, whole[-1:]) < 1e-5


def test_grids_hold_every_cell_with_its_spread():
    entry = measure_experts(preset("bundled"), "loop", torch.float32, CPU, (1, 8), (1, 2, 3), 2**20, TINY)
    for name in ("seconds", "measured", "low", "high"):
        assert np.array(entry[name]).shape == (3, 2)
    assert entry["repetitions"]["kept"] + entry["repetitions"]["dropped_as_interrupted"] == 3 * 6


def test_repetitions_interrupted_by_other_work_are_dropped(monkeypatch):
    wall = iter(np.arange(1000.0))
    # the third call gets a fifth of a core, the others a whole one
    cpu = iter([0.0, 1.0, *(v for i in range(7) for v in (10.0 * i, 10.0 * i + (0.2 if i == 2 else 1.0)))])
    monkeypatch.setattr(timing.torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(wall))
    monkeypatch.setattr(timing.time, "thread_time", lambda: next(cpu))
    sample = measure([lambda: None], CPU, Effort(budget=0.0, least=7, most=7))
    assert (sample.kept, sample.dropped) == (6, 1)
    assert sample.seconds == pytest.approx(1.0)


def test_hot_path_kernels_agree_with_float64():
    ceilings = Ceilings({"float32": 1e11, "bfloat16": 1e11}, 1e10, 1e10, 1e-6, 1e-6)
    for dtype in (torch.float32, torch.bfloat16):
        rows = HotPath(preset("bundled"), CPU, dtype, 48, 4, ceilings, TINY, 3).rows()
        by_triton = [row for row in rows if "triton" in row.kernel]
        assert (len(rows) - len(by_triton), len(by_triton)) == (7, 5 if available(CPU) else 0)
        assert all(row.correct for row in rows), rows
        assert all(row.floor > 0 for row in rows)


def test_a_variant_that_does_not_run_is_left_out_with_its_reason():
    ceilings = Ceilings({"float32": 1e11}, 1e10, 1e10, 1e-6, 1e-6)
    path = HotPath(preset("bundled"), CPU, torch.float32, 8, 2, ceilings, TINY, 0, triton=False)
    assert not path.triton
    assert len(path._variant("good", "", lambda: torch.ones(4), torch.ones(4), 1.0)) == 1

    def breaks():
        raise RuntimeError("no compiler\nat line 3")

    assert path._variant("bad", "", breaks, torch.ones(4), 1.0) == []
    assert path.failed == {"bad": "no compiler"}


def test_a_kernel_that_computes_something_else_is_called_wrong():
    ceilings = Ceilings({"float32": 1e11}, 1e10, 1e10, 1e-6, 1e-6)
    path = HotPath(preset("bundled"), CPU, torch.float32, 8, 2, ceilings, TINY, 0)
    good, bad = torch.ones(4), torch.tensor([1.0, 1.0, 1.0, float("nan")])
    assert path._row("x", "", lambda: None, good, good, 1.0).correct
    assert not path._row("x", "", lambda: None, bad, good, 1.0).correct
    assert not path._row("x", "", lambda: None, good * 1.001, good, 1.0).correct


def test_emulated_layer_runs_every_rank_and_takes_the_slowest(quick_profile):
    spec = preset("bundled")
    costs = MeasuredCosts(spec, cluster("cpu2"), profile=parse_profile(quick_profile, "here"))
    plan = LayerPlan.build(0, np.arange(16), np.arange(16) // 8, np.ones(16, bool), num_experts=16, num_gpus=2)
    quota = np.zeros((2, 16), np.int64)
    quota[:, :8] = 64
    work = RankWork(spec, "loop", torch.float32, CPU, 8, 2**20)
    layer = emulate_layer(quota, plan, costs, work, TINY)
    assert layer.measured_G[1] == 0.0
    assert layer.expert == layer.measured_G[0] > 0
    assert layer.total == pytest.approx(layer.expert + layer.predicted.all_to_all)
    assert layer.expert_error == pytest.approx(layer.predicted.expert / layer.expert - 1)


def test_an_emulated_rank_computes_the_rows_it_was_sent():
    work = RankWork(preset("bundled"), "loop", torch.float32, CPU, 4, 2**20)
    rows, copy_N, part, used = work.inputs(np.array([3, 0, 2, 6]), 0)
    out = work.call(rows, copy_N, part, used)()
    for row in range(len(rows)):
        copy = int(copy_N[row])
        alone = [1 if c == copy else 0 for c in range(len(used))]
        assert relative_error(out[row : row + 1], reference(rows[row : row + 1], alone, part)) < 1e-5


def test_exchange_among_ranks_is_measured_by_bytes_and_skew():
    entry = measure_exchange(3, "cpu", quick=True)
    assert entry["ranks"] == 3
    assert (np.diff(entry["seconds"]) >= 0).all()
    assert (np.array(entry["hot_seconds"]) <= np.array(entry["seconds"])).all()
    assert entry["gather_seconds"] > 0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_monotone_grid_is_monotone_and_least_squares(seed, noise):
    random = np.random.default_rng(seed)
    grid = np.exp(noise * random.standard_normal((3, 5))) * (1 + np.arange(3)[:, None]) * (1 + np.arange(5))
    made = monotone_grid(grid)
    slack = 1e-12 * made.max()
    assert (np.diff(made, axis=0) >= -slack).all()
    assert (np.diff(made, axis=1) >= -slack).all()
    assert (np.diff(np.diff(made, axis=0), axis=1) >= -slack).all()
    # optimality: no step can be changed for the better (Karush-Kuhn-Tucker)
    matrix = np.kron(np.tril(np.ones((3, 3))), np.tril(np.ones((5, 5)))) / grid.reshape(-1, 1)
    steps = nonnegative_least_squares(matrix, np.ones(15))
    gradient = matrix.T @ (matrix @ steps - 1.0)
    assert (gradient >= -1e-7 * np.abs(matrix).sum()).all()
    assert np.abs(gradient * steps).max() <= 1e-7


@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=12))
def test_monotone_curve_keeps_a_rising_one_and_pools_the_rest(values):
    made = monotone_curve(np.array(values))
    assert (np.diff(made) >= 0).all()
    assert min(values) * (1 - 1e-9) <= made.min()
    assert made.max() <= max(values) * (1 + 1e-9)
    rising = np.sort(values)
    assert monotone_curve(rising) == pytest.approx(rising)


def test_leave_one_out_error_is_that_of_the_neighbours_line():
    x = np.array([1.0, 2.0, 4.0])
    line = np.array([[1.0, 2.0, 4.0]])
    error = leave_one_out(x, np.array([1.0]), line, line)
    assert error == pytest.approx({"tokens_median": 0.0, "tokens_p90": 0.0, "tokens_max": 0.0})
    # the line from 1 to 7 passes through 3 at 2: 50 % too much where 2 was measured
    bent = np.array([[1.0, 2.0, 7.0]])
    assert leave_one_out(x, np.array([1.0]), bent, bent)["tokens_max"] == pytest.approx(0.5)
    # the truth is what was measured, not what the grid made of it
    assert leave_one_out(x, np.array([1.0]), line, 2 * line)["tokens_max"] == pytest.approx(0.5)


def write_csv(path, rows):
    with path.open("w", newline="") as handle:
        table = csv.writer(handle)
        table.writerow(["time_stats.send_recv.median", "size", "num_workers", "devices_per_node"])
        table.writerows(rows)


def test_link_table_recovers_a_line(tmp_path):
    size = np.unique(np.geomspace(2048, 6e7, 400).astype(int))
    write_csv(tmp_path / "a.csv", [[1e3 * (8e-6 + n / 3e11), n, 2, 2] for n in size] + [[99, 5, 4, 4]])
    table = links.tabulate(*links.read_measurements(tmp_path / "a.csv", 2, 2))
    assert table["line"]["latency_seconds"] == pytest.approx(8e-6, rel=1e-3)
    assert table["line"]["bytes_per_second"] == pytest.approx(3e11, rel=1e-3)
    assert (np.diff(table["seconds"]) >= 0).all()
    with pytest.raises(UserError, match="no row of 8 workers"):
        links.read_measurements(tmp_path / "a.csv", 8, 8)
    (tmp_path / "b.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="not a table of collectives"):
        links.read_measurements(tmp_path / "b.csv", 2, 2)


def assert_same_but_for_rounding(made, shipped, where="links"):
    """Equal structure and text; numbers to nine digits, since fits round differently from processor to processor."""
    assert type(made) is type(shipped), where
    if isinstance(made, dict):
        assert made.keys() == shipped.keys(), where
        for key in made:
            assert_same_but_for_rounding(made[key], shipped[key], f"{where}/{key}")
    elif isinstance(made, list):
        assert len(made) == len(shipped), where
        for i, (a, b) in enumerate(zip(made, shipped, strict=True)):
            assert_same_but_for_rounding(a, b, f"{where}/{i}")
    elif isinstance(made, float):
        assert made == pytest.approx(shipped, rel=1e-9), where
    else:
        assert made == shipped, where


def test_shipped_link_models_are_what_the_program_makes(shared_data):
    made = links.build(shared_data / "network")
    assert_same_but_for_rounding(json.loads(json.dumps(made["links"])), link_tables())
    rate = link_tables()["h100-dgx"]["fast"]["line"]["bytes_per_second"]
    # what all-reduces among eight carry on each link agrees with the messages between two
    assert link_tables()["h100-dgx"]["cross_check"][-1]["bus_bytes_per_second"] == pytest.approx(rate, rel=0.05)

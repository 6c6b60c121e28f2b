"""Intervals of simulated runs: they hold the figure, narrow with evenness, and compare runs in pairs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from moeless.experiments import endtoend, serving, timing
from moeless.experiments.base import Options
from moeless.experiments.catalogue import find
from moeless.experiments.cells import intervals
from moeless.experiments.cells.serving import serve
from moeless.experiments.publish import drawn_in_turn
from moeless.experiments.runner import closure
from moeless.metrics.requests import WAITS
from moeless.simulator import tally
from moeless.simulator.record import MARKS, LayerRecord
from moeless.spec import preset
from moeless.traces.synthetic import SyntheticParams, write_synthetic


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("trace") / "trace"
    params = SyntheticParams(prompt_tokens=12, output_tokens=6)
    write_synthetic(folder, preset("bundled"), requests=40, params=params)
    common = {"cluster": "cpu8", "batching": "continuous", "max_requests": 12, "request_rate": 4.0, "seed": 0}
    return {
        (policy, costs): serve({"policy": policy, "costs": costs, **common}, [str(folder)])
        for policy in ("static", "eplb:history", "oracle")
        for costs in ("paper", "roofline")
    }


def test_every_interval_holds_its_figure_and_the_same_run_gives_the_same(rows: dict) -> None:
    for row in rows.values():
        for name in (
            "layer.mean_ms",
            "layer.replicas",
            "billing.paper",
            "request.mean_ttft_ms",
            "request.mean_e2el_ms",
        ):
            low, high = serving.interval(row, name)
            assert low <= serving.read(row, name) * (1 + 1e-9), name
            assert high >= serving.read(row, name) * (1 - 1e-9), name
        middle, low, high = serving.distribution(row)
        assert (low <= high).all()
        assert len(middle) == 101
        assert serving.cell(row).policy == row["policy"]


def test_runs_of_one_workload_are_compared_in_pairs(rows: dict) -> None:
    static, other = rows["static", "paper"], rows["eplb:history", "paper"]
    assert serving.ratio(static, static) == pytest.approx((1.0, 1.0, 1.0))
    middle, low, high = serving.ratio(other, static)
    assert low <= middle <= high
    alone = np.array(serving.interval(other, "layer.mean_ms")) / static["layer"]["mean_ms"]
    # batches differ between each other more than systems do in one batch
    assert high - low < alone[1] - alone[0]
    assert serving.ratio(other, static, "billing.paper")[0] == pytest.approx(
        other["billing"]["paper"] / static["billing"]["paper"]
    )
    assert math.isnan(serving.ratio({**other, "intervals": {}}, static)[1])


def test_a_bill_that_grows_evenly_has_no_width_and_marks_stay_few() -> None:
    record = LayerRecord(2)
    for _ in range(3 * MARKS):
        record.tally[tally.OWN] += 4.0
        record.tally[tally.REPLICAS] += 16.0
        record.append(np.ones((1, 2)))
    assert len(record.marks) <= MARKS
    found = intervals._layers(record, 7.0, np.array([1.0, 0.0]))
    assert found["billing.paper"] == pytest.approx([7.0, 7.0], rel=1e-3)
    assert found["layer.replicas"] == pytest.approx([8.0, 8.0], rel=1e-3)
    assert sum(found["blocks"]["bill"]) == pytest.approx(4.0 * 3 * MARKS)
    record.restart()
    assert record.marks == []


def test_end_to_end_latency_is_drawn_with_its_intervals(rows: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options()
    (source,) = serving.sources_of(options)
    monkeypatch.setattr(endtoend, "_policies", lambda _: ("static", "eplb:history", "oracle"))
    results = {f"{source.key}|{costs}|{policy}": row for (policy, costs), row in rows.items()}
    drawn = endtoend._draw(options, results)
    assert len(drawn.plots) == 2
    (table,) = drawn.data.values()
    assert len(table.rows) == 2 * 3 * 3
    assert all(row[5] <= row[4] * (1 + 1e-9) <= row[6] * (1 + 2e-9) for row in table.rows)
    figure = next(iter(drawn.plots.values())).figure
    assert [axes.get_xlabel() for axes in figure.axes] == [f"{wait} (ms)" for wait in WAITS.values()]


def test_experiments_drawn_side_by_side_are_those_drawn_in_turn(tmp_path: Path) -> None:
    names = ["table2", "table1", "table2"]
    nothing: dict = {name: {} for name in names}
    one, two = (list(drawn_in_turn(names, Options(), nothing, tmp_path, workers)) for workers in (1, 2))
    assert one == two
    assert [list(drawn.data) for drawn in two] == [["memory"], ["models"], ["memory"]]


def test_a_full_run_is_told_to_take_hours_and_a_quick_one_minutes() -> None:
    def minutes(full: bool, workers: int) -> float:
        jobs: dict = {}
        for experiment in find("all"):
            jobs |= closure(experiment.jobs(Options(full=full)).values())
        return timing.plan(jobs.values(), workers)["minutes_about"]

    assert minutes(False, 2) < 20
    assert 60 < minutes(True, 2) < 12 * 60
    assert minutes(True, 8) < minutes(True, 2)

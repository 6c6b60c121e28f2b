"""Sweeps that were stopped go on."""

from __future__ import annotations

import pytest

from moeless.contracts import Policy
from moeless.errors import UserError
from moeless.simulator.bench import BenchConfig
from moeless.simulator.sweep import points, run_sweep
from moeless.traces.synthetic import SyntheticParams, write_synthetic


@pytest.fixture(scope="module")
def planned(tmp_path_factory, spec):
    trace = tmp_path_factory.mktemp("sweep") / "trace"
    write_synthetic(trace, spec, requests=12, params=SyntheticParams(prompt_tokens=8, output_tokens=6))
    policies = (Policy("static"), Policy.parse("eplb:history"))
    config = BenchConfig(trace=trace, policies=policies, costs=("roofline",), max_requests=4)
    return points(config, {"cluster": ("h100x8", "a6000x8"), "request_rate": (1.0, 50.0)})


def test_a_killed_sweep_computes_only_what_it_has_not_finished(planned, tmp_path):
    whole = [cell for _, cell in run_sweep(planned)]
    keep, ran = tmp_path / "sweep.jsonl", []
    killed = run_sweep(planned, keep)
    for _ in range(3):
        next(killed)
    killed.close()
    lines = keep.read_text().splitlines()
    assert len(lines) == 3
    # it died while writing the fourth
    keep.write_text(keep.read_text() + lines[0][:100])
    again = list(run_sweep(planned, keep, lambda name, _: ran.append(name)))
    assert [cell for _, cell in again] == whole
    assert set(ran) == {point.name for point in planned[3:]}
    assert keep.read_text().splitlines()[:3] == lines
    assert len(keep.read_text().splitlines()) == len(planned) == 8


def test_cells_of_other_code_or_another_workload_are_computed_anew(planned, tmp_path, monkeypatch):
    keep = tmp_path / "sweep.jsonl"
    list(run_sweep(planned[:1], keep))
    list(run_sweep(planned[1:2], keep))
    assert len(keep.read_text().splitlines()) == 2
    monkeypatch.setattr("moeless.simulator.sweep.code_hash", lambda: "another")
    list(run_sweep(planned[:1], keep))
    assert len(keep.read_text().splitlines()) == 3


@pytest.mark.parametrize("content", ["no JSON\n{}\n", '{"key": "a"}\n{"key": "b"}\n'])
def test_another_file_is_refused(content, planned, tmp_path):
    keep = tmp_path / "other.txt"
    keep.write_text(content)
    with pytest.raises(UserError, match="line 1 is no finished cell"):
        list(run_sweep(planned, keep))
    assert keep.read_text() == content

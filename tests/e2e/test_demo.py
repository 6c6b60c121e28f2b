"""The demonstration runs every stage and leaves a page that stands on its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moeless.files import read_json
from moeless.metrics.result import read_result


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    import subprocess
    import sys

    out = tmp_path_factory.mktemp("demo") / "run"
    line = [sys.executable, "-m", "moeless", "demo", "--quick", "--no-wandb", "--out", str(out)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return out, done.stdout


def test_the_summary_names_every_policy_under_both_cost_models(demo: tuple[Path, str]) -> None:
    _, printed = demo
    for word in ("static", "eplb:history", "moeless:layer_aware:1", "elastic:layer_aware:1", "oracle", "index.html"):
        assert word in printed
    assert printed.count("roofline") >= 5
    assert printed.count(" paper ") >= 5


def test_every_stage_left_its_file(demo: tuple[Path, str]) -> None:
    out, _ = demo
    manifest = read_json(out / "manifest.json")
    assert manifest["status"] == "ok"
    assert {"command_line", "seed", "versions", "hardware", "git", "start", "end"} <= manifest.keys()
    for name in ("trace/trace.json", "predictor-layer_aware/predictor.json", "plan-moeless.json", "metrics.jsonl"):
        assert (out / name).is_file(), name


def test_results_compare_the_same_work(demo: tuple[Path, str]) -> None:
    cells = read_result(demo[0] / "result.json").cells
    assert len(cells) == 2 * 2 * 5
    # the same requests and tokens under every policy
    assert len({(c.request.completed, c.request.total_output_tokens) for c in cells if c.request}) == 1
    for cell in cells:
        assert cell.evidence == ("simulated" if cell.model == "bundled" else "synthetic")
        assert cell.lossy == (cell.policy == "oracle")
        assert cell.layer.mean_ms > 0
        assert min(cell.billing.paper, cell.billing.resident, cell.billing.gpu_seconds) > 0


def test_elastic_is_not_slower_than_static_where_it_was_given_the_costs(demo: tuple[Path, str]) -> None:
    cells = {(c.model, c.costs, c.policy): c.layer.mean_ms for c in read_result(demo[0] / "result.json").cells}
    for (model, costs, policy), mean in cells.items():
        if policy == "static":
            # the mean is over iterations whose make-up follows from how long earlier ones took
            assert cells[model, costs, "elastic:layer_aware:1"] <= mean * 1.05, (model, costs)


def test_the_page_needs_no_network_and_names_its_evidence(demo: tuple[Path, str]) -> None:
    page = (demo[0] / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)=["']https?:""", page)
    assert page.count("bundled model") > 5
    assert "simulated" in page
    assert "synthetic" in page
    assert page.count("<svg") + page.count("data:image") >= 9

import dataclasses
import json
import math
from pathlib import Path

import pytest

from moeless.errors import UserError
from moeless.metrics import Billing, Cell, LayerMetrics, RequestMetrics, Result, read_result, write_result

FIXTURE = Path(__file__).parents[1] / "fixtures" / "results" / "result.json"


def test_fixture_result_reads_and_writes_back_unchanged(tmp_path):
    result = read_result(FIXTURE)
    write_result(tmp_path / "again.json", result)
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads(FIXTURE.read_text())
    assert read_result(tmp_path / "again.json") == result


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (lambda d: d.update(schema_version=2), "schema_version 2"),
        (lambda d: d.pop("schema_version"), "schema_version None"),
        (lambda d: d["cells"][0].pop("billing"), "lacks the key 'billing'"),
        (lambda d: d["cells"][0].update(colour="red"), "unknown key 'colour'"),
        (lambda d: d["cells"][0]["layer"].update(mean_ms="1"), r"layer\.mean_ms must be a finite number"),
        (lambda d: d["cells"][0]["layer"].update(samples=1.5), "samples must be a whole number"),
        (lambda d: d["cells"][0].update(lossy=1), "lossy must be a bool"),
        (lambda d: d["cells"][0].update(evidence="guessed"), "must be one of measured"),
        (lambda d: d["cells"][0].update(warnings="none"), "must be a list"),
        (lambda d: d["cells"][0].update(layer=None), "must be an object, not null"),
    ],
)
def test_a_result_that_breaks_the_schema_is_refused_by_name(break_it, sentence, tmp_path):
    data = json.loads(FIXTURE.read_text())
    break_it(data)
    (tmp_path / "result.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=sentence):
        read_result(tmp_path / "result.json")


def test_nan_in_a_file_is_refused(tmp_path):
    text = FIXTURE.read_text().replace('"mean_ms": 1.5', '"mean_ms": NaN')
    assert "NaN" in text
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(UserError, match="finite number"):
        read_result(tmp_path / "result.json")


def test_nan_is_never_written_and_leaves_no_file(tmp_path):
    result = read_result(FIXTURE)
    layer = dataclasses.replace(result.cells[0].layer, mean_ms=math.nan)
    broken = Result("x", (dataclasses.replace(result.cells[0], layer=layer),))
    with pytest.raises(ValueError, match="not finite"):
        write_result(tmp_path / "result.json", broken)
    assert list(tmp_path.iterdir()) == []


def test_design_names_are_all_there():
    names = {field.name for field in dataclasses.fields(LayerMetrics)}
    assert {"mean_ms", "p50_ms", "p99_ms", "imbalance", "replicas", "moved_bytes", "warm_rate", "stalls"} <= names
    assert {"paper", "resident", "gpu_seconds"} <= {field.name for field in dataclasses.fields(Billing)}
    assert {"mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "request_goodput", "p99_e2el_ms"} <= {
        field.name for field in dataclasses.fields(RequestMetrics)
    }
    assert {"policy", "trace_kind", "evidence", "warnings"} <= {field.name for field in dataclasses.fields(Cell)}

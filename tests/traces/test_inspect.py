"""Inspection measures what it says, and reproduces the published imbalance of real routing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moeless.errors import UserError
from moeless.spec import preset
from moeless.traces import open_trace
from moeless.traces import statistics as st
from moeless.traces.importers.npz import import_npz
from moeless.traces.inspect import describe


def test_imbalance_is_the_mean_of_ratios_of_contiguous_blocks() -> None:
    load = np.array([[[4, 0, 0, 0], [1, 1, 1, 1]], [[1, 1, 1, 1], [0, 0, 1, 3]]])
    np.testing.assert_allclose(st.contiguous_gpu_loads(load, 2)[0, 0], [4, 0])
    np.testing.assert_allclose(st.imbalance_L(load, 2), [(2 + 1) / 2, (1 + 2) / 2])
    # five experts on two GPUs: the first holds three
    np.testing.assert_allclose(st.contiguous_gpu_loads(np.ones((1, 1, 5)), 2)[0, 0], [3, 2])
    with pytest.raises(UserError, match="4 experts cannot be spread over 5 GPUs"):
        st.imbalance_L(load, 5)


def test_coactivation_is_one_for_independent_experts_and_above_for_partners() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 4, 40_000), rng.integers(4, 8, 40_000)
    ratio = st.coactivation_EE(np.stack([first, second], axis=1).astype(np.uint16), 8)
    np.testing.assert_allclose(ratio[:4, 4:], 1.0, atol=0.08)
    partners = st.coactivation_EE(np.stack([first, first + 4], axis=1).astype(np.uint16), 8)
    np.testing.assert_allclose(np.diag(partners[:4, 4:]), 4.0, rtol=0.05)
    assert np.isnan(np.diag(ratio)).all()


def test_next_layer_gain_sees_a_copied_layer_and_nothing_in_noise() -> None:
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 8, (4000, 2, 1)).astype(np.uint16)
    assert abs(st.next_layer_gain_L(ids, 8)[0]) < 0.05
    ids[:, 1] = ids[:, 0]
    assert st.next_layer_gain_L(ids, 8)[0] == pytest.approx(1 - 1 / 8, abs=0.05)


@pytest.fixture(scope="module")
def gpt_oss(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("real") / "gpt-oss-20b"
    import_npz(shared_data / "routing" / "gpt-oss-20b.npz", out, preset("gpt-oss-20b"))
    return out


def test_real_routing_shows_its_reference_imbalance(gpt_oss: Path) -> None:
    made = describe(open_trace(gpt_oss), gpus=8)
    on_8 = {name.partition(" (")[0]: values[made.gpu_counts.index(8)] for name, values in made.windows}
    assert on_8["all tokens of one request"] == pytest.approx(1.85, abs=0.02)
    assert on_8["all tokens of 16 requests pooled"] == pytest.approx(1.49, abs=0.02)
    assert on_8["decode step of 16 requests"] == pytest.approx(1.65, abs=0.02)


def test_command_writes_tables_figures_and_page(cli: Callable, token_trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    status, text, err = cli("inspect", token_trace, "--gpus", "3", "--check", "--out", out, "--json")
    assert status == 0, err
    shown = json.loads(text)
    assert shown["facts"]["tokens"] == 119
    assert shown["checked"] is True
    assert {"popularity.png", "imbalance-batch.png", "coactivation.png", "drift.png", "prefill-decode.png"} <= {
        entry.name for entry in (out / "figures").iterdir()
    }
    assert "<svg" in (out / "index.html").read_text()


def test_every_kind_can_be_described(make_iterations: Callable, make_counts: Callable) -> None:
    iterations, counts = describe(open_trace(make_iterations()), gpus=2), describe(open_trace(make_counts()), gpus=2)
    assert iterations.facts["iterations"] == 7
    assert iterations.load_decode_LE.sum() == iterations.load_LE.sum()
    assert counts.facts["iterations"] == 9
    assert counts.load_LE.sum() == 9 * 20 * 2 * 3
    assert all(1.0 <= value <= 2.0 for _, values in counts.windows for value in values if value)


def test_command_refuses_a_trace_cut_in_half(cli: Callable, token_trace: Path, tmp_path: Path) -> None:
    shard = token_trace / "tokens-00000.parquet"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    status, _, err = cli("inspect", token_trace, "--out", tmp_path / "run")
    assert status == 2
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()

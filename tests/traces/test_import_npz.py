"""The NPZ layout is read faithfully, and anything else refused in a sentence."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeless.errors import UserError
from moeless.spec import MoESpec, preset
from moeless.traces import TokenTrace, open_trace
from moeless.traces.importers.npz import import_npz


def _arrays(spec: MoESpec, random_topk: Callable) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "experts": random_topk(rng, 20, spec).astype(np.uint8),
        "probs": rng.random((20, spec.L, spec.K)).astype(np.float16),
        "offsets": np.array([0, 4, 20]),
        "category": np.array(["maths", "code"]),
    }


def test_npz_gives_a_token_trace_of_generated_tokens(tmp_path: Path, spec: MoESpec, random_topk: Callable) -> None:
    arrays = _arrays(spec, random_topk)
    np.savez_compressed(tmp_path / "r.npz", **arrays)
    import_npz(tmp_path / "r.npz", tmp_path / "out", spec)
    trace = open_trace(tmp_path / "out", check=True)
    assert isinstance(trace, TokenTrace)
    np.testing.assert_array_equal(trace.load_topk(), arrays["experts"])
    np.testing.assert_array_equal(trace.weights(0, 20), arrays["probs"])
    assert (trace.phase_T == 1).all()
    assert (trace.token_T == -1).all()
    assert trace.requests.prompt_tokens.tolist() == [0, 0]
    assert trace.requests.output_tokens.tolist() == [4, 16]
    assert trace.requests.category == ["maths", "code"]


def test_prompt_tokens_split_a_request_into_phases(tmp_path: Path, spec: MoESpec, random_topk: Callable) -> None:
    arrays = _arrays(spec, random_topk) | {"prompt_tokens": np.array([3, 10]), "tokens": np.arange(20)}
    del arrays["probs"]
    np.savez(tmp_path / "r.npz", **arrays)
    import_npz(tmp_path / "r.npz", tmp_path / "out", spec)
    trace = open_trace(tmp_path / "out", check=True)
    assert isinstance(trace, TokenTrace)
    assert trace.phase_T.tolist() == [0] * 3 + [1] + [0] * 10 + [1] * 6
    assert trace.token_T.tolist() == list(range(20))
    assert not trace.has_weights


def _malformed(spec: MoESpec, arrays: dict[str, Any], how: str) -> dict[str, Any]:
    experts = arrays["experts"]
    out_of_range = experts.copy()
    out_of_range[0, 0, 0] = spec.E
    return (
        arrays
        | {
            "float ids": {"experts": experts.astype(np.float32)},
            "ids": {"experts": out_of_range},
            "flat": {"experts": experts.reshape(20, -1)},
            "layers": {"experts": experts[:, :2]},
            "empty": {"experts": experts[:0], "probs": arrays["probs"][:0], "offsets": np.array([0, 0])},
            "ragged": {"offsets": np.array([0, 4, 19])},
            "descending": {"offsets": np.array([0, 20, 20])},
            "pickle": {"category": np.array([{"a": 1}, print], dtype=object)},
            "probs": {"probs": arrays["probs"][:5]},
            "nan": {"probs": np.full_like(arrays["probs"], np.nan)},
            "category": {"category": np.array(["one"])},
        }[how]
    )


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("float ids", "whole numbers"),
        ("ids", r"lie in 0\.\.5, got 6"),
        ("flat", "axes"),
        ("layers", "3 MoE layers and top-2"),
        ("empty", "0 tokens"),
        ("ragged", "end at the number of tokens, 20"),
        ("descending", "ascend"),
        ("pickle", "pickled"),
        ("probs", "probs must be"),
        ("nan", "not finite"),
        ("category", "category must be 2 entries"),
    ],
)
def test_malformed_npz_is_refused(
    tmp_path: Path, spec: MoESpec, random_topk: Callable, how: str, sentence: str
) -> None:
    np.savez(tmp_path / "r.npz", **_malformed(spec, _arrays(spec, random_topk), how))
    with pytest.raises(UserError, match=sentence) as raised:
        import_npz(tmp_path / "r.npz", tmp_path / "out", spec)
    assert "\n" not in str(raised.value)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["r.npz"]


@pytest.mark.parametrize("kept", [0, 10, 700])
def test_a_truncated_npz_is_refused(tmp_path: Path, spec: MoESpec, random_topk: Callable, kept: int) -> None:
    np.savez(tmp_path / "r.npz", **_arrays(spec, random_topk))
    content = (tmp_path / "r.npz").read_bytes()
    (tmp_path / "r.npz").write_bytes(content[:kept])
    with pytest.raises(UserError):
        import_npz(tmp_path / "r.npz", tmp_path / "out", spec)
    assert not (tmp_path / "out").exists()


def test_a_damaged_array_is_refused_while_it_streams(tmp_path: Path, spec: MoESpec, random_topk: Callable) -> None:
    path = tmp_path / "r.npz"
    np.savez(path, **_arrays(spec, random_topk))
    content = bytearray(path.read_bytes())
    # the last bytes of experts lie before the next member's head
    at = content.index(b"PK\x03\x04", 4) - 3
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a whole NPZ archive"):
        import_npz(path, tmp_path / "out", spec)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("head", "sentence"),
    [
        ("{'descr': '<u2', 'fortran_order': False, 'shape': (10**15, 3, 2), }", "no plain header"),
        ("{'descr': '<u2', 'fortran_order': False, 'shape': (1000000000000, 3, 2), }", "not the size"),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (20, 3, 2), }", "pickled"),
        ("__import__('os').abort()", "no plain header"),
    ],
)
def test_an_array_is_not_believed_by_its_header(
    tmp_path: Path, spec: MoESpec, random_topk: Callable, head: str, sentence: str
) -> None:
    arrays = _arrays(spec, random_topk)
    del arrays["experts"]
    np.savez(tmp_path / "r.npz", **arrays)
    text = head.encode("latin1") + b"\n"
    with zipfile.ZipFile(tmp_path / "r.npz", "a") as archive:
        archive.writestr("experts.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + b"\0" * 240)
    with pytest.raises(UserError, match=sentence):
        import_npz(tmp_path / "r.npz", tmp_path / "out", spec)


def test_an_array_in_fortran_order_is_read_too(tmp_path: Path, spec: MoESpec, random_topk: Callable) -> None:
    arrays = _arrays(spec, random_topk)
    np.savez(tmp_path / "r.npz", **arrays | {"experts": np.asfortranarray(arrays["experts"])})
    import_npz(tmp_path / "r.npz", tmp_path / "out", spec)
    trace = open_trace(tmp_path / "out")
    assert isinstance(trace, TokenTrace)
    np.testing.assert_array_equal(trace.load_topk(), arrays["experts"])


def test_command_imports_real_routing(tmp_path: Path, shared_data: Path, cli) -> None:
    source = shared_data / "routing" / "gpt-oss-20b.npz"
    status, out, err = cli(
        "import-trace", "--from", "npz", source, "--model", "gpt-oss-20b", "--out", tmp_path / "t", "--json"
    )
    assert status == 0, err
    assert '"rows": 189976' in out
    trace = open_trace(tmp_path / "t")
    assert trace.spec == preset("gpt-oss-20b")
    with np.load(source) as arrays:
        assert isinstance(trace, TokenTrace)
        np.testing.assert_array_equal(trace.topk(100_000, 100_500), arrays["experts"][100_000:100_500])


@pytest.mark.parametrize(
    "arguments",
    [
        ("--from", "npz"),
        ("--from", "npz", "--model", "nonsense"),
        ("--from", "nonsense", "--model", "bundled"),
        ("--from", "npz", "--model", "bundled", "--layers", "3"),
    ],
)
def test_command_refuses_wrong_requests_with_a_sentence(tmp_path: Path, cli, arguments: tuple[str, ...]) -> None:
    status, _, err = cli("import-trace", tmp_path / "none.npz", "--out", tmp_path / "t", *arguments)
    assert status == 2
    assert err.count("\n") == 1
    assert not (tmp_path / "t").exists()

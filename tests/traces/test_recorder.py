"""Recording the bundled model: faithful, deterministic, resumable, bounded by what was asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moeless.errors import UserError
from moeless.spec import preset
from moeless.traces import TokenTrace, open_trace
from moeless.traces.generation import Sampling
from moeless.traces.hf_model import LoadedModel, LoadOptions, load_model
from moeless.traces.recorder import RecordSettings, record

TEXTS = [
    "The capital of France is",
    "def add(a, b):\n    return",
    "x",
    "If a train leaves at noon and travels for three hours at sixty miles an hour, then",
    "Write a poem about the sea.",
]
PROMPTS = [SimpleNamespace(text=text, category="ab"[i % 2], source_id=f"p{i}") for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def loaded(bundled_model: Path) -> LoadedModel:
    torch.set_num_threads(1)
    return load_model(str(bundled_model), LoadOptions(device="cpu", dtype="float32"), name="bundled")


def open_tokens(path: Path) -> TokenTrace:
    trace = open_trace(path, check=True)
    assert isinstance(trace, TokenTrace)
    return trace


def _keep(seen: list[Any], _module: Any, args: tuple[Any, ...]) -> None:
    seen.append(args[0].reshape(-1, 192))


def test_routing_of_the_bundled_model_is_its_routers_decision(loaded: LoadedModel, bundled_model: Path, tmp_path: Path):
    """Softmax of the stored gate matrices times what each gate sees, the two largest, renormalised."""
    settings = RecordSettings(max_new_tokens=8, batch_size=3, router_inputs="bfloat16")
    record(loaded, PROMPTS, tmp_path / "t", settings)
    trace = open_tokens(tmp_path / "t")
    spec = preset("bundled")
    assert (trace.spec.L, trace.spec.E, trace.spec.K, trace.spec.hidden_size) == (spec.L, spec.E, spec.K, 192)
    stored = load_file(bundled_model / "model.safetensors")
    gates = (
        [stored[f"model.layers.{i}.block_sparse_moe.gate.weight"].float() for i in range(spec.L)]
        if ("model.layers.0.block_sparse_moe.gate.weight" in stored)
        else [stored[f"model.layers.{i}.mlp.gate.weight"].float() for i in range(spec.L)]
    )
    for request in range(len(PROMPTS)):
        rows = trace.rows(request)
        seen: list[Any] = []
        handles = [
            layer.mlp.gate.register_forward_pre_hook(partial(_keep, seen)) for layer in loaded.model.model.layers
        ]
        with torch.inference_mode():
            loaded.model(torch.from_numpy(trace.token_T[rows].astype(np.int64))[None], use_cache=False)
        for handle in handles:
            handle.remove()
        for layer in range(spec.L):
            chances = torch.softmax(seen[layer] @ gates[layer].T, dim=-1)
            values, ids = chances.topk(spec.K, dim=-1)
            np.testing.assert_array_equal(trace.topk(rows.start, rows.stop)[:, layer], ids.numpy())
            weights = (values / values.sum(-1, keepdim=True)).numpy()
            np.testing.assert_allclose(trace.weights(rows.start, rows.stop)[:, layer], weights, atol=2e-3)
            inputs = trace.router_inputs(rows.start, rows.stop)[:, layer]
            np.testing.assert_allclose(inputs, seen[layer].numpy(), rtol=1e-2, atol=1e-2)


def test_greedy_tokens_are_those_of_plain_generation(loaded: LoadedModel, tmp_path: Path) -> None:
    record(loaded, PROMPTS, tmp_path / "t", RecordSettings(max_new_tokens=10, batch_size=5))
    trace = open_tokens(tmp_path / "t")
    for request, prompt in enumerate(PROMPTS):
        ids = loaded.tokenizer(prompt.text, return_tensors="pt")["input_ids"]
        plain = loaded.model.generate(ids, do_sample=False, max_new_tokens=10)[0].tolist()
        stored = trace.token_T[trace.rows(request)].tolist()
        assert stored == plain[: len(stored)]
        assert trace.requests.prompt_tokens[request] == ids.shape[1]
        assert len(stored) == ids.shape[1] + trace.requests.output_tokens[request] - 1
    assert trace.requests.category == [prompt.category for prompt in PROMPTS]
    assert trace.requests.source_id == [prompt.source_id for prompt in PROMPTS]


def test_sampling_depends_on_seed_and_request_not_on_the_batch(loaded: LoadedModel, tmp_path: Path) -> None:
    def tokens(name: str, batch_size: int, seed: int) -> list[list[int]]:
        settings = RecordSettings(max_new_tokens=12, batch_size=batch_size, sampling=Sampling(1.0, 0.95, seed))
        record(loaded, PROMPTS, tmp_path / name, settings)
        trace = open_tokens(tmp_path / name)
        return [trace.token_T[trace.rows(request)].tolist() for request in range(trace.num_requests)]

    first = tokens("a", 2, 1)
    assert first == tokens("b", 5, 1)
    assert first != tokens("c", 2, 2)


def test_output_lengths_can_be_forced(loaded: LoadedModel, tmp_path: Path) -> None:
    lengths = [1, 17, 4, 9, 2]
    record(loaded, PROMPTS, tmp_path / "t", RecordSettings(batch_size=4, lengths=lengths))
    trace = open_tokens(tmp_path / "t")
    assert trace.requests.output_tokens.tolist() == lengths
    assert (trace.rows_N - trace.requests.prompt_tokens).tolist() == [length - 1 for length in lengths]


def test_recording_again_with_other_settings_is_refused(loaded: LoadedModel, tmp_path: Path) -> None:
    record(loaded, PROMPTS[:2], tmp_path / "t", RecordSettings(max_new_tokens=2))
    with pytest.raises(UserError, match="max_new_tokens was 2, now 3"):
        record(loaded, PROMPTS[:2], tmp_path / "t", RecordSettings(max_new_tokens=3))


_KILLED = """
import sys
from pathlib import Path
from types import SimpleNamespace
import torch
torch.set_num_threads(1)
from moeless.traces.hf_model import LoadOptions, load_model
from moeless.traces.recorder import RecordSettings, record
model, out, times, texts = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
loaded = load_model(model, LoadOptions(device="cpu", dtype="float32"), name="bundled")
prompts = [SimpleNamespace(text=text, category="a", source_id="") for text in texts] * times
settings = RecordSettings(max_new_tokens=6, batch_size=2, shard_rows=40)
print("start", flush=True)
record(loaded, prompts, out, settings, on_batch=lambda done, total, rows: print(done, flush=True))
print("end", flush=True)
"""


def _run_and_kill(bundled_model: Path, out: Path, after: int | None, *, times: int = 8, delay: float = 0.0) -> bool:
    """Start a recording, kill -9 it so many batches and seconds later; True when it ended by itself."""
    command = [sys.executable, "-c", _KILLED, str(bundled_model), str(out), str(times), *TEXTS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}) as run:
        assert run.stdout is not None
        batches = -1
        for line in run.stdout:
            if line.strip() == "end":
                run.wait()
                return True
            batches += 1
            if after is not None and batches >= after:
                with suppress(subprocess.TimeoutExpired):
                    run.wait(timeout=delay)
                run.send_signal(signal.SIGKILL)
                break
    return False


def _equal_folders(one: Path, two: Path) -> None:
    names = sorted(entry.name for entry in one.iterdir())
    assert names == sorted(entry.name for entry in two.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_a_killed_recording_resumes_to_the_same_bytes(bundled_model: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    prompts = [SimpleNamespace(text=text, category="a", source_id="") for text in TEXTS] * 8
    settings = RecordSettings(max_new_tokens=6, batch_size=2, shard_rows=40)
    record(loaded, prompts, tmp_path / "whole", settings)
    assert not _run_and_kill(bundled_model, tmp_path / "killed", 7)
    with pytest.raises(UserError, match="not complete"):
        open_trace(tmp_path / "killed")
    record(loaded, prompts, tmp_path / "killed", settings)
    _equal_folders(tmp_path / "whole", tmp_path / "killed")
    assert len(open_tokens(tmp_path / "whole").info.shards) > 3


@pytest.mark.long
def test_ten_random_kills_lose_and_double_nothing(bundled_model: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    times = 24
    prompts = [SimpleNamespace(text=text, category="a", source_id="") for text in TEXTS] * times
    record(loaded, prompts, tmp_path / "whole", RecordSettings(max_new_tokens=6, batch_size=2, shard_rows=40))
    rng = np.random.default_rng(0)
    for _ in range(10):
        after, delay = int(rng.integers(0, 3)), float(rng.uniform(0.0, 0.1))
        assert not _run_and_kill(bundled_model, tmp_path / "killed", after, times=times, delay=delay)
    assert _run_and_kill(bundled_model, tmp_path / "killed", None, times=times)
    _equal_folders(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("no-such-owner/no-such-model",), "neither a local folder nor"),
        (("./no/such/folder",), "no model folder"),
        (("bundled", "missing.jsonl"), "missing.jsonl"),
        (("bundled", "bundled", "--dtype", "int3", "--max-requests", "1"), "int3"),
        (("bundled", "bundled", "--device", "abacus", "--max-requests", "1"), "abacus"),
    ],
)
def test_wrong_requests_are_one_sentence_and_leave_nothing(
    cli: Callable, tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    status, _, err = cli("trace", *arguments, "--out", tmp_path / "t")
    assert status == 2
    assert sentence in err
    assert err.count("\n") == 1
    assert not (tmp_path / "t").exists()


def test_command_records_the_bundled_model(cli: Callable, tmp_path: Path) -> None:
    arguments = ("trace", "--max-requests", "3", "--max-new-tokens", "4", "--dtype", "float32", "--device", "cpu")
    status, out, err = cli(*arguments, "--out", tmp_path / "t", "--json")
    assert status == 0, err
    trace = open_tokens(tmp_path / "t")
    assert trace.num_requests == 3
    assert trace.spec.name == "bundled"
    assert f'"rows": {trace.num_tokens}' in out
    status, out, _ = cli(*arguments, "--out", tmp_path / "u", "--dry-run")
    assert status == 0
    assert '"model_bytes"' in out
    assert not (tmp_path / "u").exists()
    status, _, err = cli(*arguments, "--out", tmp_path / "t")
    assert status == 2
    assert "complete trace" in err

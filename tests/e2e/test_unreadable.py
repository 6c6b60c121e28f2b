"""What may not be read or written ends in one sentence that names it, exit status 2: on shared machines files belong to
others."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from moeless.predictors.train_evaluate import FitJob, run_fit
from moeless.spec import preset
from moeless.traces import RequestRows, TokenTraceWriter, TraceInfo, open_trace

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
ASSETS = ROOT / "moeless" / "assets"


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small input of every kind, all readable."""
    made = tmp_path_factory.mktemp("given")
    for kind in ("tokens", "counts"):
        shutil.copytree(FIXTURES / "traces" / kind, made / kind)
    _with_inputs(made / "inputs")
    run_fit(FitJob(made / "tokens", "transition", evaluate=False), made / "predictor")
    shutil.copy(FIXTURES / "plans" / "elastic.json", made / "plan.json")
    shutil.copy(ASSETS / "profiles" / "cpu-bundled.json", made / "profile.json")
    (made / "spec.json").write_text(json.dumps(preset("bundled").to_json()))
    (made / "preset.json").write_text("{}")
    (made / "options.yaml").write_text("seed: 1\n")
    (made / "arrivals.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0.0,4,4\n1.0,4,4\n")
    (made / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (made / "prompts.txt").write_text("a\n")
    (made / "rows.csv").write_text("layer,token,experts\n0,0,0 1\n")
    (made / "router_trace_rank0.jsonl").write_text("{}\n")
    (made / "stats").mkdir()
    (made / "stats" / "meta_info.json").write_text('{"num_experts": 4, "num_experts_per_token": 2}')
    (made / "stats" / "rank0.safetensors").write_bytes(b"")
    np.savez(made / "rows.npz", experts=np.zeros((1, 1, 2), np.int64), offsets=np.array([0, 1]))
    pq.write_table(pa.table({"prompt": ["a"]}), made / "rows.parquet")
    torch.save({"logical_count": torch.zeros(1, 1, 4)}, made / "dump.pt")
    (made / "run").mkdir()
    shutil.copy(FIXTURES / "results" / "result.json", made / "run" / "result.json")
    (made / "run" / "manifest.json").write_text('{"format": 1}')
    shutil.copytree(made / "run", made / "other")
    (made / "model").mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
        # copies only of what is made unreadable
        (made / "model" / name).symlink_to(ASSETS / "model" / name)
    return made


def _with_inputs(path: Path) -> None:
    trace = open_trace(FIXTURES / "traces" / "tokens")
    spec = trace.spec
    writer = TokenTraceWriter(path, TraceInfo("tokens", spec, {}, has_weights=False, router_input_dtype="bfloat16"))
    random = np.random.default_rng(0)
    for request in range(8):
        topk_TLK = np.argsort(random.random((6, spec.L, spec.E)))[..., : spec.K]
        seen_TLH = torch.randn(6, spec.L, spec.hidden_size).to(torch.bfloat16)
        writer.append([RequestRows(request, topk_TLK, 3, 4, input_TLH=seen_TLH)])
    writer.close()


@pytest.fixture
def here(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with those inputs."""
    shutil.copytree(given, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def _refused(cli, line: str, name: str) -> str:
    status, out, err = cli(*line.split())
    sentences = err.strip().splitlines()
    assert status == 2, err
    assert len(sentences) == 1, err
    assert out == ""
    assert sentences[0].startswith("moeless: ")
    path = Path(name)
    assert path.name in sentences[0] or path.parent.name in sentences[0].replace("/", " ").split(), sentences[0]
    return sentences[0]


SHAPES = "--layers 1 --experts 4 --top-k 2 --out out"
SERVE = "serve-bench --backend sim --max-requests 2 --policy static --cluster cpu2 --out out"


@pytest.mark.usefixtures("ordinary_rights")
@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("tokens", "plan tokens --out out"),
        ("tokens/trace.json", "plan tokens --out out"),
        ("tokens/trace.json", f"{SERVE} --trace tokens"),
        ("tokens/trace.json", "reproduce fig4 --trace tokens --out out --cache cache"),
        ("tokens/trace.json", "tune tokens --trials 1 --out out"),
        ("tokens/tokens-00000.parquet", "plan tokens --out out"),
        ("tokens/tokens-00001.parquet", f"{SERVE} --trace tokens"),
        ("tokens/tokens-00000.parquet", "train-predictor tokens --method transition --out out"),
        ("tokens/requests.parquet", "plan tokens --out out"),
        ("tokens/requests.parquet", "inspect tokens"),
        ("inputs/router_inputs-00000.safetensors", "train-predictor inputs --method layer_aware --out out"),
        ("inputs/router_inputs-00000.safetensors", "inspect inputs --check"),
        ("counts/counts-00000.parquet", "plan counts --out out"),
        ("predictor", f"{SERVE} --trace tokens --policy moeless:transition --predictor predictor"),
        ("predictor/predictor.json", f"{SERVE} --trace tokens --policy moeless:transition --predictor predictor"),
        ("predictor/weights.safetensors", f"{SERVE} --trace tokens --policy moeless:transition --predictor predictor"),
        ("predictor/predictor.json", "evaluate-predictor predictor tokens"),
        ("predictor/weights.safetensors", "evaluate-predictor predictor tokens"),
        ("prompts.jsonl", "trace bundled prompts.jsonl --out out"),
        ("prompts.txt", "trace bundled prompts.txt --out out"),
        ("rows.parquet", "trace bundled rows.parquet --out out"),
        ("arrivals.csv", "trace bundled bundled --max-requests 1 --lengths-from arrivals.csv --out out"),
        ("arrivals.csv", f"{SERVE} --trace tokens --arrivals arrivals.csv"),
        ("rows.npz", f"import-trace rows.npz --from npz {SHAPES}"),
        ("rows.csv", f"import-trace rows.csv --from csv {SHAPES}"),
        ("rows.parquet", f"import-trace rows.parquet --from parquet {SHAPES}"),
        ("router_trace_rank0.jsonl", f"import-trace router_trace_rank0.jsonl --from megatron {SHAPES}"),
        ("dump.pt", f"import-trace dump.pt --from sglang {SHAPES}"),
        ("stats/meta_info.json", f"import-trace stats --from tensorrt-llm {SHAPES}"),
        ("stats/rank0.safetensors", f"import-trace stats --from tensorrt-llm {SHAPES}"),
        ("spec.json", "import-trace rows.csv --from csv --model spec.json --out out"),
        ("plan.json", "export-plan plan.json --engine sglang --out out"),
        ("preset.json", f"{SERVE} --trace tokens --preset preset.json"),
        ("profile.json", f"{SERVE} --trace tokens --costs measured:profile.json"),
        ("options.yaml", "plan tokens --config options.yaml --out out"),
        ("model/config.json", "trace model bundled --max-requests 1 --out out"),
        ("model/model.safetensors", "trace model bundled --max-requests 1 --out out"),
        ("model/tokenizer.json", "trace model bundled --max-requests 1 --out out"),
        ("model/config.json", "serve-bench --backend live --model model --policy static --out out"),
        ("model/model.safetensors", "serve-bench --backend live --model model --policy static --out out"),
        ("model/model.safetensors", "train-predictor inputs --method gate_reuse --model model --out out"),
        ("run/result.json", "compare run other --out out"),
        ("run/manifest.json", "compare run other --out out"),
        ("run/result.json", "reproduce live --live run --out out --cache cache"),
    ],
)
def test_an_input_that_may_not_be_read_is_named(cli, here: Path, name: str, line: str) -> None:
    path = here / name
    if path.is_symlink():
        original = path.resolve()
        path.unlink()
        shutil.copy(original, path)
    before = path.stat().st_mode
    path.chmod(0)
    try:
        sentence = _refused(cli, line, name)
    finally:
        path.chmod(before)
    # the command line's parser may look before anything is opened
    assert "permission denied" in sentence.lower() or "is not readable" in sentence
    # nothing is wrong with the file, so nobody is told to make it again
    assert "again" not in sentence
    assert not (here / "out").exists()


#: Every command that leaves something, without what it would be written to.
WRITERS = [
    "plan tokens",
    "trace bundled bundled --max-requests 1",
    "import-trace rows.csv --from csv --layers 1 --experts 4 --top-k 2",
    "train-predictor tokens --method transition",
    "evaluate-predictor predictor tokens",
    "export-plan plan.json --engine sglang",
    "profile --model bundled --quick",
    "serve-bench --backend sim --trace tokens --max-requests 2 --policy static --cluster cpu2",
    "tune tokens --trials 1",
    "compare run other",
    "reproduce table1 --cache cache",
    "demo --quick",
]


@pytest.mark.usefixtures("ordinary_rights")
@pytest.mark.parametrize("line", WRITERS)
def test_an_output_in_a_folder_that_takes_no_files_is_refused(cli, here: Path, line: str) -> None:
    (here / "closed").mkdir()
    (here / "closed").chmod(0o555)
    _refused(cli, f"{line} --out closed/out", "closed/out")
    assert list((here / "closed").iterdir()) == []


@pytest.mark.usefixtures("ordinary_rights")
def test_a_cache_that_takes_no_files_is_refused(cli, here: Path) -> None:
    (here / "closed").mkdir(mode=0o555)
    _refused(cli, "reproduce table1 --out out --cache closed/cache", "closed/cache")


@pytest.mark.usefixtures("ordinary_rights")
@pytest.mark.parametrize(
    "line", ["plan tokens", "export-plan plan.json --engine sglang", "profile --model bundled --quick"]
)
def test_a_file_that_is_protected_from_writing_stays(cli, here: Path, line: str) -> None:
    kept = here / "kept.json"
    kept.write_text("kept")
    kept.chmod(0o444)
    _refused(cli, f"{line} --out kept.json", "kept.json")
    # nor is one replaced in a folder that takes no new files
    kept.chmod(0o644)
    (here / "closed").mkdir()
    moved = kept.rename(here / "closed" / "kept.json")
    (here / "closed").chmod(0o555)
    _refused(cli, f"{line} --out closed/kept.json", "closed/kept.json")
    assert moved.read_text() == "kept"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_what_is_written_can_be_read_by_whom_the_umask_lets(cli, here: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        _with_inputs(here / "recorded")
        for line in (
            "train-predictor tokens --method transition --out fitted",
            "plan tokens --out made.json",
            "export-plan plan.json --engine sglang --fill --out exported.json",
        ):
            status, _, err = cli(*line.split())
            assert status == 0, err
    finally:
        os.umask(before)
    folders = [here / "recorded", here / "fitted"]
    files = [here / "made.json", here / "exported.json", *(path for folder in folders for path in folder.rglob("*"))]
    assert {"router_inputs-00000.safetensors", "weights.safetensors"} <= {path.name for path in files}
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {path.name: oct(mode) for path in files}
    assert {oct(folder.stat().st_mode & 0o777) for folder in folders} == {oct(0o777 & ~umask)}

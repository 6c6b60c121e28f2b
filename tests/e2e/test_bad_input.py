"""What a newcomer gets wrong is answered by one sentence, exit status 2, and nothing left behind."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _refused(cli, arguments: list[object], words: str, here: Path) -> None:
    before = sorted(path.relative_to(here) for path in here.rglob("*"))
    status, out, err = cli(*arguments)
    sentences = [line for line in err.strip().splitlines() if line]
    assert status == 2, err
    assert out == ""
    assert len(sentences) == 1, err
    assert sentences[0].startswith("moeless: ")
    assert words in sentences[0], sentences[0]
    assert sorted(path.relative_to(here) for path in here.rglob("*")) == before


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("trace ./no-such-model bundled --out t", "no-such-model"),
        ("trace nobody/no-such-model bundled --out t", "nobody/no-such-model"),
        ("trace bundled no-such-file.jsonl --out t", "no-such-file.jsonl"),
        ("trace bundled lmsys/lmsys-chat-1m --out t", "lmsys/lmsys-chat-1m"),
        ("trace bundled bundled --max-requests 0 --out t", "--max-requests"),
        ("import-trace no-such.npz --from npz --model gpt-oss-20b --out t", "no-such.npz"),
        ("train-predictor no-such-trace --method layer_aware --out p", "no-such-trace"),
        ("plan no-such-trace --out plan.json", "no-such-trace"),
        ("plan no-such-trace --planner nonsense --out plan.json", "nonsense"),
        ("serve-bench --backend sim --trace no-such-trace --policy static", "no-such-trace"),
        ("serve-bench --backend sim --policy static", "--trace"),
        ("models no-such-model", "no-such-model"),
        ("demo --config no-such.yaml", "no-such.yaml"),
    ],
)
def test_what_does_not_exist_is_named(cli, here: Path, line: str, words: str) -> None:
    _refused(cli, list(line.split()), words, here)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--policy nonsense", "nonsense"),
        ("--policy moeless:nonsense:1", "nonsense"),
        ("--policy moeless:layer_aware:0", "distance"),
        ("--policy static --cluster nonsense", "nonsense"),
        ("--policy static --costs nonsense", "nonsense"),
        ("--policy static --arrivals nonsense", "nonsense"),
        ("--policy static --arrivals no-such.csv", "no-such.csv"),
        ("--policy static --lengths nonsense", "nonsense"),
        ("--policy static --batching nonsense", "nonsense"),
        ("--policy static --model mixtral-8x7b", "mixtral-8x7b"),
        ("--policy static --goodput nonsense", "nonsense"),
        ("--policy static --request-rate -1", "rate"),
        ("--policy static --arrivals-window 5", "START:STOP"),
        ("--policy static --arrivals-window 0:5", "applies to a request trace's file"),
        ("--policy static --time-scale 0", "factor"),
        ("--policy static --time-scale 2 --request-rate 1", "give one of them"),
        ("--policy static --requests-per-gpu -1", "above 0"),
        ("--policy moeless:history --requests-per-gpu nan", "above 0"),
        ("--policy moeless:history --requests-per-gpu inf", "above 0"),
        ("--policy static --container inf", "container's start"),
        ("--policy static --start inf", "instance's start"),
        ("--policy static --replan nan", "between EPLB's plans"),
        ("--policy static --fail-gpu nan:0", "--fail-gpu"),
        ("--policy static --fail-gpu 1:0:inf", "--fail-gpu"),
        ("--policy static --cluster h100x8 --cluster cpu2 --fail-gpu 1:5", "GPU 5"),
        ("--policy static --request-rate 1 --request-rate 0", "rate"),
    ],
)
def test_an_unknown_part_of_a_benchmark_is_named(cli, here: Path, recorded: Path, options: str, words: str) -> None:
    _refused(cli, ["serve-bench", "--backend", "sim", "--trace", recorded, *options.split()], words, here)


@pytest.mark.parametrize("command", ["serve-bench --policy static --trace", "plan", "train-predictor --out p"])
def test_a_trace_cut_in_half_is_refused(cli, here: Path, recorded: Path, command: str) -> None:
    broken = here / "half"
    shutil.copytree(recorded, broken)
    shard = next(broken.glob("tokens-*.parquet"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    _refused(cli, [*command.split(), broken], shard.name, here)


def test_an_unfinished_recording_is_refused_by_readers(cli, here: Path, recorded: Path) -> None:
    broken = here / "unfinished"
    shutil.copytree(recorded, broken)
    description = broken / "trace.json"
    description.write_text(description.read_text().replace('"complete": true', '"complete": false'))
    _refused(cli, ["plan", broken], "complete", here)


@pytest.mark.parametrize(
    "line",
    [
        "trace bundled bundled --max-requests 1 --out file/out",
        "plan {trace} --out file/plan.json",
        "serve-bench --trace {trace} --policy static --out file/run",
        "demo --quick --out file/run",
    ],
)
def test_an_output_below_a_file_is_refused_before_any_work(cli, here: Path, recorded: Path, line: str) -> None:
    (here / "file").write_text("in the way")
    _refused(cli, line.format(trace=recorded).split(), "file", here)


@pytest.mark.parametrize("line", ["plan {trace} --out /proc/plan.json", "demo --quick --out /proc/run"])
def test_a_folder_that_takes_no_files_is_refused(cli, here: Path, recorded: Path, line: str) -> None:
    _refused(cli, line.format(trace=recorded).split(), "/proc", here)


def test_an_existing_trace_is_not_overwritten(cli, here: Path, recorded: Path) -> None:
    _refused(cli, ["trace", "bundled", "bundled", "--max-requests", "3", "--out", recorded], str(recorded.name), here)

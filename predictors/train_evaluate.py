"""The work of ``train-predictor`` and ``evaluate-predictor``, from a trace to files."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from moeless.allocator import keep_freed_memory
from moeless.devices import auto_device
from moeless.errors import UserError
from moeless.files import check_writable, folder_atomic, sha256, write_json
from moeless.predictors import PREDICTORS, load_predictor
from moeless.predictors.base import METRICS_FILE, LoadPredictor
from moeless.predictors.checkpoints import Checkpoints
from moeless.predictors.evaluation import Evaluator, Row, mean_of, predict_microseconds
from moeless.predictors.fitting import FitInput, Report
from moeless.predictors.gates import read_gates
from moeless.predictors.request_split import SplitBy, split_requests
from moeless.predictors.trace_rows import Rows
from moeless.traces import TokenTrace, open_trace, require_kind

SHOWN = ("relative_l1", "pearson", "hottest_hit", "straggler_hit", "coverage_90")


@dataclass(frozen=True)
class FitJob:
    """A fit as the command line asks for it; see ``moeless train-predictor --help``."""

    trace: Path
    method: str
    distances: tuple[int, ...] = (1,)
    model: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    assignments: tuple[str, ...] = ()
    max_tokens: int = 50_000
    split_by: SplitBy = "request"
    device: str = "auto"
    evaluate: bool = False
    batch_tokens: tuple[int, ...] = (32, 512)
    gpus: int = 8
    seed: int = 0

    def open(self) -> TokenTrace:
        """The trace.

        Raises:
            UserError: it is no trace of kind tokens, or lacks gate inputs that the method reads.
        """
        opened = _open(self.trace, "train-predictor")
        _check_inputs(opened, self.fitting_class(opened), self.method)
        return opened

    def fitting_class(self, trace: TokenTrace) -> type[LoadPredictor]:
        """The class that says what the fit reads; see :meth:`LoadPredictor.fitting_class`."""
        kind: type[LoadPredictor] = PREDICTORS.get(self.method)
        return kind.fitting_class(self.all_options(), trace.has_router_inputs)

    def resolved(self) -> dict[str, Any]:
        """The configuration as JSON."""
        return {**asdict(self), "trace": str(self.trace), "options": self.all_options()}

    def all_options(self) -> dict[str, Any]:
        """The method's parameters that were given.

        Raises:
            UserError: an assignment is not NAME=VALUE.
        """
        made = dict(self.options)
        for text in self.assignments:
            name, sign, value = text.partition("=")
            if not sign or not name:
                raise UserError(f"--param {text!r} is not of the form NAME=VALUE")
            made[name.strip().replace("-", "_")] = _number(value.strip())
        return made

    def estimate(self) -> dict[str, Any]:
        """The size of the fit: pairs, training tokens, and bytes in memory."""
        opened = self.open()
        spec = opened.spec
        reads = self.fitting_class(opened).reads
        pairs = sum(max(0, spec.L - d) for d in self.distances)
        tokens = min(self.max_tokens, opened.num_tokens)
        width = {"router_inputs": 4 * spec.hidden_size, "topk": 8 * spec.K}.get(reads, 0)
        return {
            "pairs": pairs,
            "training_tokens": tokens,
            "sample_bytes": min(2**30, tokens * spec.L * width),
            "gate_bytes": 2 * spec.E * spec.hidden_size * pairs if reads == "router_inputs" else 0,
        }


@dataclass(frozen=True)
class Done:
    """The figures of a fit or an evaluation, to print."""

    summary: dict[str, Any]
    columns: list[str]
    table: list[list[Any]]


def run_fit(job: FitJob, out: Path, report: Report | None = None) -> Done:
    """Fit, measure where asked, and write the predictor's folder.

    Raises:
        UserError: the request is wrong; nothing is written then.
    """
    # every step makes and frees the same large buffers
    keep_freed_memory()
    trace = job.open()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already exists; choose another --out or remove it first")
    check_writable(out)
    reading = job.fitting_class(trace)
    rows = Rows(trace)
    split = split_requests(trace.requests.category, job.split_by, job.seed)
    model = job.model or trace.info.source.get("model")
    if reading.needs_gates and not model:
        raise UserError(f"{job.trace} does not say which model it is of; name it with --model")
    gates = read_gates(str(model), trace.spec) if reading.needs_gates else None
    device = _device(job.device)
    # the trace's description holds the hashes of all its files
    request = {**job.resolved(), "trace_sha256": sha256(job.trace / "trace.json"), "device": device}
    checkpoints = Checkpoints(out, request)
    given = FitInput(
        rows, split, job.distances, job.max_tokens, job.seed, device, job.all_options(), gates,
        report or (lambda *_: None), checkpoints,
    )  # fmt: skip
    started = time.perf_counter()
    try:
        predictor: LoadPredictor = PREDICTORS.get(job.method).fit(given)
    except UserError:
        checkpoints.clear()
        raise
    seconds = time.perf_counter() - started
    notes = {
        "trace": str(job.trace),
        "source": dict(trace.info.source),
        "split_by": job.split_by,
        "seed": job.seed,
        "distances": list(job.distances),
        "max_tokens": job.max_tokens,
        "device": device,
    }
    measured: list[Row] = []
    with folder_atomic(out) as folder:
        predictor.write(folder, notes)
        # what is measured is what was written, rounding to 16 bits included
        predictor = load_predictor(folder)
        if job.evaluate:
            measured = _measure(
                predictor, rows, job, folder / METRICS_FILE, notes | {"fit_seconds": round(seconds, 3)}
            )  # fmt: skip
    checkpoints.clear()
    summary = {
        "method": job.method,
        "model": rows.spec.name,
        "distances": ", ".join(map(str, job.distances)),
        "training requests": len(split.train),
        "parameters": predictor.num_parameters,
        "memory (MB)": predictor.memory_bytes / 1e6,
        "seconds to fit": seconds,
    }
    return _done(summary, measured, job)


def run_evaluation(folder: Path, job: FitJob, out: Path | None) -> Done:
    """Measure a fitted predictor on a trace's test requests; ``metrics.json`` goes to ``out`` or beside the weights.

    Raises:
        UserError: the folder is no predictor, or of another model than the trace's.
    """
    target = (out or folder) / METRICS_FILE
    check_writable(target)
    predictor = load_predictor(folder)
    trace = _open(job.trace, "evaluate-predictor")
    predictor.check_spec(trace.spec, f"the trace {job.trace}")
    _check_inputs(trace, predictor, predictor.name)
    rows = Rows(trace)
    started = time.perf_counter()
    notes = {"trace": str(job.trace), "predictor": str(folder), "split_by": job.split_by, "seed": job.seed}
    target.parent.mkdir(parents=True, exist_ok=True)
    measured = _measure(predictor, rows, job, target, notes)
    recall = mean_of(measured, "topk_recall", job.distances[0], "all", 1)
    summary = {
        "method": predictor.name,
        "model": rows.spec.name,
        "rows": len(measured),
        "recall": recall if recall is not None else "–",
        "seconds": time.perf_counter() - started,
        "metrics": str(target),
    }
    return _done(summary, measured, job)


def _open(path: Path, command: str) -> TokenTrace:
    opened = open_trace(path)
    require_kind(opened, "tokens", command=command)
    assert isinstance(opened, TokenTrace)
    return opened


def _check_inputs(trace: TokenTrace, reading: LoadPredictor | type[LoadPredictor], method: str) -> None:
    if reading.reads != "router_inputs":
        return
    if not trace.has_router_inputs:
        raise UserError(
            f"predictor {method!r} reads what gates see, which {trace.path} does not hold; record it with "
            "`moeless trace --router-inputs`, or fit `transition` or `blend`, which need expert ids only"
        )
    # names a file that cannot be read
    trace.router_inputs(0, 1)


def _measure(predictor: LoadPredictor, rows: Rows, job: FitJob, path: Path, notes: Mapping[str, Any]) -> list[Row]:
    split = split_requests(rows.trace.requests.category, job.split_by, job.seed)
    evaluator = Evaluator(rows, split, job.distances, job.batch_tokens, gpus=job.gpus, seed=job.seed)
    measured = evaluator.evaluate(predictor)
    extra = {
        "memory_bytes": predictor.memory_bytes,
        "parameters": predictor.num_parameters,
        "predict_microseconds": predict_microseconds(predictor, job.distances[0], job.batch_tokens),
        "gpus": job.gpus,
    }
    write_json(path, {"format": 1, "notes": {**notes, **extra}, "rows": [asdict(row) for row in measured]})
    return measured


def _done(summary: dict[str, Any], measured: list[Row], job: FitJob) -> Done:
    """The figures, with the table of means over layers."""
    kinds = sorted({(row.distance, row.phase, row.batch_tokens) for row in measured if row.phase != "all"})
    table = [
        [f"d = {d}, {phase}, {size}", mean_of(measured, "topk_recall", d, "all", 1)]
        + [mean_of(measured, name, d, phase, size) for name in SHOWN]
        for d, phase, size in kinds
    ]
    return Done(summary, ["distance, phase, tokens", "recall", *SHOWN], table)


def _device(name: str) -> str:
    if name == "auto":
        chosen, remark = auto_device()
        if remark is not None:
            sys.stderr.write(f"{remark}\n")
        return chosen
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"--device {name!r} is not available here; it must be cpu, cuda (with a GPU) or auto")
    return name


def parse_numbers(text: str, option: str) -> tuple[int, ...]:
    """``1``, ``1,3`` or ``1..5`` as ascending numbers.

    Raises:
        UserError: the text has none of these forms.
    """
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\.\.(\d+))?\s*", part)
        low = int(match[1]) if match else 0
        high = int(match[2] or low) if match else 0
        if low < 1 or high < low or high - low > 10_000:
            raise UserError(f"{option} {text!r} is not a list of whole numbers such as 1, 1,3 or 1..5")
        found.update(range(low, high + 1))
    return tuple(sorted(found))


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)

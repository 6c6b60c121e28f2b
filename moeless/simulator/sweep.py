"""Benchmarks over several rates and clusters, each finished cell kept so that a stopped sweep goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from moeless import __version__
from moeless.contracts import Policy
from moeless.errors import UserError
from moeless.files import check_writable
from moeless.fingerprint import code_hash
from moeless.metrics import schema
from moeless.metrics.result import Cell
from moeless.simulator.bench import Bench, BenchConfig

#: Told of a cell's name and its completed requests.
Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Point:
    """One cell of a sweep, before it has run."""

    config: BenchConfig
    costs: str
    policy: Policy

    @property
    def key(self) -> str:
        """A digest of everything that decides the cell, the trace's and predictors' contents and the code included."""
        config = replace(self.config, policies=(self.policy,), costs=(self.costs,))
        inputs = [_digest(path) for path in (config.trace, *config.predictors, Path(config.arrivals)) if path.exists()]
        text = json.dumps([__version__, code_hash(), dataclasses.asdict(config), inputs], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def name(self) -> str:
        """What a progress bar shows."""
        rate = f" at {self.config.request_rate:g}/s" if self.config.request_rate else ""
        return f"{self.config.cluster} {self.costs} {self.policy}{rate}"


def _digest(path: Path) -> list[Any]:
    """A file's bytes, or the head of a folder that lists the checksums of its other files."""
    heads = (
        [path / name for name in ("trace.json", "predictor.json", "weights.safetensors")] if path.is_dir() else [path]
    )
    return [hashlib.sha256(head.read_bytes()).hexdigest() for head in heads if head.is_file()]


def points(config: BenchConfig, axes: Mapping[str, Sequence[Any]]) -> list[Point]:
    """Every combination of the axes' values, then every cost model and policy, in this order of nesting.

    Args:
        axes: values by field name of the configuration.
    """
    return [
        Point(replace(config, **dict(zip(axes, values, strict=True))), costs, policy)
        for values in itertools.product(*axes.values())
        for costs in config.costs
        for policy in config.policies
    ]


def check_points(planned: Sequence[Point], bench: Bench) -> None:
    """Find what is wrong with a point before any cell runs; ``bench`` is one that is known to be right.

    Raises:
        UserError: a point's input is missing or wrong.
    """
    checked = bench.config
    for point in planned:
        if point.config != checked:
            checked = Bench(point.config).config


def run_sweep(
    planned: Sequence[Point], keep: Path | None = None, progress: Progress | None = None
) -> Iterator[tuple[Point, Cell]]:
    """Run the points that ``keep`` does not hold yet; each finished cell is appended there as one line of JSON.

    Raises:
        UserError: ``keep`` is not such a file, or cannot be written.
    """
    done = _read(keep) if keep is not None else {}
    bench: Bench | None = None
    for point in planned:
        key = point.key
        if key in done:
            yield point, done[key]
            continue
        if bench is None or bench.config != point.config:
            bench = Bench(point.config)
        report = None if progress is None else partial(progress, point.name)
        cell = bench.run_cell(point.costs, point.policy, report).cell
        if keep is not None:
            keep.parent.mkdir(parents=True, exist_ok=True)
            with keep.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "cell": schema.to_json(cell)}, allow_nan=False) + "\n")
        yield point, cell


def _read(keep: Path) -> dict[str, Cell]:
    check_writable(keep)
    if not keep.exists():
        return {}
    if keep.is_dir():
        raise UserError(f"--resume {keep} is a folder; name a file, for example sweep.jsonl")
    lines = keep.read_text(encoding="utf-8").split("\n")
    found: dict[str, Cell] = {}
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            data = json.loads(line)
            found[data["key"]] = schema.from_json(Cell, data["cell"], f"{keep} line {number}")
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number == len(lines):
                # a run that was killed while writing: drop the half line, its cell runs again
                keep.write_text("".join(f"{kept}\n" for kept in lines[: number - 1]), encoding="utf-8")
                break
            raise UserError(f"--resume {keep}: line {number} is no finished cell") from error
    return found

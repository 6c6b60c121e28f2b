"""Draws experiments, several at a time: a figure takes a second or two in its three formats."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from moeless.errors import RunFailed
from moeless.experiments.base import Drawn, Experiment, Options
from moeless.experiments.catalogue import find
from moeless.experiments.publish import draw
from moeless.experiments.runner import quiet_worker

#: With fewer experiments a second process costs more than it brings.
FEW = 3


def drawn_in_turn(
    experiments: Sequence[Experiment],
    options: Options,
    results: Mapping[str, Mapping[str, Any]],
    folder: Path,
    workers: int,
) -> Iterator[tuple[Experiment, Drawn]]:
    """Each experiment with what it drew from its results, in the order given; figures are written into ``folder``."""
    if workers < 2 or len(experiments) < FEW:
        for experiment in experiments:
            yield experiment, draw(experiment, options, results[experiment.name], folder)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(experiments)), mp_context=context, initializer=quiet_worker)
    try:
        waiting = [pool.submit(_draw, one.name, options, results[one.name], folder) for one in experiments]
        for experiment, future in zip(experiments, waiting, strict=True):
            yield experiment, future.result()
    except BrokenProcessPool as error:
        raise RunFailed("a process that draws died, most likely for lack of memory; try --jobs 1") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _draw(name: str, options: Options, results: Mapping[str, Any], folder: Path) -> Drawn:
    (experiment,) = find(name)
    return draw(experiment, options, results, folder)

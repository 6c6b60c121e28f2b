"""What an experiment is: jobs that compute, a function that draws, claims that are held against the paper's.

Jobs are pure: a named function of JSON parameters and of other jobs' results. That is what makes them
cacheable by content, resumable and parallel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeless.experiments.statements import Claim, Finding, Kind


@dataclass(frozen=True)
class Options:
    """What ``moeless reproduce`` was asked for.

    Attributes:
        full: the paper's sizes; otherwise sizes that finish in minutes on two cores.
        models: presets to study; empty means the paper's three.
        traces: the reader's own routing traces, in place of every other source; with ``beside``, next to them, except
            that no stand-in is made for a model whose real trace is there.
        live: folder of a live ``serve-bench`` run that fills the live column; None: the bundled model runs live here.
        cluster, costs: as in ``serve-bench``.
        billing: the rule that cost figures show first.
    """

    full: bool = False
    models: tuple[str, ...] = ()
    traces: tuple[Path, ...] = ()
    beside: bool = False
    live: Path | None = None
    cluster: str = "a6000x8"
    costs: tuple[str, ...] = ("paper", "roofline")
    billing: str = "paper"
    seed: int = 0

    def pick(self, quick: Any, full: Any) -> Any:
        """One of two sizes."""
        return full if self.full else quick


@dataclass(frozen=True)
class Job:
    """One unit of work.

    Attributes:
        label: for people, for example ``simulate static on mixtral-8x7b``.
        function: ``module:name``. A cell's is called with (params, results of needs) and returns JSON data; an
            artefact's with (params, results of needs, folder) and fills the folder.
        needs: jobs whose results it reads: data of cells, folders of artefacts.
        artefact: whether the result is a folder.
        given: a folder that the user supplied, with its hash in ``params``; nothing is computed.
        timed: the result is a wall-clock measurement: it runs alone, and is the one kind that differs from run to run.
    """

    label: str
    function: str
    params: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[Job, ...] = ()
    artefact: bool = False
    given: Path | None = None
    timed: bool = False


@dataclass(frozen=True)
class Plot:
    """A drawn figure with what belongs under it."""

    figure: Any
    caption: str
    kind: Kind
    label: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Data:
    """A table: shown on the page where ``show``, always saved as CSV."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    show: bool = False


@dataclass(frozen=True)
class Drawn:
    """What an experiment hands to the page."""

    plots: Mapping[str, Plot] = field(default_factory=dict)
    data: Mapping[str, Data] = field(default_factory=dict)
    claims: Sequence[Claim] = ()
    findings: Sequence[Finding] = ()
    text: Sequence[str] = ()
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class Experiment:
    """One figure or table of the paper, or a study beyond it.

    Attributes:
        question: what it asks.
        stated: what the paper shows or states; empty for a study beyond it.
        lacks: why it cannot be drawn under some options, in a sentence; None where it can.
        jobs: the work, by short name; ``draw`` gets the results under the same names.
    """

    name: str
    title: str
    question: str
    stated: str
    jobs: Callable[[Options], Mapping[str, Job]]
    draw: Callable[[Options, Mapping[str, Any]], Drawn]
    lacks: Callable[[Options], str | None] = lambda _: None


def no_jobs(options: Options) -> Mapping[str, Job]:
    """The jobs of an experiment that needs none."""
    return {}

"""Options of simulated benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from moeless.cluster import Hardware
from moeless.configuration import Component, option
from moeless.metrics.options import Measuring
from moeless.policy.options import Policies
from moeless.serverless.options import Serverless
from moeless.workloads.options import Arrivals, Batching

if TYPE_CHECKING:
    from moeless.contracts import Policy
    from moeless.simulator.failures import Failure

Part = Literal["test", "tune"]
#: Whether copies take no time, by name.
COPIES = {"instant": True, "timed": False, "auto": None}


def _failures(texts: Sequence[str]) -> tuple[Failure, ...]:
    from moeless.simulator.failures import Failure

    return tuple(Failure.parse(text) for text in texts)


@dataclass(frozen=True, kw_only=True)
class Events(Serverless):
    """What a simulation assumes of copies' time and of failures.

    Attributes:
        instant_copies: None: only under the ``paper`` costs, whose formula has no term for copies.
    """

    failures: tuple[Failure, ...] = option(
        (),
        "--fail-gpu",
        "SECONDS:GPU[:RESTART_SECONDS].",
        read=_failures,
        show=lambda failures: ["{seconds}:{gpu}:{restart_seconds}".format(**failure) for failure in failures],
    )
    instant_copies: bool | None = option(
        None,
        "--copies",
        "instant, timed, or auto: instant under the paper's costs only.",
        choices=tuple(COPIES),
        read=COPIES.get,
        show={value: name for name, value in COPIES.items()}.get,
    )


@dataclass(frozen=True, kw_only=True)
class Replayed(Component, group="Simulator"):
    """Whose routing is replayed.

    Attributes:
        trace: a folder of kind tokens.
        part: which requests of the trace are served: ``test``, those that history and fitting leave out, or ``tune``,
            a share of the others, so that what is tuned can be tested on requests that tuning never saw.
    """

    trace: Path = option(MISSING, "--trace", "Routing trace of kind tokens.", kind=Path | None, metavar="DIR")
    lengths: Literal["trace", "arrival"] = option(
        "trace",
        "--lengths",
        "Token counts of the trace, or of the arrivals (resampled): trace or arrival.",
        kind=str,
        choices=("trace", "arrival"),
    )
    part: Part = "test"


@dataclass(frozen=True, kw_only=True)
class BenchConfig(Events, Measuring, Hardware, Batching, Arrivals, Policies, Replayed):
    """What a simulated benchmark runs; every field goes into the manifest.

    ``model`` is a preset whose shapes replace the trace's own (same experts and top-k; as many layers as were
    recorded); the result is then labelled synthetic. Serverful planners keep no copy that their plan does not hold,
    and all GPUs.
    """

    policies: tuple[Policy, ...] = field()
    costs: tuple[str, ...] = ("paper", "roofline")
    cluster: str = "h100x8"
    max_requests: int | None = 1000


@dataclass(frozen=True, kw_only=True)
class SimulatedRun(BenchConfig, group="Simulator"):
    """What ``serve-bench --backend sim`` takes: a benchmark's configuration, and what does not decide its cells."""

    preset: tuple[Path, ...] = option((), "--preset", "Tuned policy (moeless tune).", metavar="FILE")
    resume: Path | None = option(None, "--resume", "Keep finished cells here; run only the others.", metavar="FILE")
    timeline: str | None = option(None, "--timeline", "START:STOP seconds of the first cell, as a Chrome trace.")

"""Options of the workload and of its batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeless.configuration import Component, Seeded, option

if TYPE_CHECKING:
    from moeless.contracts import Request
    from moeless.workloads.arrivals import ArrivalSeries
    from moeless.workloads.scheduler import Scheduler


def _window(text: str) -> tuple[float, float]:
    from moeless.workloads.arrivals import parse_window

    return parse_window(text)


@dataclass(frozen=True, kw_only=True)
class Arrivals(Seeded, group="Workload"):
    """Who asks when; see :func:`moeless.workloads.arrivals.load`."""

    arrivals: str = option("azure-like", "--arrivals", "azure-like, poisson:RATE, ..., or a request trace's file.")
    request_rate: float | None = option(None, "--request-rate", "Mean requests per second.")
    burstiness: float | None = option(None, "--burstiness", "Gamma shape; below 1 is burstier.")
    arrivals_window: tuple[float, float] | None = option(
        None,
        "--arrivals-window",
        "Seconds of an arrivals file.",
        metavar="START:STOP",
        read=_window,
        show=lambda window: window and "{}:{}".format(*window),
        live_key="window",
    )
    time_scale: float = option(1.0, "--time-scale", "Factor on arrival times; 0.5 doubles the rate.")
    max_requests: int | None = option(None, "--max-requests", "Requests at most.", minimum=1, live_key="requests")
    duration: float | None = option(None, "--duration", "Seconds of arrivals.")

    def series(self) -> ArrivalSeries:
        """The arrivals.

        Raises:
            UserError: the specification, a parameter or the file is wrong.
        """
        from moeless.workloads import arrivals

        return arrivals.load(
            self.arrivals,
            num_requests=self.max_requests,
            duration=self.duration,
            window=self.arrivals_window,
            time_scale=self.time_scale,
            request_rate=self.request_rate,
            burstiness=self.burstiness,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class Batching(Component, group="Batching"):
    """Which requests run together; see :mod:`moeless.workloads.schedulers`."""

    batching: str = option(
        "continuous", "--batching", "continuous[:prefill-first][:whole-prompts] or one-second (the paper)."
    )
    token_budget: int = option(8192, "--token-budget", "Tokens of an iteration at most.", minimum=1)
    max_running: int = option(256, "--max-running", "Running requests at most.", minimum=1)

    def scheduler(self, requests: Sequence[Request], num_ranks: int) -> Scheduler:
        """A fresh scheduler over the requests.

        Raises:
            UserError: the specification is wrong, or does not fit the requests.
        """
        from moeless.workloads import schedulers

        options: dict[str, Any] = {}
        if schedulers.parse(self.batching)[0] == "continuous":
            options = {"token_budget": self.token_budget, "max_running": self.max_running}
        return schedulers.build(self.batching, requests, num_ranks, **options)

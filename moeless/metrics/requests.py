"""Request-level figures from each request's token times."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moeless.contracts import FloatArray, IntArray
from moeless.errors import UserError
from moeless.metrics.latency import Summary, summarise
from moeless.metrics.result import RequestMetrics

#: What a request waits for, by its name in objectives and in ``result.json``.
WAITS = {"ttft": "time to first token", "tpot": "time per output token", "e2el": "whole answer"}


@dataclass(frozen=True)
class Objective:
    """One service-level objective: ``metric`` (ttft, tpot, e2el) at most ``milliseconds``."""

    metric: str
    milliseconds: float


def parse_goodput(texts: Sequence[str]) -> tuple[Objective, ...]:
    """Read ``ttft:500 tpot:50``-style objectives, given apart or in one string.

    Raises:
        UserError: a part has another form, an unknown metric, or a metric comes twice.
    """
    objectives: dict[str, Objective] = {}
    for part in " ".join(texts).replace(",", " ").split():
        match = re.fullmatch(r"([a-z0-9]+):(\d+(?:\.\d+)?)", part)
        if not match or match[1] not in WAITS or float(match[2]) <= 0:
            raise UserError(f"--goodput {part!r} is not of the form ttft:MS, tpot:MS or e2el:MS")
        if match[1] in objectives:
            raise UserError(f"--goodput names {match[1]} twice")
        objectives[match[1]] = Objective(match[1], float(match[2]))
    return tuple(objectives.values())


@dataclass(frozen=True)
class RequestTimes:
    """Completed requests, one entry each; times in seconds since the workload's start.

    ``itl_seconds_I`` with ``itl_count_I`` are the gaps between successive tokens and how many tokens had each.
    """

    arrival_N: FloatArray
    first_token_N: FloatArray
    last_token_N: FloatArray
    input_tokens_N: IntArray
    output_tokens_N: IntArray
    itl_seconds_I: FloatArray
    itl_count_I: IntArray

    @property
    def ttft_N(self) -> FloatArray:
        """Seconds from arrival to the first token."""
        return self.first_token_N - self.arrival_N

    @property
    def e2el_N(self) -> FloatArray:
        """Seconds from arrival to the last token."""
        return self.last_token_N - self.arrival_N

    @property
    def tpot_N(self) -> FloatArray:
        """Seconds per output token after the first; 0 for one-token answers, as in vLLM's goodput."""
        after = self.output_tokens_N - 1
        return np.divide(self.last_token_N - self.first_token_N, after, out=np.zeros(len(after)), where=after > 0)


def good_requests(times: RequestTimes, objectives: Sequence[Objective]) -> int:
    """Requests that meet every objective (at most the limit counts as met)."""
    met = np.ones(len(times.arrival_N), np.bool_)
    for objective in objectives:
        met &= 1e3 * getattr(times, f"{objective.metric}_N") <= objective.milliseconds
    return int(met.sum())


def request_metrics(
    times: RequestTimes, *, duration: float, failed: int, objectives: Sequence[Objective] = ()
) -> RequestMetrics | None:
    """vLLM's serving-benchmark figures; None where no request completed or no time passed."""
    completed = len(times.arrival_N)
    ttft, e2el = summarise(times.ttft_N), summarise(times.e2el_N)
    if ttft is None or e2el is None or duration <= 0:
        return None
    tokens_in, tokens_out = int(times.input_tokens_N.sum()), int(times.output_tokens_N.sum())
    several = times.output_tokens_N > 1
    values: dict[str, float | None] = {}
    summaries: Mapping[str, Summary | None] = {
        "ttft": ttft,
        "e2el": e2el,
        "tpot": summarise(times.tpot_N[several]),
        "itl": summarise(times.itl_seconds_I, times.itl_count_I),
    }
    for name, summary in summaries.items():
        for statistic in ("mean", "median", "std", "p99"):
            value = None if summary is None else 1e3 * float(getattr(summary, statistic))
            values[f"{statistic}_{name}_ms"] = value
    return RequestMetrics(
        duration=duration,
        completed=completed,
        failed=failed,
        total_input_tokens=tokens_in,
        total_output_tokens=tokens_out,
        request_throughput=completed / duration,
        output_throughput=tokens_out / duration,
        total_token_throughput=(tokens_in + tokens_out) / duration,
        max_concurrent_requests=_most_at_once(times),
        request_goodput=good_requests(times, objectives) / duration if objectives else None,
        **values,  # type: ignore[arg-type]
    )


def _most_at_once(times: RequestTimes) -> int:
    """Most requests between arrival and last token at any moment."""
    when = np.concatenate([times.arrival_N, times.last_token_N])
    change = np.concatenate([np.ones(len(times.arrival_N), np.int64), -np.ones(len(times.last_token_N), np.int64)])
    # a completion at the very moment of an arrival comes first
    order = np.lexsort((change, when))
    return int(np.cumsum(change[order]).max(initial=0))

"""Routing traces: which experts each token went to, as folders of three kinds."""

from __future__ import annotations

from moeless.traces.info import TraceInfo
from moeless.traces.store import (
    AnyTrace,
    CountsTrace,
    IterationTrace,
    RequestTable,
    TokenTrace,
    open_trace,
    require_kind,
)
from moeless.traces.writers import CountsTraceWriter, IterationTraceWriter, RequestRows, TokenTraceWriter

__all__ = [
    "AnyTrace",
    "CountsTrace",
    "CountsTraceWriter",
    "IterationTrace",
    "IterationTraceWriter",
    "RequestRows",
    "RequestTable",
    "TokenTrace",
    "TokenTraceWriter",
    "TraceInfo",
    "open_trace",
    "require_kind",
]

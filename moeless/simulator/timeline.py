"""A window of a simulation as a Chrome trace, for Perfetto or chrome://tracing.

Format: JSON object with ``traceEvents``; ``X`` events have ``ts`` and ``dur`` in microseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeless.contracts import FloatArray
from moeless.errors import UserError
from moeless.files import write_json
from moeless.simulator.work import Work

MODEL, COPIES, REQUESTS = 1, 2, 3


class Timeline:
    """Events between ``start`` and ``stop`` seconds; iterations that begin inside are kept whole."""

    def __init__(self, start: float, stop: float) -> None:
        if not 0 <= start < stop:
            raise UserError(f"a timeline's window must start at 0 s or later and end after that, got {start} to {stop}")
        self.start, self.stop = start, stop
        self._events: list[dict[str, Any]] = []

    @classmethod
    def parse(cls, text: str) -> Timeline:
        """Read ``START:STOP`` in seconds.

        Raises:
            UserError: the text has another form.
        """
        start, _, stop = text.partition(":")
        try:
            return cls(float(start), float(stop))
        except ValueError:
            raise UserError(f"--timeline {text!r} is not of the form START:STOP, in seconds") from None

    def watches(self, now: float) -> bool:
        """Whether an iteration that begins at ``now`` is kept."""
        return self.start <= now < self.stop

    def next_start(self, now: float) -> float:
        """When the window begins, infinity where it has."""
        return self.start if now < self.start else float("inf")

    def span(self, process: int, thread: int, name: str, begin: float, seconds: float, **args: Any) -> None:
        """One complete event; times in seconds."""
        event = {"name": name, "ph": "X", "pid": process, "tid": thread, "ts": 1e6 * begin, "dur": 1e6 * seconds}
        self._events.append(event | ({"args": args} if args else {}))

    def iteration(self, number: int, work: Work, begin: float, end: float) -> None:
        """One forward pass, under which its layers lie."""
        if self.watches(begin):
            name = f"iteration {number}: {work.phase.name.lower()}, {work.tokens} tokens"
            self.span(MODEL, 0, name, begin, end - begin, tokens=work.tokens)

    def layer(self, layer: int, begin: float, ahead: float, parts: Mapping[str, float], load_G: FloatArray) -> None:
        """One MoE layer: what precedes it, its parts one after the other, the GPUs' loads as a counter."""
        if not self.watches(begin):
            return
        self.span(MODEL, 1, "attention", begin - ahead, ahead)
        self.span(MODEL, 1, f"layer {layer}", begin, sum(parts.values()), load=[int(n) for n in load_G])
        at = begin
        for name, seconds in parts.items():
            if seconds > 0:
                self.span(MODEL, 2, name, at, seconds)
                at += seconds
        counts = {f"GPU {gpu}": int(n) for gpu, n in enumerate(load_G)}
        self._events.append({"name": "tokens", "ph": "C", "pid": MODEL, "ts": 1e6 * begin, "args": counts})

    def copy(self, gpu: int, layer: int, expert: int, begin: float, end: float) -> None:
        """One copy's transfer on a GPU's copy engine."""
        if self.watches(begin):
            self.span(COPIES, gpu, f"layer {layer} expert {expert}", begin, end - begin)

    def write(self, path: Path) -> int:
        """Write the file; returns how many events it has."""
        names = [
            {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": name}}
            for pid, name in ((MODEL, "model"), (COPIES, "copy engines"))
        ]
        threads = {0: "iterations", 1: "layers", 2: "parts of a layer"}
        names += [
            {"name": "thread_name", "ph": "M", "pid": MODEL, "tid": tid, "args": {"name": name}}
            for tid, name in threads.items()
        ]
        gpus = sorted({event["tid"] for event in self._events if event["pid"] == COPIES})
        names += [
            {"name": "thread_name", "ph": "M", "pid": COPIES, "tid": gpu, "args": {"name": f"GPU {gpu}"}}
            for gpu in gpus
        ]
        write_json(path, {"traceEvents": names + self._events, "displayTimeUnit": "ms"})
        return len(self._events)

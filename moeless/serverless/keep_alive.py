"""How long a copy that no plan holds stays in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moeless.errors import UserError

KeepAliveKind = Literal["fixed", "lru", "adaptive"]
KINDS: tuple[KeepAliveKind, ...] = ("fixed", "lru", "adaptive")

#: Idle gaps are counted in bins that double from this many seconds on.
FIRST_BIN_SECONDS = 1e-3
NUM_BINS = 24
#: An adaptive keep-alive covers this share of the gaps seen so far ...
COVERED = 0.95
#: ... once so many were seen; before that it is the fixed one.
MIN_GAPS = 5


@dataclass(frozen=True)
class KeepAlive:
    """A keep-alive policy.

    Attributes:
        kind: ``fixed`` (the paper; it does not state the duration), ``lru`` (until memory is needed), ``adaptive``
            (the idle-time histogram of "Serverless in the Wild", ATC '20, per layer and expert).
        seconds: the fixed duration, and the adaptive one's start.
    """

    kind: KeepAliveKind = "fixed"
    seconds: float = 10.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"the keep-alive is {self.kind!r}, it must be one of {', '.join(KINDS)}")
        if not self.seconds >= 0:
            raise UserError(f"the keep-alive must be a number of seconds of at least 0, got {self.seconds}")

    @classmethod
    def parse(cls, text: str) -> KeepAlive:
        """Read ``SECONDS``, ``lru`` or ``adaptive[:SECONDS]``.

        Raises:
            UserError: the text has another form.
        """
        kind, _, seconds = text.partition(":")
        try:
            if kind == "lru" and not seconds:
                return cls("lru")
            if kind == "adaptive":
                return cls("adaptive", float(seconds)) if seconds else cls("adaptive")
            return cls("fixed", float(text))
        except ValueError:
            raise UserError(f"--keep-alive {text!r} is none of SECONDS, lru, adaptive, adaptive:SECONDS") from None

    def __str__(self) -> str:
        if self.kind == "fixed":
            return f"{self.seconds:g}"
        return "lru" if self.kind == "lru" else f"adaptive:{self.seconds:g}"

"""Requests on their way from a file into a token trace: checked and written one at a time.

Memory holds the largest request and one shard of the trace, whatever the file's size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless.errors import UserError
from moeless.files import folder_atomic, sha256
from moeless.spec import MoESpec
from moeless.traces.info import TraceInfo
from moeless.traces.writers import RequestRows, TokenTraceWriter

#: Said of traces whose file does not tell prompt rows from generated ones: all count as generated (phase 1).
NO_PROMPTS = "generated tokens only: prompts were not recorded"


@dataclass(frozen=True)
class ImportedRequest:
    """All rows of one request, as a file has them.

    Attributes:
        topk_TLK: expert ids, whole numbers; probs_TLK: gate weights; token_T: token ids; None where not there.
        prompt_tokens: rows that are prompt, in front of the others.
    """

    topk_TLK: NDArray[Any]
    probs_TLK: NDArray[Any] | None = None
    token_T: NDArray[Any] | None = None
    prompt_tokens: int = 0
    category: str = ""


def write_requests(
    path: Path,
    out: Path,
    spec: MoESpec,
    requests: Iterable[ImportedRequest],
    *,
    importer: str,
    has_weights: bool,
    has_prompts: bool,
) -> TraceInfo:
    """Write the requests as a token trace at ``out``, which appears only when whole.

    Raises:
        UserError: there is no request, or one has ids or weights out of range; or ``out`` cannot be written.
    """
    info = TraceInfo(
        kind="tokens",
        spec=spec,
        source={"importer": importer, "file": path.name, "sha256": sha256(path)},
        has_weights=has_weights,
        notes=() if has_prompts else (NO_PROMPTS,),
    )
    with folder_atomic(out) as folder:
        writer = TokenTraceWriter(folder, info)
        for index, entry in enumerate(requests):
            _check(path, entry, spec)
            rows = len(entry.topk_TLK)
            writer.append(
                [
                    RequestRows(
                        request=index,
                        topk_TLK=entry.topk_TLK,
                        weights_TLK=entry.probs_TLK,
                        token_T=entry.token_T,
                        prompt_tokens=entry.prompt_tokens,
                        output_tokens=rows - entry.prompt_tokens,
                        category=entry.category,
                    )
                ]
            )
        if not writer.num_requests:
            raise UserError(f"{path} holds 0 tokens")
        return writer.close()


def _check(path: Path, entry: ImportedRequest, spec: MoESpec) -> None:
    low, high = int(entry.topk_TLK.min()), int(entry.topk_TLK.max())
    if low < 0 or high >= spec.E:
        raise UserError(f"{path}: expert ids must lie in 0..{spec.E - 1}, got {low if low < 0 else high}")
    if entry.probs_TLK is not None and not np.isfinite(entry.probs_TLK).all():
        raise UserError(f"{path}: probs holds values that are not finite")
    if not 0 <= entry.prompt_tokens <= len(entry.topk_TLK):
        raise UserError(f"{path}: prompt_tokens must lie between 0 and the request's number of tokens")


class RequestGroups:
    """Cuts a stream of columns into requests, whose rows must be consecutive."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: set[int] = set()
        self._key: int | None = None
        self._parts: list[dict[str, NDArray[Any]]] = []

    def add(self, columns: dict[str, NDArray[Any]]) -> Iterator[dict[str, NDArray[Any]]]:
        """Take more rows (column ``request`` and others of the same length); yield requests that ended.

        Raises:
            UserError: a request comes back after another one.
        """
        request = columns["request"]
        starts = np.concatenate([[0], np.flatnonzero(request[1:] != request[:-1]) + 1, [len(request)]])
        for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            key = int(request[start])
            if key != self._key:
                yield from self.end()
                if key in self._seen:
                    raise UserError(f"{self.path}: the rows of a request must be consecutive")
                self._seen.add(key)
                self._key = key
            self._parts.append({name: column[start:stop] for name, column in columns.items()})

    def end(self) -> Iterator[dict[str, NDArray[Any]]]:
        """The last request, where there is one."""
        if self._parts:
            parts, self._parts = self._parts, []
            yield {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

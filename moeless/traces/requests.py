"""The request table of a token trace."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moeless.errors import UserError
from moeless.files import reading
from moeless.traces.schema import REQUESTS_SCHEMA

REQUESTS_FILE = "requests.parquet"


@dataclass(frozen=True)
class RequestTable:
    """One entry per request, ascending; ``N`` requests.

    Attributes:
        request: ids, u32 ``[N]``.
        first_row: first row of each request in the trace, i64 ``[N]``; its rows end where the next one's begin.
        prompt_tokens: prompt rows of each request, i64 ``[N]``; 0 where only generated tokens were recorded.
        output_tokens: tokens generated, i64 ``[N]``. The last of them is recorded only by systems that feed it back.
        category, source_id: "" where unknown.
    """

    request: NDArray[np.uint32]
    first_row: NDArray[np.int64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    category: list[str]
    source_id: list[str]

    @classmethod
    def build(
        cls,
        request: object,
        first_row: object,
        prompt_tokens: object,
        output_tokens: object,
        category: list[str] | None = None,
        source_id: list[str] | None = None,
    ) -> RequestTable:
        """A table from sequences; categories and identities default to unknown."""
        ids = np.asarray(request, np.uint32)
        return cls(
            ids,
            np.asarray(first_row, np.int64),
            np.asarray(prompt_tokens, np.int64),
            np.asarray(output_tokens, np.int64),
            list(category) if category is not None else [""] * len(ids),
            list(source_id) if source_id is not None else [""] * len(ids),
        )

    def __len__(self) -> int:
        return len(self.request)

    def to_arrow(self) -> pa.Table:
        """The table in the file's columns; unknown strings are nulls."""
        columns = [
            pa.array(self.request, pa.uint32()),
            pa.array(self.first_row.astype(np.uint64), pa.uint64()),
            pa.array(self.prompt_tokens.astype(np.uint32), pa.uint32()),
            pa.array(self.output_tokens.astype(np.uint32), pa.uint32()),
            pa.array([value or None for value in self.category], pa.string()),
            pa.array([value or None for value in self.source_id], pa.string()),
        ]
        return pa.Table.from_arrays(columns, schema=REQUESTS_SCHEMA)

    @classmethod
    def from_arrow(cls, table: pa.Table) -> RequestTable:
        """The table from the file's columns."""

        def column(name: str) -> NDArray[np.int64]:
            return table.column(name).to_numpy().astype(np.int64)

        return cls(
            table.column("request").to_numpy().astype(np.uint32),
            column("first_row"),
            column("prompt_tokens"),
            column("output_tokens"),
            [value or "" for value in table.column("category").to_pylist()],
            [value or "" for value in table.column("source_id").to_pylist()],
        )

    @classmethod
    def read(cls, path: Path, rows: int) -> RequestTable:
        """Read and check ``requests.parquet`` of a trace of that many rows.

        Raises:
            UserError: the file is missing, cut short, or does not fit the rows.
        """
        if not path.exists():
            raise UserError(f"{path} is missing; copy or record the trace again")
        try:
            with reading(path):
                table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} cannot be read ({_first_line(error)}); copy or record the trace again") from None
        if not table.schema.equals(REQUESTS_SCHEMA):
            raise UserError(f"{path} does not have the columns of a request table; see docs/formats.md")
        loaded = cls.from_arrow(table)
        loaded.check(rows, str(path))
        return loaded

    def check(self, rows: int, where: str) -> None:
        """Raise :class:`UserError` where the table does not fit a trace of ``rows`` rows."""
        starts = np.append(self.first_row, rows)
        lengths = np.diff(starts)
        if len(self) == 0 and rows:
            raise UserError(f"{where} lists no request for {rows} rows")
        if len(self) and (self.first_row[0] != 0 or (lengths < 1).any()):
            raise UserError(f"{where}: first_row must start at 0 and ascend below {rows}, each request with a row")
        if (np.diff(self.request.astype(np.int64)) < 1).any():
            raise UserError(f"{where}: request ids must ascend without repetition")
        if (self.prompt_tokens > lengths).any():
            raise UserError(f"{where}: a request has more prompt tokens than rows")

    def write(self, path: Path) -> None:
        """Write the file (not atomic: callers write into a temporary or hidden place)."""
        pq.write_table(self.to_arrow(), path, use_dictionary=False, compression="zstd", compression_level=1)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__

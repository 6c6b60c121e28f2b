"""Column layouts of the trace files.

Tables of the folder format: ``tokens-*``, ``counts-*``, ``requests.parquet``; see ``docs/formats.md``.
"""

from __future__ import annotations

from typing import Literal

import pyarrow as pa

from moeless.spec import MoESpec

FORMAT = 1
Kind = Literal["tokens", "iterations", "counts"]
KINDS: tuple[Kind, ...] = ("tokens", "iterations", "counts")

#: Rows of one Parquet row group, at most: the unit of reading.
ROW_GROUP_ROWS = 16_384
#: Bytes of one row group before compression, at most; wide models get fewer rows.
ROW_GROUP_BYTES = 64 * 2**20
#: Unknown token id or position, in arrays; the files hold nulls.
UNKNOWN = -1


def shard_prefix(kind: Kind) -> str:
    """First part of the shard files' names."""
    return "counts" if kind == "counts" else "tokens"


def row_group_rows(bytes_per_row: int) -> int:
    """Rows per row group for rows of that width."""
    return max(1, min(ROW_GROUP_ROWS, ROW_GROUP_BYTES // max(1, bytes_per_row)))


def _vector(name: str, value: pa.DataType, length: int) -> pa.Field:
    return pa.field(name, pa.list_(pa.field("element", value, nullable=False), length), nullable=False)


def row_schema(kind: Kind, spec: MoESpec, *, weights: bool) -> pa.Schema:
    """Columns of one shard of that kind; vectors are flat, index ``l*K+k`` or ``l*E+e``."""
    if kind == "counts":
        return pa.schema(
            [
                pa.field("iteration", pa.uint32(), nullable=False),
                pa.field("phase", pa.uint8(), nullable=False),
                pa.field("tokens", pa.uint32()),
                _vector("load", pa.uint32(), spec.L * spec.E),
            ]
        )
    if kind == "tokens":
        identity = [
            pa.field("request", pa.uint32(), nullable=False),
            pa.field("position", pa.uint32(), nullable=False),
        ]
    else:
        identity = [
            pa.field("iteration", pa.uint32(), nullable=False),
            pa.field("rank", pa.uint16(), nullable=False),
            pa.field("position", pa.uint32()),
        ]
    fields = [
        *identity,
        pa.field("phase", pa.uint8(), nullable=False),
        pa.field("token", pa.int32()),
        _vector("experts", pa.uint16(), spec.L * spec.K),
    ]
    if weights:
        fields.append(_vector("weights", pa.float16(), spec.L * spec.K))
    return pa.schema(fields)


REQUESTS_SCHEMA = pa.schema(
    [
        pa.field("request", pa.uint32(), nullable=False),
        pa.field("first_row", pa.uint64(), nullable=False),
        pa.field("prompt_tokens", pa.uint32(), nullable=False),
        pa.field("output_tokens", pa.uint32(), nullable=False),
        pa.field("category", pa.string()),
        pa.field("source_id", pa.string()),
    ]
)

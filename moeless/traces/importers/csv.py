"""Importer of CSV rows ``layer,token,experts``: ids separated by spaces, optional ``request`` column."""

from __future__ import annotations

import csv
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moeless.errors import UserError
from moeless.spec import MoESpec
from moeless.traces.importers.request_rows import ImportedRequest, write_requests
from moeless.traces.info import TraceInfo


def import_csv(path: Path, out: Path, spec: MoESpec) -> TraceInfo:
    """Write a token trace from a CSV file; every token needs one row per MoE layer.

    ``layer`` counts MoE layers from 0, ``token`` counts tokens from 0 (within ``request`` where there is one),
    ``experts`` holds the ids, separated by spaces, semicolons or bars. The rows of a request must be consecutive, in
    any order; without ``request`` all is one request, held in memory.

    Raises:
        UserError: a row breaks the layout or does not fit the model, or ``out`` cannot be written.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; a CSV file with columns layer,token,experts is needed")
    try:
        return write_requests(
            path, out, spec, _requests(path, spec), importer="csv", has_weights=False, has_prompts=False
        )
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV file in UTF-8 ({error})") from None


def _requests(path: Path, spec: MoESpec) -> Iterator[ImportedRequest]:
    seen: set[int] = set()
    current: int | None = None
    # token, layer, and ids of each row of the request
    rows = array("q")
    with path.open(newline="", encoding="utf-8-sig") as handle:
        reader = csv.DictReader(handle)
        names = reader.fieldnames or []
        missing = [name for name in ("layer", "token", "experts") if name not in names]
        if missing:
            raise UserError(f"{path} holds no column {missing[0]!r}; it needs layer, token and experts")
        for line, row in enumerate(reader, start=2):
            try:
                request, token, layer = int(row.get("request") or 0), int(row["token"]), int(row["layer"])
                ids = [int(part) for part in row["experts"].replace(";", " ").replace("|", " ").split()]
            except (TypeError, ValueError, AttributeError):
                raise UserError(f"{path}, line {line}: layer, token and experts must be whole numbers") from None
            if len(ids) != spec.K:
                raise UserError(f"{path}, line {line}: {len(ids)} experts where {spec.name} has top-{spec.K}")
            if request != current:
                if current is not None:
                    yield _request(path, rows, spec)
                if request in seen:
                    raise UserError(f"{path}, line {line}: the rows of a request must be consecutive")
                seen.add(request)
                current, rows = request, array("q")
            try:
                rows.extend((token, layer, *ids))
            except OverflowError:
                raise UserError(f"{path}, line {line}: a number is out of range") from None
    if current is not None:
        yield _request(path, rows, spec)


def _request(path: Path, rows: array[int], spec: MoESpec) -> ImportedRequest:
    table = np.frombuffer(rows, np.int64).reshape(-1, 2 + spec.K)
    table = table[np.lexsort((table[:, 1], table[:, 0]))]
    tokens, over = divmod(len(table), spec.L)
    whole = not over
    if whole:
        by_token = table.reshape(tokens, spec.L, -1)
        whole = bool((by_token[..., 1] == np.arange(spec.L)).all() and (by_token[..., 0] == by_token[:, :1, 0]).all())
    if not whole:
        raise UserError(f"{path}: every token needs exactly one row for each of the layers 0 to {spec.L - 1}")
    return ImportedRequest(topk_TLK=by_token[..., 2:])

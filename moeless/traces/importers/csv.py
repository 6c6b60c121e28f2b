"""Importer of CSV rows ``layer,token,experts``: ids separated by spaces, optional ``request`` column."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from moeless.errors import UserError
from moeless.spec import MoESpec
from moeless.traces.importers.parquet import import_rows
from moeless.traces.info import TraceInfo


def import_csv(path: Path, out: Path, spec: MoESpec) -> TraceInfo:
    """Write a token trace from a CSV file; every token needs one row per MoE layer.

    ``layer`` counts MoE layers from 0, ``token`` counts tokens from 0 (within ``request`` where there is one),
    ``experts`` holds the ids, separated by spaces, semicolons or bars. Without ``request`` all is one request.

    Raises:
        UserError: a row breaks the layout or does not fit the model, or ``out`` cannot be written.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; a CSV file with columns layer,token,experts is needed")
    keys: list[tuple[int, int, int]] = []
    ids: list[list[int]] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle)
            names = reader.fieldnames or []
            missing = [name for name in ("layer", "token", "experts") if name not in names]
            if missing:
                raise UserError(f"{path} holds no column {missing[0]!r}; it needs layer, token and experts")
            for line, row in enumerate(reader, start=2):
                try:
                    keys.append((int(row.get("request") or 0), int(row["token"]), int(row["layer"])))
                    ids.append([int(part) for part in row["experts"].replace(";", " ").replace("|", " ").split()])
                except (TypeError, ValueError, AttributeError):
                    raise UserError(f"{path}, line {line}: layer, token and experts must be whole numbers") from None
                if len(ids[-1]) != spec.K:
                    raise UserError(f"{path}, line {line}: {len(ids[-1])} experts where {spec.name} has top-{spec.K}")
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV file in UTF-8 ({error})") from None
    if not keys:
        raise UserError(f"{path} holds 0 tokens")
    key, experts = np.array(keys, np.int64), np.array(ids, np.int64)
    order = np.lexsort((key[:, 2], key[:, 1], key[:, 0]))
    key, experts = key[order], experts[order]
    if len(key) % spec.L or (key[:, 2] != np.tile(np.arange(spec.L), len(key) // spec.L)).any():
        raise UserError(f"{path}: every token needs exactly one row for each of the layers 0 to {spec.L - 1}")
    tokens = key[:: spec.L]
    if (key[:, :2].reshape(-1, spec.L, 2) != tokens[:, None, :2]).any():
        raise UserError(f"{path}: every token needs exactly one row for each of the layers 0 to {spec.L - 1}")
    columns = {"request": tokens[:, 0], "experts": experts.reshape(-1, spec.L, spec.K)}
    return import_rows(path, out, spec, columns, importer="csv")

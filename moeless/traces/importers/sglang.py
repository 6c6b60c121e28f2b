"""Importer of SGLang's expert-distribution recorder (``stat``, ``per_pass`` and ``per_token`` dumps).

Layers in these files are all hidden layers by absolute index: rows of dense layers are zero in counts and -1 in
ids. Ids of ``per_*`` records are physical and become logical through ``last_physical_to_logical_map``.
"""

from __future__ import annotations

import zipfile
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless.contracts import Phase
from moeless.errors import UserError
from moeless.files import folder_atomic, reading, sha256
from moeless.spec import MoESpec
from moeless.traces.info import TraceInfo
from moeless.traces.writers import CountsTraceWriter, IterationTraceWriter

#: SGLang's forward_mode numbers.
_PHASES = {1: Phase.PREFILL, 2: Phase.DECODE, 3: Phase.MIXED}
_IDLE = 4
_PREFIX = "expert_distribution_recorder_"
#: Rows of a stat dump's buffer that are copied at once.
_STAT_ROWS = 64


def load_pt(path: Path) -> dict[str, Any]:
    """A ``.pt`` file's dictionary; code in the pickle is never executed.

    Tensors stay in the file until they are looked at, so that memory does not grow with them; what the recorder
    writes as Python lists (token ids and positions) is read whole.

    Raises:
        UserError: it is cut short, holds code or other objects than tensors and plain data, or is no dictionary.
    """
    import pickle

    import torch

    if not path.is_file():
        raise UserError(f"{path} does not exist; an expert-distribution dump (.pt) or a folder of them is needed")
    try:
        # files of PyTorch before 1.6 are no zip archives and cannot be mapped
        with reading(path):
            # is_zipfile takes what it may not read for no archive
            data = torch.load(path, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "Weights only" in str(error) or "Unsupported" in str(error):
            raise UserError(f"{path} holds Python objects other than tensors and plain data; it is not read") from None
        raise UserError(f"{path} is not a whole .pt file") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is not a whole .pt file ({(str(error) or 'empty').splitlines()[0][:80]})") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a {type(data).__name__}, an expert-distribution dump is a dictionary")
    return data


def import_sglang(path: Path, out: Path, spec: MoESpec) -> TraceInfo:
    """Write a trace from one dump, or from a folder with one dump a rank.

    ``per_token`` gives kind *iterations*, ``stat`` and ``per_pass`` kind *counts*.

    Raises:
        UserError: a file breaks the layout or does not fit the model, or ``out`` cannot be written.
    """
    files = sorted(path.glob(f"{_PREFIX}*.pt")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no {_PREFIX}*.pt file")
    dumps = [load_pt(file) for file in files]
    source = {"importer": "sglang", "files": [file.name for file in files], "sha256": [sha256(file) for file in files]}
    if all("logical_count" in dump for dump in dumps):
        if len(dumps) > 1:
            raise UserError(f"{path} holds {len(dumps)} stat dumps, which do not belong together; give one file")
        return _stat(files[0], dumps[0], out, spec, source)
    if not all("records" in dump and "last_physical_to_logical_map" in dump for dump in dumps):
        raise UserError(f"{path} holds neither logical_count nor records with last_physical_to_logical_map")
    records = [_of_file(file, dump, spec) for file, dump in zip(files, dumps, strict=True)]
    flat = sorted(
        (entry for entries in records for entry in entries), key=lambda entry: (entry["forward_pass_id"], entry["rank"])
    )
    flat = [entry for entry in flat if entry.get("forward_mode") != _IDLE]
    if not flat:
        raise UserError(f"{path} holds 0 tokens")
    detailed = ["topk_ids_of_layer" in entry for entry in flat]
    if all(detailed):
        return _per_token(path, flat, out, spec, source)
    if any(detailed):
        raise UserError(f"{path} mixes per_token and per_pass records; import them apart")
    return _per_pass(path, flat, out, spec, source)


def _array(where: str, value: Any, dimensions: int, kinds: str = "iu") -> NDArray[Any]:
    array = np.asarray(value)
    if array.ndim != dimensions or array.dtype.kind not in kinds:
        raise UserError(f"{where} must be whole numbers of {dimensions} dimensions, got {array.dtype} {array.shape}")
    return array


def _moe_rows(where: str, rows: int, spec: MoESpec) -> NDArray[np.int64]:
    """Which of a file's layer rows are MoE layers."""
    if rows == spec.num_layers:
        return np.array(spec.moe_layers, np.int64)
    if rows == spec.L:
        return np.arange(spec.L)
    raise UserError(f"{where} has {rows} layers; {spec.name} has {spec.num_layers}, of which {spec.L} are MoE layers")


def _stat(path: Path, dump: dict[str, Any], out: Path, spec: MoESpec, source: dict[str, Any]) -> TraceInfo:
    count = _array(f"{path}: logical_count", dump["logical_count"], 3)
    layers = _moe_rows(f"{path}: logical_count", count.shape[1], spec)
    if count.shape[2] != spec.E:
        raise UserError(f"{path}: logical_count has {count.shape[2]} experts, {spec.name} has {spec.E}")
    notes = [
        "the recorder's buffer is circular: iterations may not be in order, and those beyond its size are lost",
        _inflation(),
    ]
    info = TraceInfo("counts", spec, source, has_weights=False, notes=tuple(notes))
    with folder_atomic(out) as folder:
        writer = CountsTraceWriter(folder, info)
        used = 0
        for first in range(0, len(count), _STAT_ROWS):
            rows = count[first : first + _STAT_ROWS]
            if (rows < 0).any():
                raise UserError(f"{path}: logical_count holds negative counts")
            load = rows[:, layers]
            load = load[load.any(axis=(1, 2))]  # rows of the buffer that were never used
            writer.append(used + np.arange(len(load)), int(Phase.MIXED), load)
            used += len(load)
        if not used:
            raise UserError(f"{path} holds 0 tokens")
        return writer.close()


def _inflation() -> str:
    return (
        "without an all-to-all backend every rank counts the same tokens, so counts may be inflated by the number "
        "of ranks; shares are right either way"
    )


def _of_file(path: Path, dump: dict[str, Any], spec: MoESpec) -> list[dict[str, Any]]:
    if not isinstance(dump["records"], list):
        raise UserError(f"{path}: records must be a list")
    mapping = _array(f"{path}: last_physical_to_logical_map", dump["last_physical_to_logical_map"], 2)
    if mapping.size and (mapping.min() < 0 or mapping.max() >= spec.E):
        raise UserError(f"{path}: last_physical_to_logical_map names experts outside 0..{spec.E - 1}")
    made = []
    for index, record in enumerate(dump["records"]):
        if not isinstance(record, dict) or "forward_pass_id" not in record:
            raise UserError(f"{path}: record {index} has no forward_pass_id")
        made.append(
            {
                **record,
                "forward_pass_id": int(record["forward_pass_id"]),
                "rank": int(record.get("rank", dump.get("rank", 0))),
                "map": mapping,
                "where": f"{path}: record {index}",
            }
        )
    return made


def _per_token(
    path: Path, records: list[dict[str, Any]], out: Path, spec: MoESpec, source: dict[str, Any]
) -> TraceInfo:
    repeated = _same_on_all_ranks(records)
    notes = ["physical ids were mapped by the dump's last map, which is wrong for passes before the last rebalancing"]
    if repeated:
        notes.append(f"all {repeated} ranks recorded the same tokens: only the first rank's were kept")
        first = min(record["rank"] for record in records)
        records = [record for record in records if record["rank"] == first]
    info = TraceInfo("iterations", spec, source, has_weights=False, notes=tuple(notes))
    with folder_atomic(out) as folder:
        writer = IterationTraceWriter(folder, info)
        for record in records:
            topk = _topk(record, spec)
            count = len(topk)
            if not count:
                continue
            phase = _PHASES.get(int(record.get("forward_mode") or 0), Phase.MIXED)
            optional = {}
            for name in ("input_ids", "positions"):
                if record.get(name) is not None:
                    values = _array(f"{record['where']}: {name}", record[name], 1)
                    if len(values) < count:
                        raise UserError(f"{record['where']}: {name} has {len(values)} entries for {count} tokens")
                    optional[name] = values[:count]
            writer.append(
                record["forward_pass_id"],
                record["rank"],
                int(phase),
                topk,
                token_T=optional.get("input_ids"),
                position_T=optional.get("positions"),
            )
        if not writer.pending_rows and not writer.rows:
            raise UserError(f"{path} holds 0 tokens")
        return writer.close()


def _topk(record: dict[str, Any], spec: MoESpec) -> NDArray[np.int64]:
    """Logical ids ``[T, L, K]`` of one record; the recorder pads to eight ids with -1."""
    where = f"{record['where']}: topk_ids_of_layer"
    ids = _array(where, record["topk_ids_of_layer"], 3)
    layers = _moe_rows(where, ids.shape[0], spec)
    mapping = record["map"]
    if ids.shape[2] < spec.K:
        raise UserError(f"{where} holds {ids.shape[2]} ids a token, {spec.name} has top-{spec.K}")
    chosen = ids[layers]
    if chosen.shape[1] and (chosen[..., spec.K :] != -1).any():
        raise UserError(f"{where} holds more than top-{spec.K} ids of a token")
    chosen = chosen[..., : spec.K]
    # tokens that pad a CUDA graph have no ids in any layer
    blank = (chosen == -1).all(axis=(0, 2))
    chosen = chosen[:, ~blank]
    if mapping.shape[0] != ids.shape[0] and mapping.shape[0] != spec.L:
        raise UserError(f"{where} has {ids.shape[0]} layers, the map has {mapping.shape[0]}")
    rows = mapping[layers] if mapping.shape[0] == ids.shape[0] else mapping
    if chosen.size and (chosen.min() < 0 or chosen.max() >= rows.shape[1]):
        raise UserError(f"{where}: ids must lie in 0..{rows.shape[1] - 1}")
    logical = np.take_along_axis(rows[:, None, :], chosen.astype(np.int64), axis=2)
    return np.ascontiguousarray(logical.transpose(1, 0, 2))


def _same_on_all_ranks(records: list[dict[str, Any]]) -> int:
    """Number of ranks when every one of them recorded identical ids, otherwise 0."""
    by_rank: dict[int, list[Any]] = {}
    for record in records:
        by_rank.setdefault(record["rank"], []).append(np.asarray(record["topk_ids_of_layer"]))
    first, *others = by_rank.values()
    if not others:
        return 0
    for other in others:
        if len(other) != len(first) or any(not np.array_equal(a, b) for a, b in zip(first, other, strict=True)):
            return 0
    return len(by_rank)


def _per_pass(path: Path, records: list[dict[str, Any]], out: Path, spec: MoESpec, source: dict[str, Any]) -> TraceInfo:
    ranks = len({record["rank"] for record in records})
    notes = (_inflation(),) if ranks > 1 else ()
    info = TraceInfo("counts", spec, source, has_weights=False, notes=notes)
    with folder_atomic(out) as folder:
        writer = CountsTraceWriter(folder, info)
        for key, of_pass in groupby(records, key=lambda record: record["forward_pass_id"]):
            load = np.zeros((spec.L, spec.E), np.int64)
            for record in of_pass:
                load += _pass_load(record, spec)
            if load.any():
                writer.append([key], int(Phase.MIXED), load[None])
        if not writer.pending_rows and not writer.rows:
            raise UserError(f"{path} holds 0 tokens")
        return writer.close()


def _pass_load(record: dict[str, Any], spec: MoESpec) -> NDArray[np.int64]:
    """Tokens of each logical expert ``[L, E]`` in one rank's record of one pass."""
    where = f"{record['where']}: global_physical_count"
    count = _array(where, record.get("global_physical_count"), 2)
    mapping = record["map"]
    if count.shape != mapping.shape:
        raise UserError(f"{where} has shape {count.shape}, the map has {mapping.shape}")
    if (count < 0).any():
        raise UserError(f"{where} holds negative counts")
    layers = _moe_rows(where, count.shape[0], spec)
    load = [np.bincount(mapping[layer], weights=count[layer], minlength=spec.E) for layer in layers]
    return np.asarray(load, np.int64)

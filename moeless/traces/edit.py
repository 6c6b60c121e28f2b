"""Merging traces of one model, and cutting a part out of one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moeless.errors import UserError
from moeless.files import folder_atomic
from moeless.traces.info import TraceInfo
from moeless.traces.store import TokenTrace
from moeless.traces.writers import RequestRows, TokenTraceWriter


def slice_trace(trace: TokenTrace, requests: Sequence[int], out: Path) -> TraceInfo:
    """Write the given requests (indices into ``trace.requests``) as a new trace, numbered from 0.

    Raises:
        UserError: an index is out of range, none is given, or ``out`` cannot be written.
    """
    bad = [index for index in requests if not 0 <= index < trace.num_requests]
    if bad or not len(requests):
        raise UserError(f"{trace.path} has requests 0 to {trace.num_requests - 1}; choose some of them")
    source = {"part_of": dict(trace.info.source), "requests": len(requests)}
    return _write([(trace, [int(index) for index in requests])], out, source)


def merge_traces(traces: Sequence[TokenTrace], out: Path) -> TraceInfo:
    """Write the requests of several traces of one model, one after the other, as a new trace.

    Weights and router inputs are kept where every trace has them.

    Raises:
        UserError: the models differ, or ``out`` cannot be written.
    """
    if not traces:
        raise UserError("there is no trace to merge")
    first = traces[0].spec
    for other in traces[1:]:
        if other.spec != first:
            raise UserError(f"{other.path} is of {other.spec.name}, {traces[0].path} of another shape ({first.name})")
    source = {"merged": [dict(trace.info.source) for trace in traces]}
    return _write([(trace, list(range(trace.num_requests))) for trace in traces], out, source)


def _write(parts: list[tuple[TokenTrace, list[int]]], out: Path, source: dict[str, Any]) -> TraceInfo:
    infos = [trace.info for trace, _ in parts]
    dtypes = {info.router_input_dtype for info in infos}
    info = TraceInfo(
        kind="tokens",
        spec=infos[0].spec,
        source=source,
        prompt_source=infos[0].prompt_source if len(infos) == 1 else None,
        seed=infos[0].seed if len(infos) == 1 else None,
        synthetic=any(info.synthetic for info in infos),
        has_weights=all(info.has_weights for info in infos),
        router_input_dtype=dtypes.pop() if len(dtypes) == 1 else None,
        settings=infos[0].settings if len(infos) == 1 else {},
        notes=tuple(dict.fromkeys(note for info in infos for note in info.notes)),
    )
    with folder_atomic(out) as folder:
        writer = TokenTraceWriter(folder, info)
        number = 0
        for trace, chosen in parts:
            for index in chosen:
                writer.append([_request(trace, index, number, info)])
                number += 1
        return writer.close()


def _request(trace: TokenTrace, index: int, number: int, info: TraceInfo) -> RequestRows:
    rows, table = trace.rows(index), trace.requests
    tokens = trace.token_T[rows]
    inputs = None
    if info.router_input_dtype is not None:
        import torch

        inputs = torch.from_numpy(trace.router_inputs(rows.start, rows.stop)).to(
            getattr(torch, info.router_input_dtype)
        )
    return RequestRows(
        request=number,
        topk_TLK=trace.topk(rows.start, rows.stop),
        prompt_tokens=int(table.prompt_tokens[index]),
        output_tokens=int(table.output_tokens[index]),
        weights_TLK=trace.weights(rows.start, rows.stop) if info.has_weights else None,
        token_T=None if np.all(tokens < 0) else tokens,
        input_TLH=inputs,
        category=table.category[index],
        source_id=table.source_id[index],
    )

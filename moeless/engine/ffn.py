"""Expert mathematics over a rank's copies: grouped products, with a loop where they are not supported.

Axes: N token rows ordered by slot, C slots (places for copies in a rank's memory), H hidden, I expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional

from moeless.engine.device import upload


class ExpertFFN(Protocol):
    """What a host tells of its family's experts.

    Attributes:
        shapes: name and shape of every weight of one expert.
        dtype: type in which they are kept and computed.
        weighs_input: a token's weight scales its expert's input (Llama-4), not its output.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    weighs_input: bool

    def __call__(
        self, rows_NH: torch.Tensor, count_C: Sequence[int], slots: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """The experts' outputs ``[N, H]``; rows are ordered by slot, ``count_C`` of them each."""
        ...


@dataclass
class GatedFFN:
    """Up-projection, activation, down-projection, with optional biases and transposed storage.

    Attributes:
        shapes: of ``up`` (``[2I, H]``, or ``[H, 2I]`` where transposed; I where there is no gate), ``down``, and of
            ``up_bias`` and ``down_bias`` where the family has them.
        activate: from the up-projection's output to the down-projection's input (gating included).
        transposed: weights are stored input first.
        grouped: use the library's grouped matrix product; switched off where it refuses.
        products: grouped products (or loops in their place) computed so far.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    activate: Callable[[torch.Tensor], torch.Tensor]
    transposed: bool = False
    grouped: bool = True
    weighs_input: bool = False
    products: int = 0

    def __call__(
        self, rows_NH: torch.Tensor, count_C: Sequence[int], slots: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        if not len(rows_NH):
            return rows_NH
        self.products += 2
        if self.grouped:
            try:
                return self._grouped(rows_NH, count_C, slots)
            except (RuntimeError, AttributeError, NotImplementedError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                # no kernel for this type, alignment or device; the loop computes the same
                self.grouped = False
        return self._loop(rows_NH, count_C, slots)

    def _grouped(self, rows: torch.Tensor, count_C: Sequence[int], slots: Mapping[str, torch.Tensor]) -> torch.Tensor:
        counts = upload(np.array(count_C, np.int32), rows.device)
        offsets = torch.cumsum(counts, 0, dtype=torch.int32)
        out = rows
        for name in ("up", "down"):
            weight = slots[name] if self.transposed else slots[name].transpose(-2, -1)
            out = functional.grouped_mm(out, weight, offs=offsets)
            if f"{name}_bias" in slots:
                out = out + torch.repeat_interleave(slots[f"{name}_bias"], counts, dim=0, output_size=len(rows))
            if name == "up":
                out = self.activate(out)
        return out

    def _loop(self, rows: torch.Tensor, count_C: Sequence[int], slots: Mapping[str, torch.Tensor]) -> torch.Tensor:
        parts, start = [], 0
        for slot, count in enumerate(count_C):
            if not count:
                continue
            out = rows[start : start + count]
            start += count
            for name in ("up", "down"):
                weight = slots[name][slot]
                bias = slots[f"{name}_bias"][slot] if f"{name}_bias" in slots else None
                out = functional.linear(out, weight.T if self.transposed else weight, bias)
                if name == "up":
                    out = self.activate(out)
            parts.append(out)
        return torch.cat(parts)


def silu_gate(gate_up: torch.Tensor) -> torch.Tensor:
    """SwiGLU with the gate first: ``silu(gate) * up``."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up

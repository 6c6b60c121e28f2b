"""Kernels of the engine's hot path: measured time over the floor set by bytes and operations, checked in float64.

Axes: T tokens, H hidden, K top-k, N = T*K assignments, E experts, C copies on one rank, G ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from moeless.engine import triton_kernels as fused
from moeless.engine.core import combine, order_by_replica
from moeless.engine.ffn import GatedFFN, silu_gate
from moeless.profiling.ceilings import Ceilings
from moeless.profiling.parts import route
from moeless.profiling.timing import Effort, measure
from moeless.spec import MoESpec

#: Relative error in Frobenius norm that rounding alone explains.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class KernelRow:
    """One line of the table.

    Attributes:
        floor: the larger of operations over the measured rate and bytes over the measured copy bandwidth, seconds.
        error: ``|out - reference| / |reference|`` against float64.
    """

    kernel: str
    shape: str
    seconds: float
    low: float
    high: float
    floor: float
    error: float
    correct: bool

    @property
    def over_floor(self) -> float:
        """Measured time over the floor."""
        return self.seconds / self.floor


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the reference; NaN counts as infinite."""
    error = float((out.double() - reference.double()).norm() / reference.double().norm())
    return error if np.isfinite(error) else float("inf")


class HotPath:
    """The kernels at one model's shapes on one rank of ``ranks``, for ``tokens`` tokens of its own.

    Every input is random and fresh; assignments are skewed as real ones are (weights 1, 1/2, 1/3, ...).

    Attributes:
        failed: Triton's kernels that did not run here, and why.
    """

    def __init__(
        self,
        spec: MoESpec,
        device: torch.device,
        dtype: torch.dtype,
        tokens: int,
        ranks: int,
        ceilings: Ceilings,
        effort: Effort,
        seed: int,
        triton: bool = True,
    ) -> None:
        self.spec, self.device, self.dtype, self.tokens, self.ranks = spec, device, dtype, tokens, ranks
        self.ceilings, self.effort = ceilings, effort
        self.triton = triton and fused.available(device)
        self.failed: dict[str, str] = {}
        self._experts = np.arange(spec.E, dtype=np.int32)
        random = np.random.default_rng(seed)
        skew = 1.0 / np.arange(1, spec.E + 1)
        random.shuffle(skew)
        scores = np.log(skew) + random.gumbel(size=(tokens, spec.E))
        self.topk_TK = torch.from_numpy(np.argsort(-scores, axis=1)[:, : spec.K].copy()).to(device)
        self.hidden_TH = self._normal(tokens, spec.hidden_size)
        self.weight_TK = torch.rand(tokens, spec.K, device=device).to(dtype)
        self.load_E = np.bincount(self.topk_TK.cpu().numpy().reshape(-1), minlength=spec.E)

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=self.dtype, device=self.device).normal_()

    def _row(
        self,
        kernel: str,
        shape: str,
        call: Callable[[], object],
        out: torch.Tensor,
        reference: torch.Tensor,
        moved: float,
        operations: float = 0.0,
        exact: bool = False,
    ) -> KernelRow:
        sample = measure([call], self.device, self.effort)
        rate = self.ceilings.flops[str(self.dtype).removeprefix("torch.")]
        floor = max(operations / rate, moved / self.ceilings.copy_bytes_per_second)
        error = relative_error(out, reference)
        correct = error == 0.0 if exact else error <= TOLERANCE[self.dtype]
        return KernelRow(kernel, shape, sample.seconds, sample.low, sample.high, floor, error, correct)

    def _variant(
        self,
        kernel: str,
        shape: str,
        call: Callable[[], torch.Tensor],
        reference: torch.Tensor,
        moved: float,
        operations: float = 0.0,
        exact: bool = False,
    ) -> list[KernelRow]:
        """Triton's way of doing the same; what does not compile here is noted and left out."""
        try:
            return [self._row(kernel, shape, call, call(), reference, moved, operations, exact)]
        except Exception as error:
            self.failed[kernel] = (str(error).strip() or type(error).__name__).splitlines()[0]
            return []

    def rows(self) -> list[KernelRow]:
        """The whole table; Triton's variants stand after the engine's own where they can run."""
        return [
            *self.orders(),
            *self.gathers(),
            self.experts(),
            *self.activations(),
            *self.combines(),
            *self.forecasts(),
            self.dispatch_stage(),
        ]

    def _order(self) -> torch.Tensor:
        return order_by_replica(self.topk_TK, self.load_E, self._experts)

    def _tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        bound, shift = fused.place_tables(self.load_E, self._experts, self.spec.E)
        return torch.from_numpy(bound).to(self.device), torch.from_numpy(shift).to(self.device)

    def orders(self) -> list[KernelRow]:
        """Shares: assignments in order of the replica that serves them, from quotas."""
        order = self._order()
        reference = torch.from_numpy(np.argsort(self.topk_TK.cpu().numpy().reshape(-1), kind="stable"))
        shape, moved = f"N={order.numel()}", 2.0 * self.topk_TK.numel() * 8
        rows = [self._row("shares (order by replica)", shape, self._order, order.cpu(), reference, moved, exact=True)]
        if self.triton:
            tables = self._tables()

            def call() -> torch.Tensor:
                return fused.places(self.topk_TK, *tables)

            place = torch.argsort(reference)
            rows += self._variant("shares (triton)", shape, call, place.to(self.device), moved, exact=True)
        return rows

    def gathers(self) -> list[KernelRow]:
        """Dispatch permutation: token rows in order of destination."""
        token_N = self._order() // self.spec.K
        reference = self.hidden_TH.double()[token_N]
        values = (self.tokens + len(token_N)) * self.spec.hidden_size
        moved = float(values * self.hidden_TH.element_size())
        shape = f"N={len(token_N)} H={self.spec.hidden_size}"

        def engine() -> torch.Tensor:
            return self.hidden_TH.index_select(0, token_N)

        rows = [self._row("dispatch permutation", shape, engine, engine(), reference, moved, exact=True)]
        if self.triton:
            place_N = torch.argsort(self._order()).int()

            def scatter() -> torch.Tensor:
                return fused.scatter_rows(self.hidden_TH, place_N, self.spec.K)

            name = "dispatch permutation (triton)"
            rows += self._variant(name, shape, scatter, reference, moved, exact=True)
        return rows

    def activations(self) -> list[KernelRow]:
        """The activation between the experts' two products."""
        width = self.spec.expert_intermediate_size
        both = self._normal(int(self.load_E.sum()), 2 * width)
        gate, up = both.double().chunk(2, -1)
        reference = functional.silu(gate) * up
        moved = float(1.5 * both.numel() * both.element_size())
        shape = f"N={len(both)} I={width}"
        rows = [self._row("gated activation", shape, lambda: silu_gate(both), silu_gate(both), reference, moved)]
        if self.triton:
            name = "gated activation (triton)"
            rows += self._variant(name, shape, lambda: fused.silu_gate(both), reference, moved)
        return rows

    def experts(self) -> KernelRow:
        """Grouped expert compute on one rank's copies, with the rows of all ranks that chose them."""
        spec = self.spec
        copies = -(-spec.E // self.ranks)
        counts = (self.load_E[:copies] * self.ranks).tolist()
        hidden, width = spec.hidden_size, spec.expert_intermediate_size
        slots = {
            "up": self._normal(copies, 2 * width, hidden) * hidden**-0.5,
            "down": self._normal(copies, hidden, width) * width**-0.5,
        }
        ffn = GatedFFN({name: tuple(weight.shape[1:]) for name, weight in slots.items()}, self.dtype, silu_gate)
        rows = self._normal(sum(counts), hidden)
        out = ffn(rows, counts, slots)
        reference = torch.cat(
            [
                self._reference_expert(part, slots["up"][c], slots["down"][c])
                for c, part in enumerate(rows.split(counts))
                if len(part)
            ]
        )
        used = sum(count > 0 for count in counts)
        moved = (used * 3 * hidden * width + 2 * rows.numel()) * rows.element_size()
        name = "grouped experts" if ffn.grouped else "experts (loop: no grouped product here)"
        shape = f"C={copies} N={len(rows)} H={hidden} I={width}"
        operations = 6.0 * len(rows) * hidden * width
        return self._row(name, shape, lambda: ffn(rows, counts, slots), out, reference, float(moved), operations)

    @staticmethod
    def _reference_expert(rows: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        gate, value = functional.linear(rows.double(), up.double()).chunk(2, dim=-1)
        return functional.linear(functional.silu(gate) * value, down.double())

    def combines(self) -> list[KernelRow]:
        """Combine: each token's weighted rows summed."""
        order = self._order()
        rows = self._normal(order.numel(), self.spec.hidden_size)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=self.device)
        inverse_TK = place.view(self.tokens, self.spec.K)
        reference = (rows.double()[inverse_TK] * self.weight_TK.double()[..., None]).sum(1)
        moved = float((rows.numel() + self.hidden_TH.numel()) * rows.element_size())
        shape = f"N={len(rows)} H={self.spec.hidden_size}"

        def engine() -> torch.Tensor:
            return combine(rows, order, self.weight_TK, self.tokens, self.spec.K)

        found = [self._row("combine", shape, engine, engine(), reference, moved)]
        if self.triton:
            place_N = place.int()

            def gather() -> torch.Tensor:
                return fused.combine_rows(rows, place_N, self.weight_TK)

            found += self._variant("combine (triton)", shape, gather, reference, moved)
        return found

    def forecasts(self) -> list[KernelRow]:
        """Forecast: the next layer's gate on this layer's input, top-k, counts per expert."""
        spec = self.spec
        gate = self._normal(spec.E, spec.hidden_size) * spec.hidden_size**-0.5

        def call() -> torch.Tensor:
            chosen, _ = route(self.hidden_TH, gate, spec.K)
            return torch.bincount(chosen.reshape(-1), minlength=spec.E)

        # ids of equal scores may differ from float64's: the scores of the chosen are what must agree
        chosen, _ = route(self.hidden_TH, gate, spec.K)
        score = torch.softmax(functional.linear(self.hidden_TH.double(), gate.double()), dim=-1)
        best = torch.topk(score, spec.K, dim=-1).values
        moved = float((self.hidden_TH.numel() + gate.numel()) * gate.element_size())
        shape = f"T={self.tokens} H={spec.hidden_size} E={spec.E}"
        work = 2.0 * self.tokens * spec.hidden_size * spec.E
        name = "forecast (gate, top-k, counts)"
        rows = [self._row(name, shape, call, score.gather(1, chosen), best, moved, work)]
        if self.triton:

            def counted() -> torch.Tensor:
                return fused.forecast_counts(functional.linear(self.hidden_TH, gate), spec.K)

            # counting is exact on the scores as they were rounded, whose ties go to the lowest expert
            rounded = functional.linear(self.hidden_TH, gate).double()
            lowest = torch.argsort(-rounded, dim=-1, stable=True)[:, : spec.K]
            counts = torch.bincount(lowest.reshape(-1), minlength=spec.E)
            rows += self._variant("forecast (triton)", shape, counted, counts, moved, work, exact=True)
        return rows

    def dispatch_stage(self) -> KernelRow:
        """What surrounds the planning after the gate: ids to the host, counts there, places' tables to the device.

        The planning itself is a compiled function on the host: ``control`` of the profile.
        """

        def call() -> torch.Tensor:
            ids = self.topk_TK.cpu().numpy().reshape(-1)
            bound, shift = fused.place_tables(np.bincount(ids, minlength=self.spec.E), self._experts, self.spec.E)
            return torch.from_numpy(np.stack([bound, shift])).to(self.device)

        reference = torch.stack(list(self._tables())).double()
        moved = float(self.topk_TK.numel() * 8 + reference.numel() * 4)
        shape = f"N={self.topk_TK.numel()} E={self.spec.E}"
        return self._row("dispatch stage (ids down, tables up)", shape, call, call(), reference, moved, exact=True)

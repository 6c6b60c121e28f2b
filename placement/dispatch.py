"""Dispatch rules: which copies serve which tokens of a layer, once the gate has chosen experts.

Axes: S source ranks, E experts, R replicas.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from moeless.compiled_call import call_at, function_address
from moeless.contracts import BoolArray, FloatArray, IntArray, LayerPlan
from moeless.costs import Control
from moeless.costs.layer_time import LayerCosts, MeasuredTables, no_tables
from moeless.errors import UserError
from moeless.jit import njit
from moeless.placement import dealing
from moeless.placement.setting import Setting

NO_NUMBERS = np.zeros(0)


class Quotas(Protocol):
    """A rule in Python: tokens of each source rank to each replica, ``[S, R]``; per expert they sum to ``load_SE``."""

    def __call__(self, load_SE: IntArray, plan: LayerPlan, usable_R: BoolArray, setting: Setting) -> IntArray: ...


def no_numbers(setting: Setting) -> FloatArray:
    """For rules that need none."""
    del setting
    return NO_NUMBERS


@dataclass(frozen=True)
class DispatchRule:
    """How a layer's tokens are dealt to its copies once the gate has chosen experts.

    A rule is either compiled (``deal``) or Python (``quotas``). A compiled one runs inside the simulator's compiled
    loops and in the live engine; a Python one is called layer by layer in both. Neither is asked where nothing is left
    to decide: layers whose experts have one copy each, and plans whose shares were fixed ahead.

    Attributes:
        gathers_counts: True if the ranks must gather their token counts before any of them can send, so that cost
            models charge the gathering and the decision to every layer that has a choice. False for rules that each
            rank can follow by itself.
        deal: ``deal(load, copies, numbers, costs, dealt)``, a function of ``moeless.jit.njit`` that writes rows into
            ``dealt`` and returns how many, see :mod:`moeless.placement.dealing`.
        numbers: the rule's own numbers, which ``deal`` gets.
        quotas: the rule in Python.
        timed_as: the entry of a hardware profile's ``control.dispatch_seconds`` that holds this rule's measured time;
            empty if none does.
    """

    gathers_counts: bool
    deal: Callable[..., int] | None = None
    numbers: Callable[[Setting], FloatArray] = no_numbers
    quotas: Quotas | None = None
    timed_as: str = ""

    def __post_init__(self) -> None:
        if (self.deal is None) == (self.quotas is None):
            raise UserError("a dispatch rule is either compiled or Python: give deal or quotas")

    @property
    def control(self) -> Control:
        """What cost models charge for it."""
        return Control(gathers_counts=self.gathers_counts, dispatch_timed_as=self.timed_as)

    @property
    def address(self) -> Any:
        """``deal`` for compiled loops, see :mod:`moeless.compiled_call`."""
        assert self.deal is not None
        return _address(self.deal)

    def __call__(self, load_SE: IntArray, plan: LayerPlan, usable_R: BoolArray, setting: Setting) -> IntArray:
        """Quotas, ``[S, R]`` tokens.

        Raises:
            UserError: ``usable_R`` does not match the plan.
        """
        usable = np.asarray(usable_R, np.bool_)
        if usable.shape != plan.expert_R.shape:
            raise UserError(f"usable marks must be one per replica: {plan.R} replicas, got shape {usable.shape}")
        load = np.ascontiguousarray(load_SE, np.int64)
        if self.quotas is not None and plan.decides:
            return self.quotas(load, plan, usable, setting)
        quota_SR = np.empty((len(load), plan.R), np.int64)
        fixed, asked = plan.share_R is not None, self.deal is not None and plan.decides
        _fill_table(
            _FIXED if fixed else _ASKED if asked else _HOMES, self.address if asked else 0, load, plan.expert_R,
            plan.gpu_R, plan.primary_R, usable, setting.cluster.num_gpus, plan.share_R if fixed else NO_NUMBERS,
            setting.derived(self.numbers) if asked else NO_NUMBERS, setting.derived(_packed_costs), quota_SR,
        )  # fmt: skip
        return quota_SR


#: How a table of quotas is filled: all to the primaries, by the plan's shares, by the rule.
_HOMES, _FIXED, _ASKED = 0, 1, 2


def _packed_costs(setting: Setting) -> tuple[Any, ...]:
    # compiled code takes plain tuples in less than half the time of named ones
    *first, tables = setting.costs.layer_costs
    return tuple(first), tuple(tables)


@lru_cache(maxsize=64)
def _address(deal: Callable[..., int]) -> Any:
    one, short, flag = np.zeros(1, np.int64), np.zeros(1, np.int32), np.zeros(1, np.bool_)
    load, dealt = dealing.LayerLoad(one, one, one, one, one), dealing.Dealt(one, one, one)
    copies = dealing.LayerCopies(short, short, flag, flag, one, one, one, 1)
    costs = LayerCosts(1.0, 1.0, 1.0, False, 1.0, False, 1, one, 1.0, 1.0, 1.0, 1.0, 1.0, no_tables())
    return function_address(deal, 0, (load, copies, NO_NUMBERS, costs, dealt))


@njit(cache=True, nogil=True)
def _fill_table(  # type: ignore[no-untyped-def]
    way, rule, load_SE, expert_R, gpu_R, primary_R, usable_R, num_gpus, share_R, numbers, packed, quota_SR
):
    (sources, experts), replicas = load_SE.shape, len(expert_R)
    work_W, serving_R = np.empty(dealing.table_size(sources, experts, replicas), np.int64), np.empty(replicas, np.bool_)
    # a row for each pair, and one beside for each copy, hold all that a rule writes
    dealt = dealing.room_for_rows((sources + 1) * replicas)
    _deal_table(
        way, rule, work_W, serving_R, load_SE, expert_R, gpu_R, primary_R, usable_R, num_gpus, share_R, numbers, packed,
        dealt, quota_SR,
    )  # fmt: skip


@njit(cache=True, nogil=True, allocates=False, inner=True)
def _deal_table(  # type: ignore[no-untyped-def]
    way, rule, work_W, serving_R, load_SE, expert_R, gpu_R, primary_R, usable_R, num_gpus, share_R, numbers, packed,
    dealt, quota_SR,
):  # fmt: skip
    load, copies = dealing.rows_in(work_W, serving_R, load_SE, expert_R, gpu_R, primary_R, usable_R, num_gpus)
    if way == _HOMES:
        rows = dealing.deal_to_homes(load, copies, dealt)
    elif way == _FIXED:
        rows = dealing.deal_by_shares(load, copies, share_R, dealt)
    else:
        costs = LayerCosts(*packed[0], MeasuredTables(*packed[1]))  # type: ignore[call-arg]
        rows = call_at(rule, load, copies, numbers, costs, dealt)
    dealing.fill_quotas(dealt, rows, quota_SR)


#: Each rank splits its own tokens: nothing is gathered.
EVEN = DispatchRule(gathers_counts=False, deal=dealing.deal_evenly)

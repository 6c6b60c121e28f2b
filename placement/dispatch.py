"""Dispatch rules: which copies serve which tokens of a layer, once the gate has chosen experts.

Axes: S source ranks, E experts, R replicas.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from moeless.compiled_call import function_address
from moeless.contracts import BoolArray, FloatArray, IntArray, LayerPlan
from moeless.costs import Control
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
        table: ``deal`` from a table of tokens by source rank and expert into one of quotas in one call, where an
            engine's speed matters: ``table(load_SE, expert_R, gpu_R, primary_R, usable_R, num_gpus, numbers, costs,
            quota_SR)``.
        quotas: the rule in Python.
        timed_as: the entry of a hardware profile's ``control.dispatch_seconds`` that holds this rule's measured time;
            empty if none does.
    """

    gathers_counts: bool
    deal: Callable[..., int] | None = None
    numbers: Callable[[Setting], FloatArray] = no_numbers
    table: Callable[..., None] | None = None
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
        where = load, plan.expert_R, plan.gpu_R, plan.primary_R, usable, setting.cluster.num_gpus
        if plan.share_R is not None:
            _fixed_table(*where, plan.share_R, quota_SR)
        elif self.deal is None or not plan.decides:
            _home_table(*where, quota_SR)
        elif self.table is not None:
            self.table(*where, setting.derived(self.numbers), setting.costs.layer_costs, quota_SR)
        else:
            numbers, costs = setting.derived(self.numbers), setting.costs.layer_costs
            rows = dealing.table_rows(*where)
            dealing.fill_quotas(rows.dealt, self.deal(rows.load, rows.copies, numbers, costs, rows.dealt), quota_SR)
        return quota_SR


@lru_cache(maxsize=64)
def _address(deal: Callable[..., int]) -> Any:
    from moeless.costs.layer_time import LayerCosts, no_tables

    one, flag = np.zeros(1, np.int64), np.zeros(1, np.bool_)
    table = dealing.table_rows(np.ones((1, 1), np.int64), one.astype(np.int32), one.astype(np.int32), flag, flag, 1)
    costs = LayerCosts(1.0, 1.0, 1.0, False, 1.0, False, 1, one, 1.0, 1.0, 1.0, 1.0, 1.0, no_tables())
    return function_address(deal, (table.load, table.copies, NO_NUMBERS, costs, table.dealt))


@njit(cache=True, nogil=True)
def _home_table(load_SE, expert_R, gpu_R, primary_R, usable_R, num_gpus, quota_SR):  # type: ignore[no-untyped-def]
    load, copies, dealt = dealing.table_rows(load_SE, expert_R, gpu_R, primary_R, usable_R, num_gpus)
    dealing.fill_quotas(dealt, dealing.deal_to_homes(load, copies, dealt), quota_SR)


@njit(cache=True, nogil=True)
def _fixed_table(load_SE, expert_R, gpu_R, primary_R, usable_R, num_gpus, share_R, quota_SR):  # type: ignore[no-untyped-def]
    load, copies, dealt = dealing.table_rows(load_SE, expert_R, gpu_R, primary_R, usable_R, num_gpus)
    dealing.fill_quotas(dealt, dealing.deal_by_shares(load, copies, share_R, dealt), quota_SR)


@njit(cache=True, nogil=True)
def _even_table(load_SE, expert_R, gpu_R, primary_R, usable_R, num_gpus, numbers, costs, quota_SR):  # type: ignore[no-untyped-def]
    load, copies, dealt = dealing.table_rows(load_SE, expert_R, gpu_R, primary_R, usable_R, num_gpus)
    dealing.fill_quotas(dealt, dealing.deal_evenly(load, copies, numbers, costs, dealt), quota_SR)


#: Each rank splits its own tokens: nothing is gathered.
EVEN = DispatchRule(gathers_counts=False, deal=dealing.deal_evenly, table=_even_table)

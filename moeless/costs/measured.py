"""Costs by interpolation of a hardware profile.

A profile holds the time T(n, a) of a equally loaded experts of n tokens each. Unequal loads are taken apart by
level: between the k-th and the (k+1)-th largest load, k experts are still at work, so

    time = sum over k of T(n_(k), k) - T(n_(k+1), k),    n_(1) >= n_(2) >= ..., after the last one 0, T(0, k) = 0.

This is exact for equal loads, and for unequal ones both where experts run one after another (T = a * t(n): the sum of
t) and where they run all at once (T = t(n): the largest). It never falls when a load or the number of active experts
rises, because the profile's mixed differences are not negative (``profile.ExpertGrid``).

Axes: R replicas, G GPUs, N tokens of the grid, K active experts.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from moeless.cluster import CPU, Cluster
from moeless.contracts import FloatArray, Int32Array, IntArray
from moeless.costs import links, roofline
from moeless.costs.base import Control, CostModel, CostTerms
from moeless.costs.exchange import ExchangeTimes
from moeless.costs.layer_time import (
    BEYOND_ACTIVE,
    BEYOND_FAST,
    BEYOND_SLOW,
    BEYOND_TOKENS,
    COMBINE,
    ENGINE_EXPERT,
    ENGINE_REST,
    PERMUTE,
    SOURCE,
    LayerCosts,
    MeasuredTables,
    curves,
    gpu_seconds,
    work_size,
)
from moeless.costs.profile import SHAPES, ExpertGrid, HardwareProfile
from moeless.costs.profile_reader import load_profile, shipped_profiles
from moeless.errors import UserError
from moeless.spec import MoESpec


def active_rows(grid: ExpertGrid, most: int) -> FloatArray:
    """The grid at 1, 2, ... ``most`` active experts, ``[K, N]``; the last segment's slope beyond it."""
    wanted = np.arange(1, most + 1, dtype=np.float64)
    rows = np.stack([np.interp(wanted, grid.active_A, column) for column in grid.seconds_AN.T], axis=1)
    beyond = wanted > grid.active_A[-1]
    if beyond.any() and len(grid.active_A) > 1:
        slope = (grid.seconds_AN[-1] - grid.seconds_AN[-2]) / (grid.active_A[-1] - grid.active_A[-2])
        rows[beyond] = grid.seconds_AN[-1] + (wanted[beyond, None] - grid.active_A[-1]) * slope
    elif beyond.any():
        # one expert at a time is all that is known: as many times as long
        rows[beyond] = wanted[beyond, None] * grid.seconds_AN[-1]
    return np.ascontiguousarray(rows)


def linear_terms(grid: ExpertGrid) -> tuple[float, float, float]:
    """Token, floor and launch seconds of ``launch + a * max(token * n, floor)`` with the least relative error.

    Tries break points n* = floor / token over the grid's range and solves the two remaining numbers by least squares.
    """
    tokens, active = np.meshgrid(grid.tokens_N, grid.active_A)
    target = grid.seconds_AN.ravel()
    best: tuple[float, float, float, float] | None = None
    for bend in np.geomspace(0.5, grid.tokens_N[-1], 160):
        shape = (active * np.maximum(tokens / bend, 1.0)).ravel()
        for with_launch in (True, False):
            columns = np.stack([np.ones_like(shape), shape] if with_launch else [shape], axis=1) / target[:, None]
            solved, *_ = np.linalg.lstsq(columns, np.ones_like(target), rcond=None)
            if (solved < 0).any():
                continue
            error = float(np.square(columns @ solved - 1.0).sum())
            if best is None or error < best[0]:
                floor = float(solved[-1])
                best = (error, floor / bend, floor, float(solved[0]) if with_launch else 0.0)
    assert best is not None  # the fit without a launch has a positive solution
    return best[1], best[2], best[3]


class MeasuredCosts(CostModel):
    """Times of a hardware profile.

    Args:
        profile: a profile's file, the name of a shipped one, or a profile; None takes the shipped one that fits.
        kernel, dtype: which of the profile's expert grids; None takes those the profile names.
        charge_control: False leaves control time out (the algorithm alone).

    Raises:
        UserError: the profile is of another model, or none fits.
    """

    name = "measured"

    def __init__(
        self,
        spec: MoESpec,
        cluster: Cluster,
        profile: str | HardwareProfile | None = None,
        kernel: str | None = None,
        dtype: str | None = None,
        charge_control: bool = True,
    ) -> None:
        super().__init__(spec, cluster)
        if profile is None:
            profile = _fitting(spec, cluster)
        self.profile = profile if isinstance(profile, HardwareProfile) else load_profile(profile)
        self.profile.check_model(spec)
        self.grid = self.profile.grid(kernel, dtype)
        self.charge_control = charge_control
        self._warnings: dict[str, None] = {}
        self.exchange = ExchangeTimes(self.profile, cluster, self._warn)
        machine = self.profile.document["machine"]
        if (machine.get("device") == "cpu") != (cluster.device.name == CPU.name):
            self._warn(f"times are those of {self.profile.device}, cluster {cluster.name} is of {cluster.device.name}")
        if "source" not in self.profile.parts and cluster.num_gpus > 1:
            self._warn(
                f"profile {self.profile.name} has no times of a source rank's sorting and adding up (it was made by an "
                "older program): they count as none"
            )
        if self.grid.dtype != spec.expert_dtype:
            self._warn(f"experts stored as {spec.expert_dtype} are timed as {self.grid.dtype}")

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was taken from outside the measurements so far, one sentence each."""
        beyond = self.layer_costs.tables.beyond > 0
        if beyond[BEYOND_ACTIVE]:
            self._warn(f"more than {self.grid.active_A[-1]:g} active experts on a GPU are extrapolated")
        if beyond[BEYOND_TOKENS]:
            self._warn(f"more than {self.grid.tokens_N[-1]:g} tokens per expert are extrapolated")
        for sentence in self.exchange.beyond(bool(beyond[BEYOND_FAST]), bool(beyond[BEYOND_SLOW])):
            self._warn(sentence)
        return tuple(self._warnings)

    def _warn(self, sentence: str) -> None:
        self._warnings.setdefault(sentence)

    def terms(self) -> CostTerms:
        return self._fitted

    @cached_property
    def _fitted(self) -> CostTerms:
        # planners ask in every iteration; the fit takes milliseconds
        token, floor, launch = linear_terms(self.grid)
        link, latency = self.exchange.linear()
        return CostTerms(
            token_seconds=token,
            floor_seconds=floor,
            launch_seconds=launch,
            link_seconds=link * self.spec.token_bytes,
            latency_seconds=latency,
            reduce_max=False,
        )

    def make_layer_costs(self) -> LayerCosts:
        cluster, parts, engine = self.cluster, self.profile.parts, self.exchange.engine
        kind, points = self.exchange.tables()
        found = {PERMUTE: parts["permute"], COMBINE: parts["combine"], SOURCE: parts.get("source")}
        if engine is not None:
            found |= {ENGINE_EXPERT: engine.engine_expert, ENGINE_REST: engine.engine_rest}
        points |= {name: (curve.x, curve.seconds) for name, curve in found.items() if curve is not None}
        rows_KN = active_rows(self.grid, max(self.spec.E, int(self.grid.active_A[-1])))
        tables = MeasuredTables(
            np.ascontiguousarray(self.grid.tokens_N, np.float64), rows_KN, int(self.grid.active_A[-1]), self.spec.K,
            kind, *curves(points), np.zeros(4),
        )  # fmt: skip
        lines = self.terms()
        return LayerCosts(
            token_seconds=lines.token_seconds,
            floor_seconds=lines.floor_seconds,
            launch_seconds=lines.launch_seconds,
            reduce_max=False,
            token_bytes=float(self.spec.token_bytes),
            local_is_free=True,
            island_size=cluster.island_size,
            island_G=np.arange(cluster.num_gpus) // cluster.island_size,
            fast_bytes_per_second=cluster.fast.bandwidth,
            fast_latency=cluster.fast.latency,
            slow_bytes_per_second=cluster.slow.bandwidth,
            slow_latency=cluster.slow.latency,
            misc_seconds=0.0,
            tables=tables,
        )

    def grouped_seconds(self, tokens_R: IntArray, gpu_R: IntArray | Int32Array) -> FloatArray:
        """Expert FFN time alone of each GPU, ``[G]``; equal loads that are grid points give the measured time."""
        tables = self.layer_costs.tables
        alone = self.layer_costs._replace(tables=tables._replace(points_C=np.zeros_like(tables.points_C)))
        seconds_G = np.zeros(self.cluster.num_gpus)
        tokens, gpu = np.ascontiguousarray(tokens_R, np.int64), np.asarray(gpu_R, np.int32)
        gpu_seconds(tokens, gpu, alone, seconds_G, np.empty(work_size(len(tokens), len(seconds_G)), np.int64))
        return seconds_G

    def load_seconds(self, num_bytes: float, source_tier: str, gpu: int) -> float:
        copies = self.profile.copies
        to_device = copies.get("host_to_device_pinned", copies.get("host_to_device_pageable"))
        if source_tier == "host" and to_device is not None:
            return to_device.at(num_bytes)
        if source_tier == "storage" and to_device is not None and "disk_to_host" in copies:
            # a stream through the host: the slower of the two counts
            return max(copies["disk_to_host"].at(num_bytes), to_device.at(num_bytes))
        if source_tier in ("peer", "peer-slow") and self.cluster.num_gpus > 1:
            return self.exchange.pair_seconds(num_bytes, slow=source_tier == "peer-slow")
        if source_tier != "local":
            self._warn(f"copies from {source_tier} were not measured: the cluster's stated bandwidth is taken")
        return links.transfer_seconds(self.cluster, num_bytes, source_tier)

    def control_seconds(self, control: Control, layer: int) -> float:
        if not self.charge_control or not control.gathers_counts:
            return 0.0
        dispatch = self.profile.dispatch_seconds.get(control.dispatch_timed_as)
        if dispatch is None:
            self._warn("this planner's dispatch was not measured: the roofline model's constant is taken")
            dispatch = roofline.DISPATCH_SECONDS
        # a layer measured as a whole holds its gather, whatever the policy
        gather = 0.0 if self.exchange.engine is not None else self.exchange.gather_seconds()
        return gather + dispatch

    def background_seconds(self, control: Control) -> float:
        if not self.charge_control or not control.plans_ahead:
            return 0.0
        plan = self.profile.plan_seconds.get(control.planning_timed_as)
        if plan is None:
            self._warn("this planner's planning was not measured: the roofline model's constant is taken")
            plan = roofline.PLAN_SECONDS
        # a forecast is one more gate
        return float(self.profile.parts["router"].seconds[0]) + plan


def _fitting(spec: MoESpec, cluster: Cluster) -> HardwareProfile:
    """The shipped profile of the model's shapes on the cluster's kind of device."""
    for name in shipped_profiles():
        profile = load_profile(name)
        machine, model = profile.document["machine"], profile.document["model"]
        same_kind = (machine.get("device") == "cpu") == (cluster.device.name == CPU.name)
        if same_kind and all(model[key] == getattr(spec, key) for key in SHAPES):
            return profile
    kind = "cpu" if cluster.device.name == CPU.name else "cuda"
    raise UserError(
        f"no shipped profile has the shapes of {spec.name!r} on {cluster.device.name}; make one with "
        f"`moeless profile --model {spec.name} --device {kind} --out FILE` and name it: --costs measured:FILE"
    )

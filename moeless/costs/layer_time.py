"""The time of one MoE layer: from the tokens of each copy and of each link to seconds, part by part.

The one place where a layer's time is made up. Cost models fill in :class:`LayerCosts`; planners, the dispatch after the
gate, the simulator and :meth:`moeless.costs.CostModel.layer_seconds` all call the compiled functions below. A new term
(an exchange that overlaps with compute, say) is a field of :class:`LayerCosts` and a line of :func:`layer_parts`.

Axes: S source ranks (rank s is GPU s), R replicas, G GPUs, Q rows of traffic, C curves, K active experts, N points.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from moeless.contracts import FloatArray, IntArray
from moeless.jit import njit


def _numbers(count: int) -> list[int]:
    # numpy's integers: for each of Python's as an argument, numba would compile a function of its own
    return [cast(int, np.int64(number)) for number in range(count)]


#: Rows of traffic: tokens that a GPU sends and receives over fast and over slow links, all that it computes, and all
#: that it sends, to itself included.
SENT_FAST, SENT_SLOW, GOT_FAST, GOT_SLOW, LOAD, SENT = 0, 1, 2, 3, 4, 5
NUM_TRAFFIC = 6

#: How an exchange is timed: from the stated links, from tables of the links, or from exchanges measured among ranks.
STATED, LINKS, RANKS = 0, 1, 2

#: Curves of a measured model. By a GPU's tokens: sorting them by expert, adding results up, what the engine's expert
#: part takes beside. By a source's tokens: sorting by destination, what the engine takes beside. By bytes: a fast link
#: or an even exchange, a slow link or one hot rank.
PERMUTE, COMBINE, ENGINE_EXPERT, SOURCE, ENGINE_REST, EVEN_OR_FAST, HOT_OR_SLOW = _numbers(7)
#: What was asked for beyond the measurements, marked in ``MeasuredTables.beyond``.
BEYOND_ACTIVE, BEYOND_TOKENS, BEYOND_FAST, BEYOND_SLOW = _numbers(4)


class MeasuredTables(NamedTuple):
    """Measured times as arrays; all empty for cost models that are a few numbers.

    Attributes:
        tokens_N, seconds_KN: seconds of 1, 2, ... K active experts with N tokens each.
        measured_active: active experts up to which that was measured; further rows are extrapolated.
        top_k: experts per token.
        exchange: STATED, LINKS or RANKS.
        curve_CXN, points_C: abscissae and seconds of each curve, and how many points it has.
        beyond: set to 1 where something was asked for that lies outside the measurements.
    """

    tokens_N: FloatArray
    seconds_KN: FloatArray
    measured_active: int
    top_k: int
    exchange: int
    curve_CXN: NDArray[np.float64]
    points_C: IntArray
    beyond: FloatArray


def no_tables() -> MeasuredTables:
    """For cost models that are a few numbers."""
    return MeasuredTables(
        np.empty(0), np.empty((0, 0)), 0, 1, STATED, np.empty((0, 2, 0)), np.empty(0, np.int64), np.zeros(4)
    )


def curves(points: Mapping[int, tuple[FloatArray, FloatArray]]) -> tuple[NDArray[np.float64], IntArray]:
    """``curve_CXN`` and ``points_C`` of the curves there are."""
    count_C = np.array([len(points[c][0]) if c in points else 0 for c in range(HOT_OR_SLOW + 1)], np.int64)
    curve_CXN = np.zeros((len(count_C), 2, max(int(count_C.max()), 1)))
    for c, (x, seconds) in points.items():
        curve_CXN[c, 0, : len(x)], curve_CXN[c, 1, : len(x)] = x, seconds
    return curve_CXN, count_C


class LayerCosts(NamedTuple):
    """A cost model as numbers for compiled code.

    Without tables a used replica with n tokens takes ``max(token_seconds * n, floor_seconds)``; a GPU takes the sum
    over its replicas (the largest where ``reduce_max``) and one launch; and each link tier of the exchange takes its
    latency plus the bytes of its fullest GPU and direction over its bandwidth. ``local_is_free`` False is the paper's
    exchange: all of a GPU's tokens count, over the slow links. ``island_G`` is each GPU's island of fast links, and
    ``misc_seconds`` the layer's fixed time.
    """

    token_seconds: float
    floor_seconds: float
    launch_seconds: float
    reduce_max: bool
    token_bytes: float
    local_is_free: bool
    island_size: int
    island_G: IntArray
    fast_bytes_per_second: float
    fast_latency: float
    slow_bytes_per_second: float
    slow_latency: float
    misc_seconds: float
    tables: MeasuredTables


class LayerTime(NamedTuple):
    """Seconds of one layer by part, as far as they show: they add up to the layer's time."""

    expert: float
    all_to_all: float
    misc: float
    control: float
    stall: float

    @property
    def total(self) -> float:
        """Seconds from the gate's output to the combined hidden states."""
        return float(total_seconds(self))


@njit(cache=True, nogil=True, allocates=False)
def work_size(replicas, num_gpus):  # type: ignore[no-untyped-def]
    """Whole numbers that :func:`gpu_seconds` works in."""
    return replicas + 2 * num_gpus + 1


@njit(cache=True, nogil=True, allocates=False)
def layer_parts(expert, exchange, control, stall, costs):  # type: ignore[no-untyped-def]
    """The parts of a layer that follow one another: of each as much as the others do not hide."""
    return LayerTime(expert, exchange, costs.misc_seconds, control, stall)


@njit(cache=True, nogil=True, allocates=False)
def total_seconds(parts):  # type: ignore[no-untyped-def]
    """From the gate's output to the combined hidden states."""
    return parts.expert + parts.all_to_all + parts.misc + parts.control + parts.stall


@njit(cache=True, nogil=True, allocates=False, inner=True)
def add_copy(tokens, gpu, costs, seconds_G):  # type: ignore[no-untyped-def]
    """A copy's expert time on top of its GPU's, for cost models without tables."""
    time = max(tokens * costs.token_seconds, costs.floor_seconds)
    if costs.reduce_max:
        seconds_G[gpu] = max(seconds_G[gpu], time)
    else:
        seconds_G[gpu] += time


@njit(cache=True, nogil=True, allocates=False)
def curve_at(curve, x, tables):  # type: ignore[no-untyped-def]
    """Linear between a curve's points, the first value below them, the last slope beyond; 0 for none, or no curve."""
    count = tables.points_C[curve]
    if count == 0 or x <= 0.0:
        return 0.0
    x_N, seconds_N = tables.curve_CXN[curve, 0], tables.curve_CXN[curve, 1]
    if count == 1 or x <= x_N[0]:
        return seconds_N[0]
    i = 1
    while i < count - 1 and x_N[i] < x:
        i += 1
    slope = (seconds_N[i] - seconds_N[i - 1]) / (x_N[i] - x_N[i - 1])
    if x > x_N[count - 1]:
        return seconds_N[count - 1] + slope * (x - x_N[count - 1])
    return seconds_N[i - 1] + slope * (x - x_N[i - 1])


@njit(cache=True, nogil=True, allocates=False, inner=True)
def _grid_at(tokens, active, tables):  # type: ignore[no-untyped-def]
    """Seconds of so many active experts with so many tokens each; the last segment's slope beyond the grid."""
    if tokens <= 0.0:
        return 0.0
    tokens_N, seconds_N = tables.tokens_N, tables.seconds_KN[min(active, len(tables.seconds_KN)) - 1]
    i, last = 1, len(tokens_N) - 1
    while i < last and tokens_N[i] < tokens:
        i += 1
    step = (tokens - tokens_N[i - 1]) / (tokens_N[i] - tokens_N[i - 1])
    return seconds_N[i - 1] + step * (seconds_N[i] - seconds_N[i - 1])


@njit(cache=True, nogil=True, allocates=False, inner=True)
def _measured_gpu(load_N, tables):  # type: ignore[no-untyped-def]
    """Measured seconds of one GPU whose active copies have these tokens, in descending order.

    Unequal loads are taken apart into equal ones: as many experts as there are run up to the smallest load together,
    one fewer up to the next, and so on.
    """
    active, tokens, seconds = len(load_N), 0, 0.0
    for k in range(active):
        tokens += load_N[k]
        below = load_N[k + 1] if k + 1 < active else 0
        if load_N[k] > below:
            seconds += _grid_at(float(load_N[k]), k + 1, tables) - _grid_at(float(below), k + 1, tables)
    if active > tables.measured_active:
        tables.beyond[BEYOND_ACTIVE] = 1.0
    if active > 0 and load_N[0] > tables.tokens_N[-1]:
        tables.beyond[BEYOND_TOKENS] = 1.0
    # sorting a GPU's tokens by expert, and adding the results back in the tokens' order
    seconds += curve_at(PERMUTE, float(tokens), tables) + curve_at(COMBINE, float(tokens), tables)
    return seconds + curve_at(ENGINE_EXPERT, tokens / tables.top_k, tables)


@njit(cache=True, nogil=True, allocates=False, inner=True)
def _measured_gpus(tokens_R, gpu_R, tables, seconds_G, work_W):  # type: ignore[no-untyped-def]
    """Measured expert seconds of each GPU."""
    gpus, replicas = len(seconds_G), len(tokens_R)
    first_G, end_G, load_N = work_W[: gpus + 1], work_W[gpus + 1 : 2 * gpus + 1], work_W[2 * gpus + 1 :]
    for g in range(gpus + 1):
        first_G[g] = 0
    for r in range(replicas):
        if tokens_R[r] > 0:
            first_G[gpu_R[r] + 1] += 1
    for g in range(gpus):
        first_G[g + 1] += first_G[g]
        end_G[g] = first_G[g]
    for r in range(replicas):
        if tokens_R[r] > 0:
            g = gpu_R[r]
            at = end_G[g]
            while at > first_G[g] and load_N[at - 1] < tokens_R[r]:
                load_N[at] = load_N[at - 1]
                at -= 1
            load_N[at] = tokens_R[r]
            end_G[g] += 1
    for g in range(gpus):
        seconds_G[g] = _measured_gpu(load_N[first_G[g] : first_G[g + 1]], tables)


@njit(cache=True, nogil=True, allocates=False)
def gpu_seconds(tokens_R, gpu_R, costs, seconds_G, work_W):  # type: ignore[no-untyped-def]
    """Expert seconds of each GPU into ``seconds_G``, launches included; GPUs without tokens take none.

    ``work_W`` is memory to work in, see :func:`work_size`.
    """
    if len(costs.tables.tokens_N) > 0:
        _measured_gpus(tokens_R, gpu_R, costs.tables, seconds_G, work_W)
        return
    for g in range(len(seconds_G)):
        seconds_G[g] = 0.0
    for r in range(len(tokens_R)):
        if tokens_R[r] > 0:
            add_copy(tokens_R[r], gpu_R[r], costs, seconds_G)
    for g in range(len(seconds_G)):
        if seconds_G[g] > 0.0:
            seconds_G[g] += costs.launch_seconds


class ExchangeLoad(NamedTuple):
    """What decides an exchange, in tokens of one direction.

    Attributes:
        most_fast, most_slow: that a GPU sends or receives at most over its links of either tier.
        most_to_others, to_others: the same over both tiers together, and the sum over GPUs of what they send.
        most_computed: that a GPU computes at most.
        most_sent: that a GPU sends at most, those to itself included.
    """

    most_fast: float
    most_slow: float
    most_to_others: float
    to_others: float
    most_computed: float
    most_sent: float


@njit(cache=True, nogil=True, allocates=False)
def exchange_load(traffic_QG):  # type: ignore[no-untyped-def]
    """What decides the exchange of this traffic."""
    fast, slow, others, total, computed, sent = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for g in range(traffic_QG.shape[1]):
        out_fast, out_slow = traffic_QG[SENT_FAST, g], traffic_QG[SENT_SLOW, g]
        in_fast, in_slow = traffic_QG[GOT_FAST, g], traffic_QG[GOT_SLOW, g]
        fast, slow = max(fast, out_fast, in_fast), max(slow, out_slow, in_slow)
        others, total = max(others, out_fast + out_slow, in_fast + in_slow), total + (out_fast + out_slow)
        computed, sent = max(computed, traffic_QG[LOAD, g]), max(sent, traffic_QG[SENT, g])
    return ExchangeLoad(fast, slow, others, total, computed, sent)


@njit(cache=True, nogil=True, allocates=False, inner=True)
def _stated_exchange(load, costs, num_gpus):  # type: ignore[no-untyped-def]
    """Both directions over the stated links."""
    if not costs.local_is_free:
        return 2.0 * load.most_computed * costs.token_bytes / costs.slow_bytes_per_second
    if num_gpus == 1:
        return 0.0
    worst = 0.0
    if costs.island_size > 1:
        worst = costs.fast_latency + load.most_fast * costs.token_bytes / costs.fast_bytes_per_second
    if num_gpus > costs.island_size:
        worst = max(worst, costs.slow_latency + load.most_slow * costs.token_bytes / costs.slow_bytes_per_second)
    return 2.0 * worst


@njit(cache=True, nogil=True, allocates=False, inner=True)
def _link_at(curve, num_bytes, beyond, tables):  # type: ignore[no-untyped-def]
    if num_bytes > tables.curve_CXN[curve, 0, tables.points_C[curve] - 1]:
        tables.beyond[beyond] = 1.0
    return curve_at(curve, num_bytes, tables)


@njit(cache=True, nogil=True, allocates=False, inner=True)
def _measured_exchange(load, costs, num_gpus):  # type: ignore[no-untyped-def]
    """One direction among several GPUs, from tables of the links or from exchanges measured among ranks."""
    tables = costs.tables
    if tables.exchange == LINKS:
        worst = max(
            _link_at(EVEN_OR_FAST, load.most_fast * costs.token_bytes, BEYOND_FAST, tables),
            _link_at(HOT_OR_SLOW, load.most_slow * costs.token_bytes, BEYOND_SLOW, tables),
        )
        # ranks wait for each other even where nothing travels
        return max(worst, tables.curve_CXN[EVEN_OR_FAST, 1, 0])
    fullest = load.most_to_others
    if fullest == 0.0:
        return tables.curve_CXN[HOT_OR_SLOW, 1, 0]
    # how even the exchange is: 0 when one rank takes all, 1 when every rank takes as much as the fullest
    even = min(max((load.to_others / fullest - 1.0) / (num_gpus - 1.0), 0.0), 1.0)
    hot = _link_at(HOT_OR_SLOW, fullest * costs.token_bytes, BEYOND_SLOW, tables)
    uniform = _link_at(EVEN_OR_FAST, fullest * costs.token_bytes, BEYOND_FAST, tables)
    return hot + even * max(uniform - hot, 0.0)


@njit(cache=True, nogil=True, allocates=False)
def exchange_seconds(load, costs):  # type: ignore[no-untyped-def]
    """Both directions of the layer's all-to-all."""
    num_gpus, tables = len(costs.island_G), costs.tables
    if tables.exchange == STATED or num_gpus == 1:
        seconds = _stated_exchange(load, costs, num_gpus)
    else:
        seconds = 2.0 * _measured_exchange(load, costs, num_gpus)
    if len(tables.points_C) > 0:
        # the fullest source sorts its tokens by destination and adds up what comes back
        tokens = load.most_sent / tables.top_k
        seconds += curve_at(SOURCE, tokens, tables) + curve_at(ENGINE_REST, tokens, tables)
    return seconds


@njit(cache=True, nogil=True, allocates=False)
def slowest(seconds_G):  # type: ignore[no-untyped-def]
    """When the last GPU is done with its experts."""
    worst = 0.0
    for g in range(len(seconds_G)):
        worst = max(worst, seconds_G[g])
    return worst


@njit(cache=True, nogil=True, allocates=False)
def traffic_seconds(tokens_R, gpu_R, traffic_QG, costs, seconds_G, work_W):  # type: ignore[no-untyped-def]
    """Seconds of the slowest GPU's experts and of the exchange, for tokens by copy and traffic by GPU.

    ``seconds_G`` and ``work_W`` are memory to work in, whatever they hold.
    """
    gpu_seconds(tokens_R, gpu_R, costs, seconds_G, work_W)
    return slowest(seconds_G), exchange_seconds(exchange_load(traffic_QG), costs)


@njit(cache=True, nogil=True, allocates=False)
def add_rows(source_X, copy_X, tokens_X, rows, gpu_R, island_G, tokens_R, traffic_QG):  # type: ignore[no-untyped-def]
    """Add up the first ``rows`` rows of tokens that a source rank has computed by a copy.

    Fills tokens by copy and traffic by GPU; returns how many copies have tokens.
    """
    for q in range(traffic_QG.shape[0]):
        for g in range(traffic_QG.shape[1]):
            traffic_QG[q, g] = 0.0
    for r in range(len(gpu_R)):
        tokens_R[r] = 0
    active = 0
    for x in range(rows):
        s, r, tokens = source_X[x], copy_X[x], tokens_X[x]
        gpu = gpu_R[r]
        active += tokens_R[r] == 0
        tokens_R[r] += tokens
        traffic_QG[LOAD, gpu] += tokens
        traffic_QG[SENT, s] += tokens
        if s != gpu:
            tier = 0 if island_G[s] == island_G[gpu] else 1
            traffic_QG[SENT_FAST + tier, s] += tokens
            traffic_QG[GOT_FAST + tier, gpu] += tokens
    return active


@njit(cache=True, nogil=True)
def quota_seconds(quota_SR, gpu_R, costs, traffic_QG):  # type: ignore[no-untyped-def]
    """Expert seconds, exchange seconds and copies with tokens, for tokens of each source rank to each copy.

    Fills ``traffic_QG``.
    """
    sources, replicas = quota_SR.shape
    source_X, copy_X = np.empty(quota_SR.size, np.int64), np.empty(quota_SR.size, np.int64)
    tokens_X, tokens_R, rows = np.empty(quota_SR.size, np.int64), np.empty(replicas, np.int64), 0
    for r in range(replicas):
        for s in range(sources):
            if quota_SR[s, r] > 0:
                source_X[rows], copy_X[rows], tokens_X[rows] = s, r, quota_SR[s, r]
                rows += 1
    active = add_rows(source_X, copy_X, tokens_X, rows, gpu_R, costs.island_G, tokens_R, traffic_QG)
    gpus = traffic_QG.shape[1]
    work_W = np.empty(work_size(replicas, gpus), np.int64)
    expert, exchange = traffic_seconds(tokens_R, gpu_R, traffic_QG, costs, np.empty(gpus), work_W)
    return expert, exchange, active

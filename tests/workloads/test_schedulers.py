"""Every token of every request is scheduled exactly once, in order, within all limits."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.contracts import Phase, Request
from moeless.errors import UserError
from moeless.workloads.schedulers import Continuous, OneSecond, Scheduler, build
from moeless.workloads.spans import span_columns


@dataclass
class Served:
    """What happened: (request, position, phase) in order, per-iteration facts, finishing times."""

    positions: dict[int, list[tuple[int, Phase]]]
    iterations: list[Any]
    starts: list[float]
    first_token: dict[int, float]
    tokens: dict[int, int]


def serve(scheduler: Scheduler, requests: list[Request], seconds: Any = 0.01, limit: int = 100_000) -> Served:
    """Drive a scheduler to its end."""
    served = Served(defaultdict(list), [], [], {}, defaultdict(int))
    arrival = {request.id: request.arrival for request in requests}
    now = 0.0
    for _ in range(limit):
        iteration = scheduler.next(now)
        if iteration is None:
            later = scheduler.next_arrival(now)
            if later is None:
                break
            assert later > now
            now = later
            continue
        served.iterations.append(iteration)
        served.starts.append(now)
        for span in iteration.spans:
            assert arrival[span.request] <= now
            assert span.start < span.stop
            served.positions[span.request] += [(p, span.phase) for p in range(span.start, span.stop)]
        now += seconds(iteration) if callable(seconds) else seconds
        for request in iteration.spans.emitting:
            served.first_token.setdefault(request, now)
            served.tokens[request] += 1
        scheduler.complete(iteration, now)
    else:
        pytest.fail("the scheduler did not come to an end")
    assert scheduler.done
    return served


def check_complete(served: Served, requests: list[Request]) -> None:
    for request in requests:
        expected = [(p, Phase.PREFILL) for p in range(request.prompt_tokens)]
        expected += [
            (p, Phase.DECODE) for p in range(request.prompt_tokens, request.prompt_tokens + request.output_tokens - 1)
        ]
        assert served.positions[request.id] == expected
        assert served.tokens[request.id] == request.output_tokens
    assert [iteration.id for iteration in served.iterations] == list(range(len(served.iterations)))


@st.composite
def workloads(draw: st.DrawFn, max_prompt: int = 60) -> list[Request]:
    gaps = draw(st.lists(st.sampled_from([0.0, 0.003, 0.2, 1.0, 5.0]), min_size=1, max_size=25))
    time, made = 0.0, []
    for index, gap in enumerate(gaps):
        time += gap
        prompt, output = draw(st.integers(1, max_prompt)), draw(st.integers(1, 12))
        made.append(Request(index, time, prompt, output))
    return made


@settings(max_examples=150, deadline=None)
@given(
    workloads(),
    st.integers(1, 80),
    st.integers(1, 8),
    st.sampled_from(["decode", "prefill"]),
    st.booleans(),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.01, 0.7]),
)
def test_continuous_serves_all_within_its_limits(
    requests: list[Request], budget: int, running: int, priority: Any, mixed: bool, ranks: int, seconds: float
):
    scheduler = Continuous(requests, ranks, token_budget=budget, max_running=running, priority=priority, mixed=mixed)
    served = serve(scheduler, requests, seconds)
    check_complete(served, requests)
    admitted: set[int] = set()
    left = {request.id: request.prompt_tokens + request.output_tokens - 1 for request in requests}
    for iteration in served.iterations:
        assert 1 <= iteration.tokens <= budget
        assert iteration.tokens == sum(span.stop - span.start for span in iteration.spans)
        if not mixed:
            assert iteration.phase != Phase.MIXED
        admitted |= {span.request for span in iteration.spans}
        assert sum(left[request] > 0 for request in admitted) <= running
        for span in iteration.spans:
            left[span.request] -= span.stop - span.start
            assert 0 <= iteration.rank_of_request[span.request] < ranks
    # first come, first served: prompts finish in order of arrival
    firsts = [served.first_token[request.id] for request in requests]
    assert firsts == sorted(firsts)


@settings(max_examples=60, deadline=None)
@given(workloads(max_prompt=30), st.integers(30, 80), st.integers(45, 200), st.sampled_from(["decode", "prefill"]))
def test_whole_prompts_and_cache_room_are_held(requests: list[Request], budget: int, room: int, priority: Any):
    scheduler = Continuous(requests, token_budget=budget, chunked=False, kv_tokens=room, priority=priority)
    served = serve(scheduler, requests)
    check_complete(served, requests)
    total = {request.id: request.prompt_tokens + request.output_tokens - 1 for request in requests}
    left, admitted = dict(total), set()
    for iteration in served.iterations:
        assert iteration.tokens <= budget
        for span in iteration.spans:
            assert span.phase == Phase.DECODE or (span.start, span.stop) == (0, requests[span.request].prompt_tokens)
        admitted |= {span.request for span in iteration.spans}
        assert sum(total[request] for request in admitted if left[request] > 0) <= room
        for span in iteration.spans:
            left[span.request] -= span.stop - span.start


@settings(max_examples=100, deadline=None)
@given(workloads(), st.sampled_from([0.0, 0.05, 2.0]), st.integers(1, 4))
def test_one_second_serves_batch_after_batch(requests: list[Request], seconds: float, ranks: int):
    served = serve(OneSecond(requests, ranks), requests, seconds)
    check_complete(served, requests)
    batch_of = {request.id: int(request.arrival) for request in requests}
    order = []
    for iteration, start in zip(served.iterations, served.starts, strict=True):
        batches = {batch_of[span.request] for span in iteration.spans}
        assert len(batches) == 1
        (batch,) = batches
        assert start >= batch + 1
        order.append(batch)
        if iteration.phase == Phase.PREFILL:
            assert {span.request for span in iteration.spans} == {r for r, b in batch_of.items() if b == batch}
    assert order == sorted(order)


@settings(max_examples=50, deadline=None)
@given(workloads(), st.integers(1, 20))
def test_no_decode_waits_for_ever_behind_others(requests: list[Request], budget: int):
    """Between two tokens of a request, every other running request gets at most a few turns."""
    scheduler = Continuous(requests, token_budget=budget, max_running=6)
    served = serve(scheduler, requests)
    last: dict[int, int] = {}
    for index, iteration in enumerate(served.iterations):
        for request in iteration.spans.emitting:
            if request in last:
                assert index - last[request] <= 6
            last[request] = index


def test_decode_first_keeps_tokens_flowing_while_a_long_prompt_is_chunked():
    requests = [Request(0, 0.0, 4, 40), Request(1, 0.05, 100, 2)]
    served = serve(Continuous(requests, token_budget=11), requests, 0.01)
    steps = [index for index, it in enumerate(served.iterations) if 0 in it.spans.emitting]
    assert steps == list(range(40))
    sizes = [s.stop - s.start for it in served.iterations for s in it.spans if s.request == 1 and s.start < 100]
    assert sizes[:-1] == [10] * 9
    assert sum(sizes) == 100


def test_prefill_first_starts_requests_before_decoding_goes_on():
    requests = [Request(0, 0.0, 4, 40), Request(1, 0.05, 100, 2)]
    served = serve(Continuous(requests, token_budget=10, priority="prefill"), requests, 0.01)
    phases = [it.phase for it in served.iterations if any(s.request == 1 for s in it.spans)]
    assert phases[:10] == [Phase.PREFILL] * 10


def test_more_decoding_requests_than_budget_take_turns():
    requests = [Request(i, 0.0, 1, 9) for i in range(6)]
    served = serve(Continuous(requests, token_budget=4), requests)
    counts: dict[int, int] = defaultdict(int)
    for iteration in served.iterations[2:8]:
        for span in iteration.spans:
            counts[span.request] += 1
    assert max(counts.values()) - min(counts.values()) <= 1


def test_requests_go_to_the_least_loaded_rank_ties_to_the_lowest():
    requests = [Request(0, 0.0, 50, 1), Request(1, 0.0, 10, 1), Request(2, 0.0, 10, 1), Request(3, 0.0, 10, 1)]
    iteration = Continuous(requests, 3).next(0.0)
    assert iteration is not None
    assert dict(iteration.rank_of_request) == {0: 0, 1: 1, 2: 2, 3: 1}
    assert iteration.rank_N.tolist() == [0, 1, 2, 1]


def test_one_second_batches_that_outlast_their_second_pile_up_and_say_so():
    requests = [Request(i, i / 2, 10, 5) for i in range(40)]
    slow, fast = OneSecond(requests), OneSecond(requests)
    serve(slow, requests, 0.5)
    serve(fast, requests, 0.1)
    assert slow.queueing().piled_up
    assert not fast.queueing().piled_up
    # 2.5 s a batch against one a second: each waits 1.5 s longer than the one before
    waits = slow.queueing().wait_N
    assert waits[1:] - waits[:-1] == pytest.approx(1.5)
    assert fast.queueing().wait_N == pytest.approx(0.0)


def test_continuous_says_when_its_queue_grows():
    requests = [Request(i, i / 10, 10, 11) for i in range(200)]
    slow, fast = Continuous(requests, max_running=2), Continuous(requests)
    serve(slow, requests, 0.1)
    serve(fast, requests, 0.01)
    assert slow.queueing().piled_up
    assert not fast.queueing().piled_up


def test_next_arrival_is_when_work_is_ready():
    requests = [Request(0, 3.2, 1, 1), Request(1, 3.9, 1, 1), Request(2, 7.0, 1, 1)]
    one, many = OneSecond(requests), Continuous(requests)
    assert one.next(3.99) is None
    assert one.next_arrival(3.99) == 4.0
    assert many.next_arrival(0.0) == 3.2
    assert many.next_arrival(3.2) == 3.9
    assert many.next_arrival(8.0) is None


@pytest.mark.parametrize("name", ["one-second", "continuous"])
def test_a_stop_token_ends_a_request_early(name: str):
    requests = [Request(0, 0.0, 3, 50), Request(1, 0.0, 3, 4)]
    scheduler, now, steps = build(name, requests, 2), 1.0, 0
    while not scheduler.done:
        iteration = scheduler.next(now)
        assert iteration is not None
        scheduler.complete(iteration, now)
        steps += 1
        if steps == 2:
            scheduler.finish(0)
            with pytest.raises(KeyError):
                scheduler.finish(0)
    assert steps == 4
    assert scheduler.num_running == 0


def test_one_iteration_is_in_flight_at_a_time():
    scheduler = Continuous([Request(0, 0.0, 3, 5)])
    iteration = scheduler.next(0.0)
    assert iteration is not None
    with pytest.raises(RuntimeError, match="has not been completed"):
        scheduler.next(0.0)
    scheduler.complete(iteration, 0.1)
    with pytest.raises(RuntimeError, match="not the one in flight"):
        scheduler.complete(iteration, 0.1)


@pytest.mark.parametrize(
    ("requests", "options", "sentence"),
    [
        ([Request(0, 1.0, 1, 1), Request(1, 0.5, 1, 1)], {}, "sort requests by arrival"),
        ([Request(0, 0.0, 0, 1)], {}, "at least one prompt"),
        ([Request(0, 0.0, 1, 0)], {}, "one output token"),
        ([Request(0, 0.0, 1, 1), Request(0, 0.0, 1, 1)], {}, "have one id"),
        ([Request(0, 0.0, 9, 1)], {"token_budget": 8, "chunked": False}, "allow chunked prefill"),
        ([Request(0, 0.0, 9, 3)], {"kv_tokens": 10}, "longer than the KV cache"),
        ([Request(0, 0.0, 1, 1)], {"token_budget": 0}, "at least 1"),
        ([Request(0, 0.0, 1, 1)], {"priority": "fair"}, "'decode' or 'prefill'"),
        ([Request(0, 0.0, 1, 1)], {"colour": 1}, "does not take these options"),
    ],
)
def test_what_can_never_be_served_is_refused(requests: list[Request], options: dict[str, Any], sentence: str):
    with pytest.raises(UserError, match=sentence):
        build("continuous", requests, 1, **options)


def test_unknown_batching_is_refused():
    with pytest.raises(UserError, match="no batching is called 'none'; there are: one-second, continuous"):
        build("none", [], 1)
    with pytest.raises(UserError, match="at least one rank"):
        build("continuous", [], 0)
    with pytest.raises(UserError, match="positive"):
        OneSecond([], period=0.0)


def test_a_specification_sets_options():
    requests = [Request(0, 0.0, 100, 2)]
    chosen = build("continuous:prefill-first:unmixed:budget=30:running=2:kv=500", requests, 1, token_budget=8)
    iteration = chosen.next(0.0)
    assert iteration is not None
    assert iteration.tokens == 30
    assert build("one-second:period=2.5", requests, 1).next_arrival(0.0) == 2.5
    for spec, sentence in (
        ("continuous:fast", "has no option 'fast'; there are: decode-first, prefill-first"),
        ("continuous:budget=many", "budget must be a number"),
        ("one-second:prefill-first", "has no option 'prefill-first'"),
        ("continuous:whole-prompts:budget=50", "more than the token budget of 50"),
    ):
        with pytest.raises(UserError, match=sentence):
            build(spec, requests, 1)


def test_an_empty_workload_is_done_at_once():
    for name in ("one-second", "continuous"):
        scheduler = build(name, [], 1)
        assert scheduler.done
        assert scheduler.next(0.0) is None
        assert scheduler.next_arrival(0.0) is None


def test_spans_are_the_same_as_columns_and_as_objects():
    requests = [Request(0, 0.0, 2, 5), Request(1, 0.1, 30, 2)]
    scheduler = Continuous(requests, token_budget=8)
    first = scheduler.next(0.0)
    assert first is not None
    scheduler.complete(first, 0.2)
    spans = scheduler.next(0.2).spans
    objects = list(spans)
    for column, again in zip(spans.columns(), span_columns(objects), strict=True):
        assert column.dtype == again.dtype
        assert column.tolist() == again.tolist()
    assert [(s.request, s.start, s.stop, s.phase == Phase.PREFILL) for s in objects] == list(
        zip(*(column.tolist() for column in spans.columns()), strict=True)
    )
    assert [spans[i] for i in range(len(spans))] == objects
    assert spans[-1] == objects[-1]
    assert spans[:1] == objects[:1]
    assert spans == tuple(objects)
    assert spans.emitting == [0]
    assert spans.prefill_tokens + 1 == spans.tokens == 8
    with pytest.raises(IndexError):
        spans[len(spans)]


@settings(max_examples=80, deadline=None)
@given(workloads(), st.sampled_from(["one-second", "continuous"]), st.integers(1, 5), st.integers(1, 30))
def test_skipping_steady_steps_changes_nothing(requests: list[Request], name: str, running: int, stride: int):
    """A caller that executes steady decode steps at once gets the schedule of one that asks for each."""
    options = {"max_running": running, "token_budget": 20} if name == "continuous" else {}
    plain = serve(build(name, requests, 2, **options), requests, 0.05)
    expected = [(start, list(it.spans), it.id) for start, it in zip(plain.starts, plain.iterations, strict=True)]
    scheduler, now, found = build(name, requests, 2, **options), 0.0, []
    while not scheduler.done:
        iteration = scheduler.next(now)
        if iteration is None:
            now = scheduler.next_arrival(now)
            continue
        steps, deadline = scheduler.steady()
        taken = 0
        while taken < min(steps, stride) and (taken == 0 or now < deadline):
            spans = [
                type(s)(s.request, s.start + taken, s.stop + taken, s.phase) if taken else s for s in iteration.spans
            ]
            found.append((now, spans, iteration.id + taken))
            taken += 1
            now += 0.05
        scheduler.skip(taken - 1)
        scheduler.complete(iteration, now)
    assert found == expected

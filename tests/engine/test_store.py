"""Expert copies: loaded in the background, used when complete, evicted by keep-alive or need."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from moeless.engine.hostmem import HostExperts
from moeless.engine.store import ReplicaStore
from moeless.errors import RunFailed
from moeless.serverless import KeepAlive

SHAPES = {"up": (4, 3), "down": (3, 2)}


@pytest.fixture
def host(tmp_path: Path) -> HostExperts:
    experts = HostExperts(tmp_path / "map", 2, 5, SHAPES, torch.float32)
    for layer in range(2):
        for expert in range(5):
            fill = {name: torch.full(shape, 10.0 * layer + expert) for name, shape in SHAPES.items()}
            experts.fill(layer, expert, fill)
    return experts


@pytest.fixture
def store(host: HostExperts) -> ReplicaStore:
    made = ReplicaStore(host, 2, 3, torch.device("cpu"), torch.float32)
    made.deploy([[0, 1], [2]], keep_alive=KeepAlive("fixed", 5.0), now=0.0)
    return made


def test_ranks_of_a_machine_share_one_mapping(host: HostExperts, tmp_path: Path) -> None:
    other = HostExperts(tmp_path / "map", 2, 5, SHAPES, torch.float32)
    assert float(other.view(1, 3)["down"][0, 0]) == 13.0
    assert other.expert_bytes == 4 * (12 + 6)


def test_a_deployed_copy_holds_its_expert_and_costs_no_move(store: ReplicaStore) -> None:
    slot = store.slot_of_expert(1)[2]
    assert torch.equal(store.slots_L[1]["up"][slot], torch.full((4, 3), 12.0))
    assert store.counts.moved_bytes == 0


def test_a_copy_is_ready_only_when_all_its_bytes_are_there(
    store: ReplicaStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    load = store.transfers.fill
    monkeypatch.setattr(store.transfers, "fill", lambda layer, copy: (gate.wait(20), load(layer, copy)))
    store.provision(0, [0, 1, 4], 1.0)
    assert not store.ready(0, 4)
    assert 4 not in store.slot_of_expert(0)
    gate.set()
    store.wait(0, 4)
    assert store.ready(0, 4)
    assert store.counts.moved_bytes == store.host.expert_bytes


def test_an_unplanned_copy_stays_until_its_keep_alive_ends(store: ReplicaStore) -> None:
    store.provision(0, [0], 1.0)
    store.provision(0, [0], 5.9)
    assert store.ready(0, 1)
    store.provision(0, [0], 6.0)
    assert not store.ready(0, 1)
    assert store.counts.evictions == 1


def test_a_copy_that_comes_back_within_its_keep_alive_is_not_loaded_again(store: ReplicaStore) -> None:
    store.provision(0, [0], 1.0)
    store.provision(0, [0, 1], 2.0)
    assert store.ready(0, 1)
    assert store.counts.loads == 0


def test_need_evicts_the_copy_that_was_planned_longest_ago(store: ReplicaStore) -> None:
    store.provision(0, [0, 1, 2], 1.0)
    store.provision(0, [1, 2], 2.0)
    store.provision(0, [2], 3.0)
    store.provision(0, [2, 4], 3.5)
    store.wait(0, 4)
    assert sorted(store.slot_of_expert(0)) == [1, 2, 4]


def test_a_copy_without_room_is_refused_and_the_others_keep_serving(store: ReplicaStore) -> None:
    store.provision(0, [0, 1, 2, 3], 1.0)
    assert store.counts.refused == 1
    assert not store.ready(0, 3)
    assert store.ready(0, 0)
    with pytest.raises(RunFailed, match="no memory for expert 3 of layer 0"):
        store.wait(0, 3)


def test_a_copy_that_runs_out_of_memory_is_never_ready_and_is_asked_for_again(
    store: ReplicaStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, failures = store.transfers.fill, iter([True, True, True, False])

    def flaky(layer: int, copy: object) -> None:
        if next(failures):
            raise MemoryError("out of memory")
        load(layer, copy)  # type: ignore[arg-type]

    monkeypatch.setattr(store.transfers, "fill", flaky)
    store.provision(0, [0, 1, 4], 1.0)
    # nothing but this copy can serve: it is loaded once more before the run fails
    with pytest.raises(RunFailed, match="expert 4 of layer 0 cannot be loaded: out of memory"):
        store.wait(0, 4)
    assert not store.ready(0, 4)
    assert store.ready(0, 0)
    store.provision(0, [0, 1, 4], 2.0)
    assert store.wait(0, 4) > 0.0
    assert store.ready(0, 4)
    assert store.counts.failed == 3


def test_residence_is_billed_from_load_to_eviction(store: ReplicaStore) -> None:
    store.provision(0, [0], 2.0)
    store.provision(0, [0], 20.0)
    bytes_ = store.host.expert_bytes
    # expert 1: 2 s planned and 5 s of keep-alive; experts 0 and 2 for all 20 s
    assert store.settle(20.0).resident_byte_seconds == pytest.approx(bytes_ * (7 + 20 + 20))


def test_under_lru_an_unplanned_copy_stays_until_its_slot_is_needed(host: HostExperts) -> None:
    store = ReplicaStore(host, 2, 3, torch.device("cpu"), torch.float32)
    store.deploy([[0, 1], []], keep_alive=KeepAlive("lru"), now=0.0)
    store.provision(0, [0], 1.0)
    store.provision(0, [0], 1e6)
    assert store.ready(0, 1)
    store.provision(0, [0, 2, 3], 1e6)
    store.wait(0, 3)
    assert sorted(store.slot_of_expert(0)) == [0, 2, 3]


def test_adaptive_keep_alive_learns_how_long_an_expert_s_copies_are_away(host: HostExperts) -> None:
    store = ReplicaStore(host, 2, 3, torch.device("cpu"), torch.float32)
    store.deploy([[0, 1], []], keep_alive=KeepAlive("adaptive", 100.0), now=0.0)
    for turn in range(6):
        store.provision(0, [0], 10.0 * turn + 1)
        store.provision(0, [0, 1], 10.0 * turn + 2)
    # six gaps of one second: two seconds of keep-alive are enough, a hundred are too many
    store.provision(0, [0], 61.0)
    store.provision(0, [0], 61.9)
    assert store.ready(0, 1)
    store.provision(0, [0], 63.1)
    assert not store.ready(0, 1)


def test_a_copy_that_is_being_sent_is_not_evicted(store: ReplicaStore) -> None:
    sent = threading.Event()
    store._copies_L[0][1].sends.append(sent)
    store.provision(0, [0], 1.0)
    store.provision(0, [0], 50.0)
    assert store.ready(0, 1)
    sent.set()
    store.provision(0, [0], 51.0)
    assert not store.ready(0, 1)


def test_where_memory_lacks_room_for_all_slots_there_are_fewer(
    host: HostExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeros = torch.zeros

    def small(shape: tuple[int, ...], **kwargs: object) -> torch.Tensor:
        if shape[0] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return zeros(shape, **kwargs)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch, "zeros", small)
    store = ReplicaStore(host, 2, 5, torch.device("cpu"), torch.float32, least=2)
    assert store.num_slots == 3
    store.deploy([[0, 1], [0, 1]], keep_alive=KeepAlive("fixed", 5.0), now=0.0)
    store.provision(0, [0, 1, 2, 3], 1.0)
    assert store.counts.refused == 1
    with pytest.raises(RunFailed, match="the 4 experts of each layer need"):
        ReplicaStore(host, 2, 5, torch.device("cpu"), torch.float32, least=4)


def test_slots_are_as_many_as_the_memory_that_a_rank_may_take(
    host: HostExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    # under a control group's limit, asking for more would end the process
    asked: list[int] = []
    zeros = torch.zeros

    def noted(shape: tuple[int, ...], **kwargs: object) -> torch.Tensor:
        asked.append(shape[0])
        return zeros(shape, **kwargs)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch, "zeros", noted)
    room = 2 * 3 * host.expert_bytes + 1
    store = ReplicaStore(host, 2, 5, torch.device("cpu"), torch.float32, least=2, room_bytes=room)
    assert store.num_slots == 3
    assert set(asked) == {3}
    asked.clear()
    with pytest.raises(RunFailed, match="the 4 experts of each layer need"):
        ReplicaStore(host, 2, 5, torch.device("cpu"), torch.float32, least=4, room_bytes=room)
    assert asked == []


def test_a_machine_s_memory_is_shared_evenly_by_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    from moeless.engine import worker
    from moeless.engine.exchange import Exchange
    from moeless.engine.groups import Ranks

    # two machines of two ranks; the first one's ranks saw 10 and 8 GB
    monkeypatch.setattr(worker.groups, "from_all", lambda *_: [10 * 10**9, 8 * 10**9, 10**9, 10**9])
    rooms = [
        worker.slot_room(Exchange(Ranks(rank, 4, torch.device("cpu"), None, None, rank % 2, 2))) for rank in range(4)
    ]
    assert rooms == [4 * 10**9 - worker.WORK_BYTES] * 2 + [5 * 10**8 - worker.WORK_BYTES] * 2

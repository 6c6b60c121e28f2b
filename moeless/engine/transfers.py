"""The background thread of a rank that fills copies' slots, from host memory or from another rank.

Tasks run in the order in which they are asked for. All ranks ask for the moves of a plan in one order, so a sender
and its receiver meet, and no two ranks wait for each other. Peers exchange weights on a process group of their own:
two threads that use one group corrupt each other's messages.

What arrives from a peer is staged beside the slots and applied when it is complete; a receiver that has no room left
takes the message all the same and drops it, since the sender cannot know.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from moeless.engine.hostmem import HostExperts


@dataclass
class Copy:
    """One expert copy in a slot; ``done`` is set when it is ready or has failed.

    Attributes:
        sends: one event for every message that still reads this copy.
        event: of the CUDA stream that fills it.
    """

    expert: int
    slot: int
    born: float
    used: float
    planned: bool = True
    done: threading.Event = field(default_factory=threading.Event)
    error: str | None = None
    event: Any = None
    sends: list[threading.Event] = field(default_factory=list)

    @property
    def ready(self) -> bool:
        """All bytes are there."""
        return self.done.is_set() and self.error is None and (self.event is None or self.event.query())

    @property
    def pinned(self) -> bool:
        """Another rank is still being sent this copy."""
        self.sends = [sent for sent in self.sends if not sent.is_set()]
        return bool(self.sends)


@dataclass(frozen=True)
class _Task:
    kind: str
    layer: int
    expert: int
    copy: Copy | None
    peer: int = -1
    sent: threading.Event | None = None
    after: Any = None


class Transfers:
    """One rank's copies on their way.

    Args:
        slots_L: every layer's slots by weight name.
        group: process group that this thread alone uses; None where there is no peer.
    """

    def __init__(
        self, host: HostExperts, slots_L: Sequence[Mapping[str, torch.Tensor]], device: torch.device, group: Any = None
    ) -> None:
        self.host, self.slots_L, self.group, self._device = host, slots_L, group, device
        #: messages from or to peers that failed; their copies came from host memory instead
        self.peer_failures = 0
        self._queue: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        cuda = device.type == "cuda"
        self._streams = {kind: torch.cuda.Stream(device) for kind in ("host", "peer")} if cuda else {}
        # sent from and received into by turns: the next message need not wait for the last one's copy
        self.stages = [torch.empty(host.values, dtype=host.dtype, device=device) for _ in range(2)] if group else []
        self._turn = 0
        self._thread = threading.Thread(target=self._run, name="expert-copies", daemon=True)
        self._thread.start()

    def load(self, layer: int, copy: Copy) -> None:
        """Fill a copy from host memory."""
        self._ask(_Task("host", layer, copy.expert, copy))

    def receive(self, layer: int, expert: int, copy: Copy | None, source: int) -> None:
        """Fill a copy from another rank; None drops what comes."""
        self._ask(_Task("receive", layer, expert, copy, source))

    def send(self, layer: int, expert: int, copy: Copy | None, target: int) -> None:
        """Send a complete copy to another rank; it stays in memory until that is done.

        None sends what host memory holds: the receiver counts on a message.
        """
        sent = threading.Event()
        if copy is not None:
            copy.sends.append(sent)
        self._ask(_Task("send", layer, expert, copy, target, sent))

    def _ask(self, task: _Task) -> None:
        if self._streams:
            # the slot's last user may still be queued on the device
            task = dataclasses.replace(task, after=torch.cuda.current_stream(self._device).record_event())
        self._queue.put(task)

    def close(self) -> None:
        """Finish what was asked for and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (task := self._queue.get()) is not None:
            try:
                self._carry_out(task)
            except (RuntimeError, MemoryError) as error:
                if task.copy is not None and task.sent is None:
                    task.copy.error = (str(error).strip() or type(error).__name__).splitlines()[0]
            finally:
                if task.sent is not None:
                    task.sent.set()
                elif task.copy is not None:
                    task.copy.done.set()

    def _carry_out(self, task: _Task) -> None:
        if task.kind != "host":
            try:
                with self._on("peer", task.after):
                    if task.kind == "send":
                        self.send_weights(task)
                    else:
                        self.receive_weights(task)
                return
            except RuntimeError:
                # the pair's connection is gone for this group; a dead rank shows in the ranks' next collective
                self.peer_failures += 1
        if task.kind != "send" and task.copy is not None:
            with self._on("host", task.after):
                self.fill(task.layer, task.copy)
                self._mark(task.copy, "host")

    def _on(self, kind: str, after: Any) -> contextlib.AbstractContextManager[Any]:
        """The stream of a kind of task, behind what the rank's own stream had to do when the task was asked for."""
        if not self._streams:
            return contextlib.nullcontext()
        self._streams[kind].wait_event(after)
        return torch.cuda.stream(self._streams[kind])

    def _mark(self, copy: Copy, kind: str) -> None:
        if self._streams:
            copy.event = self._streams[kind].record_event()

    def fill(self, layer: int, copy: Copy) -> None:
        """Copy an expert's weights from host memory into its slot."""
        for name, value in self.host.view(layer, copy.expert).items():
            self.slots_L[layer][name][copy.slot].copy_(value, non_blocking=True)

    def _stage(self) -> torch.Tensor:
        self._turn = 1 - self._turn
        return self.stages[self._turn]

    def send_weights(self, task: _Task) -> None:
        """Send one copy as one message."""
        stage, slots = self._stage(), self.slots_L[task.layer]
        held = self.host.view(task.layer, task.expert)
        if task.copy is not None:
            held = {name: slots[name][task.copy.slot] for name in held}
        for name, place in self.host.split(stage).items():
            place.copy_(held[name], non_blocking=True)
        dist.send(stage, task.peer, group=self.group)
        if self._streams:
            # the slot may be overwritten once the event says so: not before the message has left
            self._streams["peer"].synchronize()

    def receive_weights(self, task: _Task) -> None:
        """Take one message, and apply it where its copy has a slot."""
        stage = self._stage()
        dist.recv(stage, task.peer, group=self.group)
        if task.copy is not None:
            for name, place in self.host.split(stage).items():
                self.slots_L[task.layer][name][task.copy.slot].copy_(place, non_blocking=True)
            self._mark(task.copy, "peer")

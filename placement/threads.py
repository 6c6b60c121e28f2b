"""Threads for compiled loops over layers that release the interpreter's lock.

A pool of Python threads rather than the compiler's own: a forked process has none of its parent's threads, and a pool
can be made anew. A process that is going to fork keeps to its own thread (:func:`alone`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache

from moeless.jit import COMPILED
from moeless.machine import cores

#: Expert loads to look at before waking another thread pays.
WORTHWHILE = 20_000
#: More threads than this gain little: what surrounds the loops is Python.
MOST = 8


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="moeless-plan")


# threads do not survive a fork, and work given to them would never be done
os.register_at_fork(after_in_child=_pool.cache_clear)


_most = MOST


@contextmanager
def alone() -> Iterator[None]:
    """Start no threads in this block."""
    global _most
    before, _most = _most, 1
    try:
        yield
    finally:
        _most = before


def in_parallel(run: Callable[[int, int], None], length: int, work: int) -> None:
    """Call ``run(start, stop)`` so that the ranges cover ``0 .. length``, on several threads where that pays.

    Args:
        run: must release the interpreter's lock and write to its own range alone.
        work: of all of them together, in expert loads looked at.
    """
    threads = min(cores(), _most, length, work // WORTHWHILE) if COMPILED else 1
    if threads <= 1:
        run(0, length)
        return
    edges = [length * i // threads for i in range(threads + 1)]
    others = [_pool(MOST).submit(run, edges[i], edges[i + 1]) for i in range(1, threads)]
    run(edges[0], edges[1])
    for other in others:
        other.result()

"""Schedulers from one short specification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moeless.contracts import Request
from moeless.errors import UserError
from moeless.workloads.continuous import Continuous
from moeless.workloads.one_second import OneSecond
from moeless.workloads.scheduler import Queueing, Scheduler

SCHEDULERS: dict[str, type[Scheduler]] = {"one-second": OneSecond, "continuous": Continuous}

__all__ = ["SCHEDULERS", "Continuous", "OneSecond", "Queueing", "Scheduler", "build", "parse"]

#: Words of a specification, and the options that they stand for.
_WORDS: dict[str, dict[str, dict[str, Any]]] = {
    "continuous": {
        "decode-first": {"priority": "decode"},
        "prefill-first": {"priority": "prefill"},
        "whole-prompts": {"chunked": False},
        "unmixed": {"mixed": False},
    },
    "one-second": {},
}
_NUMBERS: dict[str, dict[str, tuple[str, type]]] = {
    "continuous": {
        "budget": ("token_budget", int),
        "running": ("max_running", int),
        "kv": ("kv_tokens", int),
    },
    "one-second": {"period": ("period", float)},
}


def parse(spec: str) -> tuple[str, dict[str, Any]]:
    """Name and options of a scheduler: ``one-second``, ``continuous``, or either with options after colons.

    ``continuous:prefill-first:whole-prompts:unmixed:budget=2048:running=64:kv=100000``, ``one-second:period=2``;
    see :class:`Continuous` and :class:`OneSecond`.

    Raises:
        UserError: the name or an option is unknown, or a value is no number.
    """
    name, *words = spec.split(":")
    if name not in SCHEDULERS:
        raise UserError(f"no batching is called {name!r}; there are: {', '.join(SCHEDULERS)}")
    options: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals and word in _WORDS[name]:
            options |= _WORDS[name][word]
        elif equals and key in _NUMBERS[name]:
            option, kind = _NUMBERS[name][key]
            try:
                options[option] = kind(value)
            except ValueError:
                raise UserError(f"batching {spec!r}: {key} must be a number, got {value!r}") from None
        else:
            known = ", ".join([*_WORDS[name], *(f"{number}=N" for number in _NUMBERS[name])])
            raise UserError(f"batching {name!r} has no option {word!r}; there are: {known}")
    return name, options


def build(spec: str, requests: Sequence[Request], num_ranks: int = 1, **options: Any) -> Scheduler:
    """The specified scheduler over the requests; its own options replace those given as arguments.

    Raises:
        UserError: the specification is wrong, or the scheduler refuses the requests or an option.
    """
    name, own = parse(spec)
    try:
        return SCHEDULERS[name](requests, num_ranks, **{**options, **own})
    except TypeError as error:
        raise UserError(f"batching {name!r} does not take these options ({error})") from None

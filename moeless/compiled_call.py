"""Compiled functions that compiled code is given and calls, by their addresses.

Code that takes an address is compiled once for all functions of the same types. Numba's own function arguments would do
the same, but each call by Python then takes it longer to find out the function's type than a short loop runs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from moeless.jit import COMPILED, cache_folder

#: Functions whose addresses are in use.
_kept: list[Any] = []


def function_address(function: Callable[..., int], arguments: tuple[Any, ...]) -> Any:
    """Where a function of ``moeless.jit.njit`` that gives an integer is; without numba, the function itself.

    Args:
        arguments: examples, whose types are those of every call.
    """
    if not COMPILED:
        return function
    import numba

    signature = numba.int64(*map(numba.typeof, arguments))
    dispatcher: Any = function
    dispatcher.compile(signature)
    # finds what was just compiled, where there is a cache
    given, folder = numba.config.CACHE_DIR, cache_folder(Path(dispatcher.py_func.__code__.co_filename))
    numba.config.CACHE_DIR = folder or given
    try:
        entry = numba.cfunc(signature, cache=bool(folder))(dispatcher.py_func)
    finally:
        numba.config.CACHE_DIR = given
    _kept.append(entry)
    return int(entry.address)


def _make_call_at() -> Callable[..., int]:
    if not COMPILED:
        return lambda function, *arguments: function(*arguments)
    from llvmlite import ir
    from numba.core import cgutils, types
    from numba.core.types.containers import StarArgTuple
    from numba.extending import intrinsic

    @intrinsic
    def call_at(_context, address, *arguments):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, given):  # type: ignore[no-untyped-def]
            kinds = [context.get_value_type(kind) for kind in signature.args[1]]
            kind = ir.FunctionType(context.get_value_type(signature.return_type), kinds)
            where = builder.inttoptr(given[0], kind.as_pointer())
            return builder.call(where, cgutils.unpack_tuple(builder, given[1]))

        return types.int64(address, StarArgTuple(arguments)), generate

    found: Callable[..., int] = call_at
    return found


#: ``call_at(address, *arguments)``, in compiled code: call the function that :func:`function_address` found.
call_at = _make_call_at()

"""Compiled functions that compiled code is given and calls, by their addresses.

Code that takes an address is compiled once for all functions of the same types. Numba's own function arguments would do
the same, but each call by Python then takes it longer to find out the function's type than a short loop runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moeless.jit import COMPILED

#: Argument types of the functions whose addresses were asked for.
_known: set[Any] = set()


def function_address(function: Callable[..., int], arguments: tuple[Any, ...]) -> Any:
    """Where a function of ``moeless.jit.njit`` that gives an integer is; without numba, the function itself.

    Args:
        arguments: examples, whose types are those of every call.
    """
    if not COMPILED:
        return function
    import numba

    signature = numba.int64(*map(numba.typeof, arguments))
    _known.add(signature.args)
    dispatcher: Any = function
    dispatcher.compile(signature)
    compiled = dispatcher.get_compile_result(signature)
    return int(compiled.library.get_pointer_to_function(compiled.fndesc.llvm_cfunc_wrapper_name))


def _make_call_at() -> Callable[..., int]:
    if not COMPILED:
        return lambda function, *arguments: function(*arguments)
    from llvmlite import ir
    from numba.core import cgutils, types
    from numba.core.types.containers import StarArgTuple
    from numba.extending import intrinsic

    @intrinsic
    def call_at(_context, address, *arguments):  # type: ignore[no-untyped-def]
        # the machine would take one kind of argument for another
        assert not _known or arguments in _known, f"no function of {arguments} is known by its address"

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

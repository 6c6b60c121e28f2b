"""Compiled functions that compiled code is given and calls, by their addresses.

Code that takes an address is compiled once for all functions of the same types. Numba's own function arguments would do
the same, but each call by Python then takes it longer to find out the function's type than a short loop runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from moeless.jit import COMPILED

T = TypeVar("T")
#: Types of the results and arguments of functions whose addresses were asked for.
_known: set[Any] = set()


def function_address(function: Callable[..., T], result: T, arguments: tuple[Any, ...]) -> Any:
    """Where a function of ``moeless.jit.njit`` is; without numba, the function itself.

    Args:
        result: an integer for a function that :data:`call_at` calls, a float for one of :data:`seconds_at`.
        arguments: examples, whose types are those of every call.
    """
    if not COMPILED:
        return function
    import numba

    signature = numba.typeof(result)(*map(numba.typeof, arguments))
    _known.add((signature.return_type, signature.args))
    dispatcher: Any = function
    dispatcher.compile(signature)
    compiled = dispatcher.get_compile_result(signature)
    return int(compiled.library.get_pointer_to_function(compiled.fndesc.llvm_cfunc_wrapper_name))


def _make_call(kind: type[T]) -> Callable[..., T]:
    if not COMPILED:
        return lambda function, *arguments: function(*arguments)
    from llvmlite import ir
    from numba import typeof
    from numba.core import cgutils
    from numba.core.types.containers import StarArgTuple
    from numba.extending import intrinsic

    result = typeof(kind())

    @intrinsic
    def call(_context, address, *arguments):  # type: ignore[no-untyped-def]
        # the machine would take one kind of argument for another
        assert not _known or (result, arguments) in _known, f"no function of {arguments} is known by its address"

        def generate(context, builder, signature, given):  # type: ignore[no-untyped-def]
            kinds = [context.get_value_type(kind) for kind in signature.args[1]]
            kind = ir.FunctionType(context.get_value_type(signature.return_type), kinds)
            where = builder.inttoptr(given[0], kind.as_pointer())
            return builder.call(where, cgutils.unpack_tuple(builder, given[1]))

        return result(address, StarArgTuple(arguments)), generate

    found: Callable[..., T] = call
    return found


#: ``call_at(address, *arguments)``, in compiled code: call a function that gives an integer.
call_at = _make_call(int)
#: The same for one that gives a float.
seconds_at = _make_call(float)

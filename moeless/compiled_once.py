"""Functions that numba compiles once, however many compiled functions call them.

Numba copies a compiled function into each of its callers and optimises it there anew, with all that it calls in turn.
For a large function that is most of the time of compiling. A function made here is compiled on its own when it is first
called; compiled callers hold its address alone, and are themselves compiled and cached without it.

So its types have to be known beforehand. They are read from its annotations: an array has the annotated element type,
is contiguous, and has as many axes as there are letters and digits after the last underscore of its name.
"""

from __future__ import annotations

import _thread
import ctypes
import threading
import typing
from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import from_dtype, types
from numba.core import cgutils, imputils
from numba.core.registry import CPUDispatcher
from numba.core.typing import signature
from numba.core.typing.templates import ConcreteTemplate

_SCALARS = {int: types.int64, float: types.float64, bool: types.boolean, type(None): types.none}


class CompiledOnce(CPUDispatcher):  # type: ignore[misc]
    """A compiled function of one signature; compiled code that calls it holds its address."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function, targetoptions={"nopython": True, "nogil": True, "boundscheck": None})
        hints = typing.get_type_hints(function)
        result = numba_type("", hints.pop("return"))
        self.signature = signature(result, *(numba_type(name, hint) for name, hint in hints.items()))
        self._symbol = f"{function.__module__}.{function.__qualname__}"
        # kept as long as compiled code may call it
        self._address = ctypes.CFUNCTYPE(ctypes.c_size_t)(self.address)
        llvmlite.binding.add_symbol(self._symbol, ctypes.cast(self._address, ctypes.c_void_p).value)
        # without unsafe casts a caller's numbers are never rounded to fit
        told = {"key": self._symbol, "cases": [self.signature], "unsafe_casting": False}
        self._as_callee = types.Function(type(self._symbol, (ConcreteTemplate,), told))
        imputils.lower_builtin(self._symbol, *self.signature.args)(self._lower_call)

    @property
    def _numba_type_(self) -> types.Type:
        return self._as_callee

    def _compile_for_args(self, *args: Any, **kws: Any) -> Any:
        self.compile(self.signature)
        # from now on arguments of other types are converted, or refused
        self.disable_compile()
        return self(*args, **kws)

    def address(self) -> int:
        """Where the compiled function is; compiled, or loaded from the cache, where it is not yet.

        Compiled code asks for it, and no exception can pass through that: an interrupt waits until it is answered.
        """
        interrupted = False
        while True:
            try:
                self.compile(self.signature)
                break
            except KeyboardInterrupt:
                interrupted = True
        if interrupted:
            threading.Timer(0.1, _thread.interrupt_main).start()
        compiled = self.overloads[self.signature.args]
        return int(compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name))

    def _lower_call(self, context: Any, builder: Any, sig: Any, args: Any) -> Any:
        """Emit a call through the address, which each caller asks for once."""
        word = context.get_value_type(types.uintp)
        known = ir.GlobalVariable(builder.module, word, builder.module.get_unique_name(f"{self._symbol}.address"))
        known.linkage, known.initializer = "internal", ir.Constant(word, 0)
        with cgutils.if_unlikely(builder, cgutils.is_null(builder, builder.load(known))):
            ask = cgutils.get_or_insert_function(builder.module, ir.FunctionType(word, []), self._symbol)
            builder.store(builder.call(ask, []), known)
            with cgutils.if_unlikely(builder, cgutils.is_null(builder, builder.load(known))):
                context.call_conv.return_user_exc(builder, RuntimeError, (f"{self._symbol} could not be compiled",))
        kind = context.call_conv.get_function_type(sig.return_type, sig.args)
        function = builder.inttoptr(builder.load(known), kind.as_pointer())
        status, result = context.call_conv.call_function(builder, function, sig.return_type, sig.args, args)
        with cgutils.if_unlikely(builder, status.is_error):
            context.call_conv.return_status_propagate(builder, status)
        return imputils.impl_ret_new_ref(context, builder, sig.return_type, result)


def numba_type(name: str, hint: Any) -> types.Type:
    """The numba type of a value with this name and annotation: a number, an array, or a (named) tuple of these."""
    if hint in _SCALARS:
        return _SCALARS[hint]
    if typing.get_origin(hint) is np.ndarray:
        axes, (element,) = name.rpartition("_")[2], typing.get_args(typing.get_args(hint)[1])
        if not axes.isupper():
            raise TypeError(f"{name}: the name of an array ends with its axes, as in load_SE")
        return types.Array(from_dtype(np.dtype(element)), len(axes), "C")
    if isinstance(hint, type) and hasattr(hint, "_fields"):
        fields = typing.get_type_hints(hint)
        return types.NamedTuple([numba_type(field, fields[field]) for field in hint._fields], hint)
    if typing.get_origin(hint) is tuple:
        return types.BaseTuple.from_types([numba_type("", part) for part in typing.get_args(hint)])
    raise TypeError(f"{name}: {hint} is no number, array or tuple of these")

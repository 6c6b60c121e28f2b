"""``njit`` of numba where it is installed; elsewhere the same functions in plain Python, correct and far slower.

GPU machines often have torch and little else: profiles, live runs and their plans must work there too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    from numba import njit  # noqa: TID251

    COMPILED = True
except ImportError:
    COMPILED = False

    def njit(*signature: Any, **_: Any) -> Callable[..., Any]:  # type: ignore[no-redef]
        """The function itself, for a decorator with or without arguments."""
        if len(signature) == 1 and callable(signature[0]):
            return signature[0]
        return lambda function: function


__all__ = ["COMPILED", "njit"]

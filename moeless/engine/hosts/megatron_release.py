"""What releases of megatron-core differ in: which were tested, what their constructors take, what they announce.

Nothing of Megatron's is imported here, so that ``doctor`` and the command can ask before the host is loaded.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

#: Releases that the tests of the engine passed with: the newest for Python 3.11, and the newest.
TESTED = ("0.16.1", "0.19.2")

#: What Megatron logs of things that the host does on purpose, by logger and beginning.
ANNOUNCEMENTS = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    # of every MoE layer that is not its own
    "megatron.core.transformer.transformer_layer": "Unknown MLP type",
}


def remark() -> str | None:
    """A sentence where the installed release is not a tested one; None where it is, or where there is none."""
    try:
        installed = metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        return None
    if installed in TESTED:
        return None
    return f"the Megatron host was tested with megatron-core {' and '.join(TESTED)}, not with {installed}"


def accepted(constructor: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """What a constructor takes of the arguments offered; releases add and rename them."""
    parameters = inspect.signature(constructor).parameters
    return {name: value for name, value in offered.items() if name in parameters}


def quiet() -> None:
    """Drop :data:`ANNOUNCEMENTS`, and nothing else, from what Megatron logs."""
    for name in ANNOUNCEMENTS:
        # the same function is added once only
        logging.getLogger(name).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(ANNOUNCEMENTS[record.name])

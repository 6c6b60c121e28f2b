"""Models that lend their attention, router and head to the elastic experts."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from moeless.engine.hosts.base import Host
from moeless.registry import Registry

# Megatron-core names each optional library that is absent, on every import
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")

__all__ = ["HOSTS", "Host", "load_host"]

#: Hosts by name; each entry is a class built as ``(folder, device=..., dtype=...)``.
HOSTS = Registry(
    "host",
    "moeless.hosts",
    {
        "megatron": "moeless.engine.hosts.megatron:MegatronHost",
        "transformers": "moeless.engine.hosts.hf:TransformersHost",
    },
)


def load_host(name: str, folder: Path, **options: Any) -> Host:
    """A host by name with its non-expert weights loaded.

    Raises:
        UserError: no host has that name, or it does not take the model.
    """
    host: Host = HOSTS.get(name)(folder, **options)
    return host

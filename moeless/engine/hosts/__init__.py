"""Models that lend their attention, router and head to the elastic experts."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from moeless.engine.hosts import megatron_release
from moeless.engine.hosts.base import Host
from moeless.errors import UserError
from moeless.registry import Registry

# Megatron-core names each optional library that is absent, on every import
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
# one of its docstrings has a backslash too many; while a file is compiled, its path stands for the module's name
warnings.filterwarnings("ignore", category=SyntaxWarning, module=r".*\bmegatron/core/")

__all__ = ["HOSTS", "Host", "load_host", "remarks"]


def remarks(name: str) -> list[str]:
    """What a user should know of a host before it serves, one sentence each; the host is not imported."""
    found = megatron_release.remark() if name == "megatron" else None
    return [] if found is None else [found]


class _Hosts(Registry):
    def get(self, name: str) -> Any:
        """The host's class.

        Raises:
            UserError: no host has that name, or the library that it is made of is absent or too different.
        """
        try:
            return super().get(name)
        except ImportError as error:
            why = "; ".join([str(error), *remarks(name)])
            raise UserError(f"host {name!r} cannot be loaded ({why}); `moeless doctor` says what is amiss") from error


#: Hosts by name; each entry is a class built as ``(folder, device=..., dtype=...)``.
HOSTS = _Hosts(
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

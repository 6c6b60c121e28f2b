"""Readers of routing that other systems recorded, by name."""

from __future__ import annotations

from moeless.registry import Registry

#: Importers by the name that ``moeless import-trace --from`` takes: ``(path, out, spec, **options) -> TraceInfo``.
IMPORTERS = Registry(
    "importer",
    "moeless.importers",
    {
        "npz": "moeless.traces.importers.npz:import_npz",
    },
)

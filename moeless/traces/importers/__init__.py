"""Readers of routing that other systems recorded, by name."""

from __future__ import annotations

from moeless.registry import Registry

#: Importers by the name that ``moeless import-trace --from`` takes: ``(path, out, spec) -> TraceInfo``.
IMPORTERS = Registry(
    "importer",
    "moeless.importers",
    {
        "npz": "moeless.traces.importers.npz:import_npz",
        "parquet": "moeless.traces.importers.parquet:import_parquet",
        "csv": "moeless.traces.importers.csv:import_csv",
        "sglang": "moeless.traces.importers.sglang:import_sglang",
        "megatron": "moeless.traces.importers.megatron:import_megatron",
        "histogram": "moeless.traces.importers.histogram:import_histogram",
        "tensorrt-llm": "moeless.traces.importers.tensorrt_llm:import_tensorrt_llm",
    },
)

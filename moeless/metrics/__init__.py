"""What a run is judged by: latency, balance, bills, and the result file that holds them."""

from moeless.metrics.result import (
    SCHEMA_VERSION,
    Billing,
    Cell,
    LayerMetrics,
    RequestMetrics,
    Result,
    read_result,
    write_result,
)

__all__ = [
    "SCHEMA_VERSION",
    "Billing",
    "Cell",
    "LayerMetrics",
    "RequestMetrics",
    "Result",
    "read_result",
    "write_result",
]

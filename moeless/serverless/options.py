"""Options of expert copies and GPUs that come and go."""

from __future__ import annotations

from dataclasses import dataclass

from moeless.configuration import Component, option


@dataclass(frozen=True, kw_only=True)
class Serverless(Component, group="Serverless"):
    """Where copies come from and when GPUs are held; the paper states none of the durations.

    Attributes:
        home: where every expert's weights always are.
        scale_to_zero: idle for a keep-alive, all copies expire and all GPUs are given back.
        requests_per_gpu: GPUs are held for so many requests each, and as memory needs; those not needed for a
            keep-alive are given back one by one. None: all are held.
        container_seconds: starting a GPU container again; its non-expert weights then load from ``home``.
        start_seconds: starting a copy's function instance, beside the transfer of its weights.
    """

    home: str = option("host", "--home", "Where experts' weights always are: host or storage.")
    scale_to_zero: bool = option(False, "--scale-to-zero", "Serverless policies give GPUs back while idle.")
    requests_per_gpu: float | None = option(
        None, "--requests-per-gpu", "Serverless policies hold a GPU per so many requests, as memory allows."
    )
    container_seconds: float = option(1.0, "--container", "Seconds to start a GPU container.", minimum=0.0)
    start_seconds: float = option(
        0.0, "--start", "Seconds to start a copy's instance, beside its transfer.", minimum=0.0
    )

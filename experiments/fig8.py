"""Figure 8: distribution of MoE-layer time, LMSYS-Chat-1M."""

from __future__ import annotations

from moeless.experiments import latency_figures

EXPERIMENT = latency_figures.experiment("fig8", "lmsys", "LMSYS-Chat-1M")

"""Figure 9: distribution of MoE-layer time, ShareGPT."""

from __future__ import annotations

from moeless.experiments import latency_figures

EXPERIMENT = latency_figures.experiment("fig9", "sharegpt", "ShareGPT")

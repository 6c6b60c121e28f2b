"""Figure 16: replicas against the threshold V."""

from __future__ import annotations

from moeless.experiments import sweeps

EXPERIMENT = sweeps.experiment(
    16,
    sweeps.THRESHOLD,
    sweeps.REPLICAS,
    title="replicas against the threshold V",
    question="How many copies does each threshold need?",
    stated="A larger V (0.2 to 1.0) needs fewer replicas.",
    rises=False,
)

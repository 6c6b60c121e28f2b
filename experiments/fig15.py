"""Figure 15: layer time against the threshold V."""

from __future__ import annotations

from moeless.experiments import sweeps

EXPERIMENT = sweeps.experiment(
    15,
    sweeps.THRESHOLD,
    sweeps.TIME,
    title="layer time against the threshold V",
    question="What does tolerating more imbalance cost in time?",
    stated="A larger V (0.2 to 1.0) is slower.",
    rises=True,
)

"""Figure 13: layer time against prediction distance."""

from __future__ import annotations

from moeless.experiments import sweeps

EXPERIMENT = sweeps.experiment(
    13,
    sweeps.DISTANCE,
    sweeps.TIME,
    title="layer time against prediction distance",
    question="What does looking further ahead cost in time?",
    stated="Layer time rises with the distance d, 1 to 5.",
    rises=True,
)

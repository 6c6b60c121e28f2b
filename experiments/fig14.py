"""Figure 14: replicas against prediction distance."""

from __future__ import annotations

from moeless.experiments import sweeps

EXPERIMENT = sweeps.experiment(
    14,
    sweeps.DISTANCE,
    sweeps.REPLICAS,
    title="replicas against prediction distance",
    question="How many copies does a layer have when the forecast looks further ahead?",
    stated="The mean number of replicas per layer falls with the distance d, 1 to 5.",
    rises=False,
)

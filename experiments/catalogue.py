"""The experiments by name: the paper's in its order, then the studies beyond it."""

from __future__ import annotations

import importlib

from moeless.errors import UserError
from moeless.experiments.base import Experiment

#: The paper's tables and figures, and the module of this package whose ``EXPERIMENTS`` hold each.
PAPER = {
    "table1": "tables",
    "table2": "tables",
    "fig1": "routing",
    "fig3": "routing",
    "fig4": "systems",
    "fig6": "prediction",
    "fig7": "prediction",
    "fig8": "systems",
    "fig9": "systems",
    "fig10": "systems",
    "fig11": "prediction",
    "fig12": "prediction",
    "fig13": "sweeps",
    "fig14": "sweeps",
    "fig15": "sweeps",
    "fig16": "sweeps",
    "fig17": "ablation",
}
#: Beyond the paper.
STUDIES = {
    "live": "live",
    "endtoend": "endtoend",
    "components": "ablation",
    "coldstart": "conditions",
    "burstiness": "conditions",
    "drift": "conditions",
    "scale": "clusters",
    "sharing": "clusters",
}
NAMES = (*PAPER, *STUDIES)


def find(name: str) -> list[Experiment]:
    """The experiment of that name, or all of them for ``all``.

    Raises:
        UserError: there is none.
    """
    if name == "all":
        return [experiment for each in NAMES for experiment in find(each)]
    if name not in NAMES:
        raise UserError(f"no experiment is called {name!r}; there are: {', '.join(NAMES)}, all")
    module = importlib.import_module(f"moeless.experiments.{(PAPER | STUDIES)[name]}")
    return [experiment for experiment in module.EXPERIMENTS if experiment.name == name]

"""The experiments by name: the paper's in its order, then the studies beyond it."""

from __future__ import annotations

import importlib

from moeless.errors import UserError
from moeless.experiments.base import Experiment

#: The paper's tables and figures; each is a module of this package with an ``EXPERIMENT``.
PAPER = (
    "table1",
    "table2",
    "fig1",
    "fig3",
    "fig4",
    "fig6",
    "fig7",
    "fig8",
    "fig9",
    "fig10",
    "fig11",
    "fig12",
    "fig13",
    "fig14",
    "fig15",
    "fig16",
    "fig17",
)
#: Beyond the paper.
STUDIES = ("live", "endtoend", "components", "coldstart", "burstiness", "drift", "scale", "sharing")
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
    return [importlib.import_module(f"moeless.experiments.{name}").EXPERIMENT]

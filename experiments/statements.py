"""What the paper states beside what we measured: claims in figures, findings in words, verdicts, and how they are told.

Numbers stay numbers in :class:`Claim` and :class:`Finding`; the functions at the end are the one place that writes them
out as text, and nothing reads a number back from text.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moeless.errors import UserError
from moeless.metrics import schema

#: The evidence words of result files, and ``derived``: arithmetic on published shapes.
Kind = Literal["measured", "simulated", "synthetic", "stated", "derived"]

#: The paper's mean changes in per cent (arXiv 2603.06350, abstract and evaluation), by metric and baseline.
CHANGES = {
    ("layer.mean_ms", "static"): -43.19,
    ("layer.mean_ms", "eplb"): -21.89,
    ("billing.paper", "static"): -92.68,
    ("billing.paper", "oracle"): -84.06,
    ("billing.paper", "eplb"): -95.11,
}


@dataclass(frozen=True)
class Stated:
    """Figures that the paper states.

    Attributes:
        unit: ``%`` is a change.
        bound: ``up to`` or ``<`` where the paper gives a bound.
        on: the device, where the figure is about one.
    """

    values: tuple[float, ...]
    unit: str
    bound: Literal["", "up to", "<"] = ""
    on: str = ""


@dataclass(frozen=True)
class Measured:
    """Our figures under one cost model.

    Attributes:
        values: by what each is of, for example a source, a distance or a number of tokens.
        unit: one of :data:`UNITS`; ``%`` is a change.
        metric: a key of ``moeless.metrics.catalogue``, or what else was measured.
        costs: the cost model; ``live`` for a run that was served; empty where no costs are involved.
        on: the device, where the figure is about one.
    """

    values: Mapping[str, float]
    unit: str
    metric: str
    costs: str = ""
    on: str = ""

    @property
    def mean(self) -> float:
        """Mean of the values."""
        return sum(self.values.values()) / len(self.values)


#: Column of a claim: under the paper's assumptions, under physical costs, really measured.
Side = Literal["paper_rules", "physical", "live"]


@dataclass(frozen=True)
class Claim:
    """A figure of the paper beside ours.

    Attributes:
        id: stays the same from run to run and from version to version.
        against: the system or the method that ours is compared with, or the model that it is about.
        stated: None where the paper states nothing of the kind.
        ours: what we measured, by :data:`Side`; sides without a figure are absent.
        better: which values are.
        kind: on what evidence ours stands.
        note: why they differ, where they do.
    """

    id: str
    statement: str
    against: str
    stated: Stated | None
    ours: Mapping[str, Measured]
    better: Literal["lower", "higher"]
    kind: Kind
    command: str
    note: str = ""

    def verdicts(self) -> dict[str, str]:
        """How ours compares, in a few fixed words, by rule: :data:`RULES`' names, or "" without costs."""
        if self.stated is None:
            return {}
        return {RULES[one.costs]: verdict(self.stated, one) for one in self.ours.values() if one.costs in RULES}


@dataclass(frozen=True)
class Finding:
    """What the paper states in words, and whether our data show the same.

    Attributes:
        id: stays the same from run to run and from version to version.
        statement: the paper's, for example ``layer time rises with the distance``.
        told: template of what the data show, of ``values``' names, ``about``, ``costs`` and ``each``, which is all of
            ``values`` told by the template ``each``.
        holds: None where the data cannot tell.
        kind: on what evidence ours stands.
        about: the source of the data, where there is one finding per source.
        each: template of one value, of ``name`` and ``value``; the form ``change`` is a change in per cent.
        metric: a key of ``moeless.metrics.catalogue``, or what else was measured.
        costs: the cost model; empty where no costs are involved.
    """

    id: str
    statement: str
    told: str
    values: Mapping[str, float]
    holds: bool | None
    kind: Kind
    about: str = ""
    each: str = ""
    metric: str = ""
    costs: str = ""


def unanimous(agree: Iterable[bool]) -> bool | None:
    """True where all agree, False where none does, None where some do."""
    found = set(agree)
    return None if len(found) > 1 else found == {True}


#: Within so many points, or so much of the stated figure, two figures are called the same.
POINTS, SHARE = 5.0, 0.15
AGREES, DIRECTION, NOTHING, OPPOSITE = "agrees", "same direction", "no change", "opposite"
#: Changes in per cent smaller than this are none.
SMALL = 1.0
#: Cost model to how a verdict calls it.
RULES = {"paper": "its rules", "roofline": "physical", "": ""}


def of_change(stated: float, ours: float) -> str:
    """Compare two changes in per cent in one of the words above.

    >>> of_change(-43.2, -40.0), of_change(-43.2, -20.0), of_change(-43.2, 0.3), of_change(-43.2, 8.0)
    ('agrees', 'same direction', 'no change', 'opposite')
    """
    if abs(ours - stated) <= max(POINTS, SHARE * abs(stated)):
        return AGREES
    if abs(ours) < SMALL:
        return NOTHING
    return DIRECTION if ours * stated > 0 else OPPOSITE


def verdict(stated: Stated, ours: Measured) -> str:
    """Compare figures: changes by their mean or, where the paper gives the largest, by ours; sizes one by one."""
    values = tuple(ours.values.values())
    if stated.bound == "<":
        return AGREES if max(values) < stated.values[0] else f"slower on {ours.on}"
    if stated.unit == "%":
        return of_change(stated.values[0], max(values) if stated.bound else ours.mean)
    near = [abs(mine - theirs) <= SHARE * theirs for mine, theirs in zip(values, stated.values, strict=True)]
    return AGREES if all(near) else "does not agree"


def signed(percent: float) -> str:
    """A change in per cent with its sign."""
    text = f"{percent:+.1f} %"
    return "0.0 %" if float(text[:-2]) == 0 else text.replace("-", "−")


def spread(changes: Sequence[float]) -> str:
    """The mean of changes in per cent, with their range where they are several."""
    mean = signed(sum(changes) / len(changes))
    return mean if len(changes) == 1 else f"{mean} ({signed(min(changes))[:-2]} to {signed(max(changes))[:-2]})"


#: Unit of our figures to how they are told.
UNITS: Mapping[str, Callable[[Mapping[str, float]], str]] = {
    "%": lambda values: spread(list(values.values())),
    "points of top-k recall": lambda values: (
        f"{min(values.values()):+.1f} to {max(values.values()):+.1f} points of top-k recall"
    ),
    "ms": lambda values: ", ".join(f"{value:.3f} ms for {name}" for name, value in values.items()),
    "min": lambda values: ", ".join(f"{value:.2f} min" for value in values.values()),
    "MiB": lambda values: " / ".join(f"{value:.2f}" for value in values.values()) + " MiB",
}


def stated_text(stated: Stated | None) -> str:
    """The paper's figure as text, for example ``up to +18 %`` or ``< 0.2 ms on a GPU``."""
    if stated is None:
        return "not stated"
    values = " / ".join(f"{value:{'+' if stated.unit == '%' else ''}g}".replace("-", "−") for value in stated.values)
    return " ".join(filter(None, (stated.bound, values, stated.unit, stated.on)))


def ours_text(claim: Claim, side: str) -> str | None:
    """Our figures of one side as text; None where there are none."""
    found = claim.ours.get(side)
    return None if found is None else UNITS[found.unit](found.values)


class _Template(string.Formatter):
    def format_field(self, value: Any, form: str) -> str:
        return signed(value) if form == "change" else super().format_field(value, form)


def finding_text(finding: Finding) -> str:
    """What the data show, as text."""
    write = _Template().format
    each = ", ".join(write(finding.each, name=name, value=value) for name, value in finding.values.items())
    return write(finding.told, **finding.values, about=finding.about, costs=finding.costs, each=each)


def claim_record(claim: Claim) -> dict[str, Any]:
    """A claim as a record keeps it: its fields, and beside them its texts."""
    verdicts = "; ".join(f"{rule}: {word}" if rule else word for rule, word in claim.verdicts().items())
    sides = {side: ours_text(claim, side) for side in ("paper_rules", "physical", "live")}
    return {**schema.to_json(claim), "paper": stated_text(claim.stated), **sides, "verdict": verdicts}


def finding_record(finding: Finding) -> dict[str, Any]:
    """A finding as a record keeps it: its fields, and what the data show as text."""
    return {**schema.to_json(finding), "ours": finding_text(finding)}


def read_claims(record: Mapping[str, Any]) -> list[Claim]:
    """The claims of a reproduce run's record.

    Raises:
        UserError: the record is of a version that kept texts alone.
    """
    names = {each.name for each in dataclasses.fields(Claim)}
    kept = [claim for entry in record["experiments"] for claim in entry["claims"]]
    if any("id" not in claim for claim in kept):
        raise UserError(
            "the run is of an older version of moeless, whose claims hold no numbers; make it again with "
            "`moeless reproduce`"
        )
    return [schema.from_json(Claim, {key: claim[key] for key in names & set(claim)}, "claim") for claim in kept]

"""How a figure of ours compares with the paper's, in a few fixed words."""

from __future__ import annotations

#: Within so many points, or so much of the stated change, two changes in per cent are called the same.
POINTS, SHARE = 5.0, 0.15
AGREES, DIRECTION, NOTHING, OPPOSITE = "agrees", "same direction", "no change", "opposite"
#: Changes smaller than this are none.
SMALL = 1.0


def of_change(stated: float, ours: float | None) -> str:
    """Compare two changes in per cent in one of the words above; empty without ours.

    >>> of_change(-43.2, -40.0), of_change(-43.2, -20.0), of_change(-43.2, 0.3), of_change(-43.2, 8.0)
    ('agrees', 'same direction', 'no change', 'opposite')
    """
    if ours is None:
        return ""
    if abs(ours - stated) <= max(POINTS, SHARE * abs(stated)):
        return AGREES
    if abs(ours) < SMALL:
        return NOTHING
    return DIRECTION if ours * stated > 0 else OPPOSITE


def of_rules(stated: float, by_rule: dict[str, float | None]) -> str:
    """One verdict a rule, for example ``its rules: agrees; physical: opposite``."""
    found = {rule: of_change(stated, ours) for rule, ours in by_rule.items()}
    return "; ".join(f"{rule}: {word}" for rule, word in found.items() if word)

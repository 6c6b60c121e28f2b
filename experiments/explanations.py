"""Where a run agrees with the paper, where it does not, and why: sentences made from its claims and findings.

Mechanisms are stated once, as they follow from the cost models and billing rules; every figure, and every word that
depends on one, comes from the run's own numbers, so that another run says what it found itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from moeless.experiments.statements import SMALL, Claim, claim_record, ours_text, read_claims, stated_text

#: Side of a claim to how a sentence calls it.
_SIDES = {"paper_rules": "under its rules", "physical": "under physical costs", "live": "live"}


def paragraphs(record: Mapping[str, Any]) -> list[str]:
    """One paragraph each on verdicts, time, EPLB, cost, prediction, routing; only what the run has figures for.

    Raises:
        UserError: the record is of a version that kept texts alone.
    """
    experiments = record["experiments"]
    claims = {claim.id: claim for claim in read_claims(record)}
    findings = [finding for entry in experiments if not entry["study"] for finding in entry["findings"]]
    made = [_verdicts(claims), _words(findings), _time(claims), _eplb(claims), _cost(claims), _prediction(claims)]
    return [text for text in (*made, _routing(experiments)) if text]


def compared(change: float, less: str, more: str) -> str:
    """``less``, ``more`` or a word for a change too small to tell, by the sign of a change in per cent."""
    return f"as {more.removesuffix('er')}, within 1 %," if abs(change) < SMALL else less if change < 0 else more


def _sides(claim: Claim) -> str:
    """``−23.4 % (…) under its rules, +24.0 % (…) under physical costs, +113.2 % live``."""
    return ", ".join(f"{ours_text(claim, side)} {words}" for side, words in _SIDES.items() if side in claim.ours)


def _verdicts(claims: Mapping[str, Claim]) -> str:
    """How many of the rows that carry a stated figure agree, by rule."""
    told: dict[str, Counter[str]] = {}
    for claim in claims.values():
        for rule, word in claim.verdicts().items():
            told.setdefault(rule or "without costs", Counter())[word] += 1
    parts = [
        f"{rule}: " + ", ".join(f"{word} {count}" for word, count in counts.items()) for rule, counts in told.items()
    ]
    return f"**Verdicts.** The rows above with a figure of the paper's, counted: {'; '.join(parts)}." if parts else ""


def _words(findings: Sequence[Mapping[str, Any]]) -> str:
    refuted = list(dict.fromkeys(finding["statement"].rstrip(".") for finding in findings if finding["holds"] is False))
    if refuted:
        return f"**Words.** Refuted here, at least once: {'; '.join(refuted)}."
    return "**Words.** Nothing that the paper says in words is refuted here." if findings else ""


def _time(claims: Mapping[str, Claim]) -> str:
    return _layer_time(
        claims.get("layer-time-static"),
        "Time",
        " The paper's cost model makes an expert's time proportional to its tokens, so a copy that splits a hot expert"
        " always pays. Physically an expert's weights are read once per use whatever its tokens are, so in decode a"
        " copy costs about what it saves; the paper's Algorithm 1 does not see this.{change}",
        "physical",
        " Here layers under physical costs are {change} with its copies.",
        ("shorter", "longer"),
    )


def _eplb(claims: Mapping[str, Claim]) -> str:
    return _layer_time(
        claims.get("layer-time-eplb"),
        "EPLB",
        "{change} Our EPLB plans from the history of the same kind of requests; the paper states neither its redundancy"
        " nor its plan period, on which the distance depends.",
        "paper_rules",
        " Under the paper's own rules MoEless is {change} here.",
        ("faster", "slower"),
    )


def _layer_time(claim: Claim | None, about: str, why: str, side: str, changed: str, words: tuple[str, str]) -> str:
    """A paragraph on a claim about layer time; ``changed`` tells the change of one side, where there is one, in
    ``words``, and stands where ``why`` has it."""
    if claim is None:
        return ""
    change = changed.format(change=compared(claim.ours[side].mean, *words)) if side in claim.ours else ""
    stated = f"Against {claim.against} the paper states {stated_text(claim.stated)}; ours: {_sides(claim)}."
    return f"**{about}.** {stated}{why.format(change=change)}"


def _cost(claims: Mapping[str, Claim]) -> str:
    one, whole, held, gpus = (
        claims.get(f"cost-static-{rule}") for rule in ("paper", "paper_whole", "resident", "gpu_seconds")
    )
    if one is None or whole is None:
        return ""
    text = f"**Cost.** Against Megatron-LM the paper states {stated_text(one.stated)}. "
    text += f"Billed by one rule for all: {_sides(one)}."
    if "paper_rules" in one.ours:
        text += f" So under its rules MoEless is {compared(one.ours['paper_rules'].mean, 'cheaper', 'dearer')}:"
        text += " a plan holds at least one copy of every expert, and by one rule only shorter layers can save."
    text += (
        f" Where the baseline pays for all layers' experts all the time: {_sides(whole)} "
        f"(verdict: {claim_record(whole)['verdict']})."
    )
    if held is not None and gpus is not None:
        text += (
            f" By memory held: {_sides(held)}; by whole GPUs: {_sides(gpus)}. Expert memory that is freed on a GPU "
            "that stays saves no GPU."
        )
    return text


def _prediction(claims: Mapping[str, Claim]) -> str:
    found = [claim for name, claim in claims.items() if name.startswith("recall-above-")]
    if not found:
        return ""
    told = "; ".join(
        f"over {claim.against}: {ours_text(claim, 'live')} (the paper: {stated_text(claim.stated)})" for claim in found
    )
    return (
        f"**Prediction.** Fine-tuned gates {told}. The paper's models are larger and deeper than the one whose gate "
        "inputs are at hand here, and it does not define its accuracy."
    )


def _routing(experiments: Sequence[Mapping[str, Any]]) -> str:
    kinds = {figure["kind"] for entry in experiments for figure in entry["figures"]}
    if "synthetic" not in kinds:
        return ""
    return (
        "**Routing.** Models whose weights are out of reach here are served with made-up routing of their shapes: what "
        "is marked synthetic says what the systems do under skew of real size, not what those models' routing is."
    )

"""Where a run agrees with the paper, where it does not, and why: sentences made from its claims and findings.

Mechanisms are stated once, as they follow from the cost models and billing rules; every figure, and every word that
depends on one, is read from the run, so that another run says what it found itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from moeless.experiments.verdicts import SMALL

#: Column of a claim to how a sentence calls it.
_SIDES = {"paper_rules": "under its rules", "physical": "under physical costs", "live": "live"}


def paragraphs(record: Mapping[str, Any]) -> list[str]:
    """One paragraph each on verdicts, time, EPLB, cost, prediction, routing; only what the run has figures for."""
    experiments = record["experiments"]
    claims = [claim for entry in experiments for claim in entry["claims"]]
    findings = [finding for entry in experiments if not entry["study"] for finding in entry["findings"]]
    made = [_verdicts(claims), _words(findings), _time(claims), _eplb(claims), _cost(claims), _prediction(claims)]
    return [text for text in (*made, _routing(experiments)) if text]


def mean_of(text: str | None) -> float | None:
    """The first number of a claim's figure, such as −23.4 of ``−23.4 % (−30.9 to −14.7)``; None without one."""
    found = re.search(r"[+−-]?\d+(?:\.\d+)?", text or "")
    return float(found[0].replace("−", "-")) if found else None


def compared(change: float, less: str, more: str) -> str:
    """``less``, ``more`` or a word for a change too small to tell, by the sign of a change in per cent."""
    return f"as {more.removesuffix('er')}, within 1 %," if abs(change) < SMALL else less if change < 0 else more


def _claim(claims: Sequence[Mapping[str, Any]], *words: str) -> Mapping[str, Any] | None:
    return next((claim for claim in claims if all(word in claim["statement"] for word in words)), None)


def _sides(claim: Mapping[str, Any], names: Sequence[str] = tuple(_SIDES)) -> str:
    """``−23.4 % (…) under its rules, +24.0 % (…) under physical costs, +113.2 % live``."""
    return ", ".join(f"{claim[name]} {_SIDES[name]}" for name in names if claim[name])


def _verdicts(claims: Sequence[Mapping[str, Any]]) -> str:
    """How many of the rows that carry a stated figure agree, by rule."""
    told: dict[str, dict[str, int]] = {}
    for claim in claims:
        for part in filter(None, claim["verdict"].split("; ")):
            rule, _, word = part.rpartition(": ")
            counts = told.setdefault(rule or "without costs", {})
            counts[word] = counts.get(word, 0) + 1
    if not told:
        return ""
    parts = [
        f"{rule}: " + ", ".join(f"{word} {count}" for word, count in counts.items()) for rule, counts in told.items()
    ]
    return f"**Verdicts.** The rows above with a figure of the paper's, counted: {'; '.join(parts)}."


def _words(findings: Sequence[Mapping[str, Any]]) -> str:
    refuted = list(dict.fromkeys(finding["statement"].rstrip(".") for finding in findings if finding["holds"] is False))
    if not findings:
        return ""
    if not refuted:
        return "**Words.** Nothing that the paper says in words is refuted here."
    return f"**Words.** Refuted here, at least once: {'; '.join(refuted)}."


def _time(claims: Sequence[Mapping[str, Any]]) -> str:
    claim = _claim(claims, "layer time", "Megatron-LM")
    if claim is None:
        return ""
    text = f"**Time.** Against Megatron-LM the paper states {claim['paper']}; ours: {_sides(claim)}."
    text += (
        " The paper's cost model makes an expert's time proportional to its tokens, so a copy that splits a hot expert"
        " always pays. Physically an expert's weights are read once per use whatever its tokens are, so in decode a"
        " copy costs about what it saves; the paper's Algorithm 1 does not see this."
    )
    physical = mean_of(claim["physical"])
    if physical is not None:
        text += f" Here layers under physical costs are {compared(physical, 'shorter', 'longer')} with its copies."
    return text


def _eplb(claims: Sequence[Mapping[str, Any]]) -> str:
    claim = _claim(claims, "layer time", "EPLB")
    if claim is None:
        return ""
    text = f"**EPLB.** Against EPLB the paper states {claim['paper']}; ours: {_sides(claim)}."
    rules = mean_of(claim["paper_rules"])
    if rules is not None:
        text += f" Under the paper's own rules MoEless is {compared(rules, 'faster', 'slower')} here."
    return text + (
        " Our EPLB plans from the history of the same kind of requests; the paper states neither its redundancy nor "
        "its plan period, on which the distance depends."
    )


def _cost(claims: Sequence[Mapping[str, Any]]) -> str:
    one, whole = (_claim(claims, "Cost", "Megatron-LM", rule) for rule in ("one rule", "all layers"))
    held, gpus = (_claim(claims, "Cost", "Megatron-LM", rule) for rule in ("resident", "whole GPUs"))
    if one is None or whole is None:
        return ""
    text = f"**Cost.** Against Megatron-LM the paper states {one['paper']}. Billed by one rule for all: {_sides(one)}."
    change = mean_of(one["paper_rules"])
    if change is not None:
        text += f" So under its rules MoEless is {compared(change, 'cheaper', 'dearer')}:"
        text += " a plan holds at least one copy of every expert, and by one rule only shorter layers can save."
    text += (
        f" Where the baseline pays for all layers' experts all the time: {_sides(whole)} (verdict: {whole['verdict']})."
    )
    if held is not None and gpus is not None:
        text += (
            f" By memory held: {_sides(held)}; by whole GPUs: {_sides(gpus)}. Expert memory that is freed on a GPU "
            "that stays saves no GPU."
        )
    return text


def _prediction(claims: Sequence[Mapping[str, Any]]) -> str:
    found = [claim for claim in claims if claim["statement"].startswith("Predictor accuracy over")]
    if not found:
        return ""
    told = "; ".join(
        f"over {claim['statement'].partition('over ')[2]}: {claim['live']} (the paper: {claim['paper']})"
        for claim in found
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

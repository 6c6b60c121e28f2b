"""How a model family's router turns logits into chosen experts.

A rule covers the families whose gate is one linear layer: scores are the logits, their softmax or their sigmoid; a
correction bias may be added for the choice alone (DeepSeek-V3, arXiv 2412.19437, section 2.1.2); experts may stand in
groups of which only the best take part (node-limited routing of the same report, group-limited greedy of
DeepSeek-V2, arXiv 2405.04434, section 2.1.4).

Axes: E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from moeless.errors import UserError

Scoring = Literal["softmax", "sigmoid"]
GroupScore = Literal["max", "top2"]


@dataclass(frozen=True)
class RouterRule:
    """A router's choice of experts.

    Attributes:
        scoring: the function of the logits to which a correction is added.
        groups: equal groups of consecutive experts, 1 for none.
        top_groups: groups from which experts are chosen.
        group_score: a group's score: its best expert's, or the sum of its best two.
    """

    scoring: Scoring = "softmax"
    groups: int = 1
    top_groups: int = 1
    group_score: GroupScore = "max"

    def __post_init__(self) -> None:
        if self.scoring not in ("softmax", "sigmoid") or self.group_score not in ("max", "top2"):
            raise UserError(f"unknown router scoring {self.scoring!r} or group score {self.group_score!r}")
        if not 1 <= self.top_groups <= self.groups:
            raise UserError(f"a router cannot choose {self.top_groups} of {self.groups} groups")

    def uses_logits(self, corrected: bool) -> bool:
        """Whether logits order experts as scores do, so that scores need not be computed."""
        return not corrected and (self.groups == 1 or self.scoring == "softmax" or self.group_score == "max")

    def scores(self, logits: torch.Tensor, correction: torch.Tensor | None = None) -> torch.Tensor:
        """Differentiable selection scores of logits ``[..., E]``; ``correction`` broadcasts against them."""
        if self.uses_logits(correction is not None):
            return logits
        scores = torch.softmax(logits, -1) if self.scoring == "softmax" else torch.sigmoid(logits)
        return scores if correction is None else scores + correction

    def select(self, scores: torch.Tensor, top_k: int) -> torch.Tensor:
        """Expert ids ``[..., K]`` that the router chooses, best first, from selection scores ``[..., E]``."""
        if self.groups > 1:
            scores = self._mask_groups(scores)
        if top_k == 1:
            return scores.argmax(-1, keepdim=True)
        return scores.topk(top_k, -1).indices

    def _mask_groups(self, scores: torch.Tensor) -> torch.Tensor:
        grouped = scores.unflatten(-1, (self.groups, -1))
        counted = 1 if self.group_score == "max" else min(2, grouped.shape[-1])
        group = grouped.topk(counted, -1).values.sum(-1)
        keep = torch.zeros_like(group, dtype=torch.bool)
        keep.scatter_(-1, group.topk(self.top_groups, -1).indices, True)
        return grouped.masked_fill(~keep.unsqueeze(-1), float("-inf")).flatten(-2)


def rule_of(config: Mapping[str, Any]) -> RouterRule:
    """The rule of a Transformers configuration's model family.

    Raises:
        UserError: the router of the family is not supported.
    """
    text = config.get("text_config")
    if isinstance(text, Mapping) and text.get("model_type"):
        config = text
    family = str(config.get("model_type", ""))
    groups = int(config.get("n_group") or config.get("num_expert_group") or 1)
    top_groups = int(config.get("topk_group") or groups)
    if family not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(f"the router of model family {family!r} is not supported; supported are: {known}")
    rule = FAMILIES[family]
    limited = family == "deepseek_v2" and config.get("topk_method") == "group_limited_greedy"
    return replace(rule, groups=groups, top_groups=top_groups) if limited or rule.group_score == "top2" else rule


_SOFTMAX = (
    *("mixtral", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "flex_olmo", "gpt_oss", "jamba"),
    *("granitemoe", "granitemoeshared", "dbrx", "ernie4_5_moe", "llama4_text", "minimax", "hunyuan_v1_moe"),
)
#: Rules by family, as Transformers names these: softmax, then the best K (ties apart, the best K logits), where
#: DeepSeek-V2 may limit the choice to groups; sigmoid plus a correction bias, groups being scored by their best two.
FAMILIES: Mapping[str, RouterRule] = {
    **dict.fromkeys((*_SOFTMAX, "deepseek_v2"), RouterRule("softmax")),
    "minimax_m2": RouterRule("sigmoid"),
    **dict.fromkeys(("deepseek_v3", "glm4_moe", "dots1", "nemotron_h"), RouterRule("sigmoid", group_score="top2")),
}

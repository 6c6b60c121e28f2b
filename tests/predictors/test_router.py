"""Choosing experts as each model family's router does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.errors import UserError
from moeless.predictors.router import RouterRule, rule_of


@given(seed=st.integers(0, 2**31), corrected=st.booleans(), score=st.sampled_from(["max", "top2"]))
@settings(max_examples=50, deadline=None)
def test_group_limited_choice_stays_in_the_best_groups(seed, corrected, score):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(12, generator=generator)
    correction = torch.randn(12, generator=generator) * 0.1 if corrected else None
    rule = RouterRule("sigmoid", groups=4, top_groups=2, group_score=score)
    scores = torch.sigmoid(logits) + (0 if correction is None else correction)
    by_group = scores.reshape(4, 3).sort(1, descending=True).values
    worth = by_group[:, 0] if score == "max" else by_group[:, :2].sum(1)
    kept = worth.argsort(descending=True)[:2].tolist()
    allowed = [e for e in range(12) if e // 3 in kept]
    expected = sorted(allowed, key=lambda e: -float(scores[e]))[:3]
    assert rule.select(rule.scores(logits, correction), 3).tolist() == expected


def test_a_correction_changes_the_choice_but_not_through_the_logits():
    rule = RouterRule("softmax")
    logits, correction = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 0.9])
    assert rule.select(rule.scores(logits), 1).tolist() == [0]
    assert rule.select(rule.scores(logits, correction), 1).tolist() == [2]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_moe", "olmoe"])
def test_plain_families_choose_by_logits(family):
    assert rule_of({"model_type": family}).uses_logits(corrected=False)


def test_deepseek_v3_scores_groups_by_their_best_two():
    rule = rule_of({"model_type": "deepseek_v3", "n_group": 8, "topk_group": 4})
    assert rule == RouterRule("sigmoid", 8, 4, "top2")


def test_an_unknown_family_is_refused_by_name():
    with pytest.raises(UserError, match="'strange'"):
        rule_of({"model_type": "strange"})


def test_the_rule_equals_the_router_of_transformers():
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = DeepseekV3Config(
        hidden_size=16, n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=4, num_hidden_layers=1
    )
    torch.manual_seed(0)
    router = DeepseekV3TopkRouter(config)
    torch.nn.init.normal_(router.weight)
    router.e_score_correction_bias.normal_(std=0.05)
    hidden = torch.randn(50, 16)
    chosen = router(hidden)[-1]
    rule = rule_of(config.to_dict())
    mine = rule.select(rule.scores(hidden @ router.weight.T, router.e_score_correction_bias), 4)
    assert torch.equal(chosen.sort(-1).values, mine.sort(-1).values)

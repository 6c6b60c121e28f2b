"""The shipped model is what its card says: real weights that plain Transformers loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeless.experiments.bundled_model import card, corpus
from moeless.files import read_json, sha256
from moeless.spec import preset


@pytest.fixture(scope="module")
def model(bundled_model: Path):
    return AutoModelForCausalLM.from_pretrained(str(bundled_model), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(bundled_model: Path):
    return AutoTokenizer.from_pretrained(str(bundled_model))


@pytest.fixture(scope="module")
def evaluation(bundled_model: Path) -> dict:
    return read_json(bundled_model / "evaluation.json")


def test_plain_transformers_loads_it_with_the_preset_shapes(model, bundled_model: Path) -> None:
    spec = preset("bundled")
    config = model.config
    assert (config.num_hidden_layers, config.num_local_experts, config.num_experts_per_tok) == (spec.L, spec.E, spec.K)
    assert config.num_hidden_layers >= 8
    assert config.num_local_experts == 16
    assert sum(p.numel() for p in model.parameters()) == spec.total_params
    assert (bundled_model / "model.safetensors").stat().st_size <= 20e6


def test_the_evaluation_is_of_these_weights(evaluation: dict, bundled_model: Path) -> None:
    assert evaluation["weights_sha256"] == sha256(bundled_model / "model.safetensors")


def test_it_learned_every_domain(evaluation: dict) -> None:
    for domain in evaluation["domains"]:
        assert domain["perplexity"] < domain["unigram_perplexity"] / 4, domain["name"]


def test_routing_is_skewed_and_differs_by_domain(evaluation: dict) -> None:
    assert evaluation["pooled_imbalance"] > 1.3
    last = [max(range(16), key=domain["usage"][-1].__getitem__) for domain in evaluation["domains"]]
    assert len(set(last)) >= 3


def test_the_cards_perplexity_is_found_again(model, tokenizer, evaluation: dict, shared_data: Path) -> None:
    texts = corpus.load(shared_data / "text")
    verse = next(text for text in texts if text.domain.name == "verse")
    stated = next(domain for domain in evaluation["domains"] if domain["name"] == "verse")
    found = card.domain(verse, model, tokenizer)
    assert found.perplexity == pytest.approx(stated["perplexity"], rel=0.01)
    assert found.tokens == stated["tokens"]


def test_it_writes_in_the_style_of_a_domain(model, tokenizer) -> None:
    tokens = tokenizer("Question: Tom has 3 apples and buys 4 more. How many apples", return_tensors="pt")
    made = model.generate(**tokens, max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(made[0], skip_special_tokens=True)
    assert text.startswith("Question: Tom has 3 apples")
    assert made.shape[1] > tokens["input_ids"].shape[1]

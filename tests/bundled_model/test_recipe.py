"""The training recipe is seeded and resumable, and holds documents out honestly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from moeless.errors import UserError
from moeless.experiments.bundled_model import corpus, tokenizer, train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made corpus in the source files' layouts."""
    folder = tmp_path_factory.mktemp("corpus")
    words = ["river", "stone", "count", "seven", "light", "answer", "winter", "garden"]
    rng = np.random.default_rng(0)

    def prose(n: int) -> str:
        return " ".join(rng.choice(words, n))

    (folder / "wikitext2-valid-test.txt").write_text(
        "".join(f"\n = Article {i} = \n\n {prose(120)}\n" for i in range(30))
    )
    (folder / "tinyshakespeare.txt").write_text("\n\n".join(f"FIRST:\n{prose(60)}" for _ in range(60)))
    rows = [
        {"question": f"{i} and {i}?", "answer": f"It is <<{i}+{i}={2 * i}>>{2 * i}. {prose(30)}"} for i in range(60)
    ]
    (folder / "gsm8k-train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "gpt-oss-20b-outputs.txt").write_text("\n\n".join(prose(300) for _ in range(40)))
    (folder / "udhr-multilingual.txt").write_text("".join(f"## l{i}\n{prose(400)}\n" for i in range(20)))
    return folder


@pytest.fixture(scope="module", autouse=True)
def few_sources():
    """Forty files of the standard library: the whole of it only costs time."""
    sources = corpus.python_sources()[100:140]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "python_sources", lambda: sources)
        yield


@pytest.fixture(scope="module")
def texts(data: Path) -> list[corpus.DomainText]:
    return corpus.load(data)


def test_no_document_is_both_trained_on_and_held_out(texts: list[corpus.DomainText]) -> None:
    for text in texts:
        assert text.held_out
        assert len(text.train) > len(text.held_out)
        # identical short files (empty packages' __init__) may recur in a library, so compare what was split
        overlap = set(text.train) & set(text.held_out)
        assert not {document for document in overlap if len(document) > 200}, text.domain.name


def test_the_calculator_marks_of_the_problems_are_removed(texts: list[corpus.DomainText]) -> None:
    problems = next(text for text in texts if text.domain.name == "mathematics")
    assert not any("<<" in document for document in problems.train)


def test_domain_weights_are_shares_of_the_training_rows() -> None:
    assert sum(domain.weight for domain in corpus.DOMAINS) == pytest.approx(1.0)


def test_a_missing_corpus_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="wikitext2"):
        corpus.load(tmp_path)


def test_tokens_decode_to_the_text_whatever_its_script(texts: list[corpus.DomainText], tmp_path: Path) -> None:
    small = tokenizer.train(texts, tmp_path)
    for text in ("3 + 41 = 44\n\tdef f(x):", "الحرية 自由 ελευθερία"):
        assert small.decode(small(text)["input_ids"], skip_special_tokens=True) == text


def test_an_interrupted_training_ends_with_the_same_weights(data: Path, tmp_path: Path) -> None:
    recipe = train.Recipe(
        steps=4,
        rows=2,
        length=16,
        warmup_steps=2,
        hidden_size=32,
        expert_intermediate_size=16,
        layers=2,
        experts=4,
        heads=2,
        kv_heads=1,
    )
    straight = train.train(data, tmp_path / "a", recipe, "cpu", checkpoint_steps=4)

    class Stop(Exception):
        pass

    real = train.batch

    def breaks(streams, weights, given, step):
        if step == 3:
            raise Stop
        return real(streams, weights, given, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "batch", breaks)
        with pytest.raises(Stop):
            train.train(data, tmp_path / "b", recipe, "cpu", checkpoint_steps=2)
    resumed = train.train(data, tmp_path / "b", recipe, "cpu", checkpoint_steps=2)
    for (name, one), two in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


def test_each_layer_is_balanced_on_its_own() -> None:
    even = torch.zeros(8, 4)
    even[torch.arange(8), torch.arange(8) % 4] = 4.0
    skewed = torch.zeros(8, 4)
    skewed[:, 0] = 4.0
    mirrored = skewed.flip(1)
    balanced = train.balance_loss((even, even), 1)
    assert balanced == pytest.approx(1.0, abs=1e-5)
    # two layers skewed in opposite ways are still two skewed layers
    assert train.balance_loss((skewed, mirrored), 1) > 2 * balanced

"""The bundled model's tokenizer: byte-level BPE, trained on the corpus in its training proportions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from moeless.experiments.bundled_model.corpus import DomainText

DOCUMENT = "<|document|>"
PADDING = "<|padding|>"
VOCABULARY = 4096
CHARACTERS = 6_000_000


def _sample(texts: list[DomainText], seed: int) -> Iterator[str]:
    """Training documents of each domain, up to its weight's share of ``CHARACTERS``."""
    for index, text in enumerate(texts):
        budget = int(text.domain.weight * CHARACTERS)
        for i in np.random.default_rng([seed, 7, index]).permutation(len(text.train)):
            if budget <= 0:
                break
            document = text.train[i][:budget]
            budget -= len(document)
            yield document


def train(texts: list[DomainText], out: Path, seed: int = 0) -> PreTrainedTokenizerFast:
    """Train the tokenizer and save it to the folder ``out``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        _sample(texts, seed),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[DOCUMENT, PADDING],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{DOCUMENT} $A", special_tokens=[(DOCUMENT, tokenizer.token_to_id(DOCUMENT))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=DOCUMENT,
        eos_token=DOCUMENT,
        pad_token=PADDING,
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(str(out))
    return fast


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> np.ndarray:
    """Token ids of all documents in one row, each opened by the document mark; ``[N]`` int32."""
    rows = tokenizer(documents, add_special_tokens=True)["input_ids"]
    return np.concatenate([np.asarray(row, dtype=np.int32) for row in rows])

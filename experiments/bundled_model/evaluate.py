"""Held-out perplexity of the bundled model by domain, and which experts each domain uses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import MixtralForCausalLM, PreTrainedTokenizerFast

from moeless.experiments.bundled_model import tokenizer as tokenizers
from moeless.experiments.bundled_model.corpus import DomainText

LENGTH = 256
MOST_ROWS = 96


@dataclass(frozen=True)
class DomainResult:
    """One domain's held-out figures.

    Attributes:
        perplexity: exp of the mean next-token loss over ``tokens`` held-out tokens.
        unigram_perplexity: the same for a model that knows the domain's training token frequencies only.
        usage_LE: share of the domain's assignments that each expert got, rows sum to 1.
    """

    name: str
    documents: int
    tokens: int
    perplexity: float
    unigram_perplexity: float
    usage_LE: NDArray[np.float64]

    def imbalance(self, gpus: int) -> float:
        """Mean over layers of maximum over mean GPU load, experts in contiguous blocks."""
        per_gpu = self.usage_LE.reshape(self.usage_LE.shape[0], gpus, -1).sum(2)
        return float((per_gpu.max(1) / per_gpu.mean(1)).mean())

    def to_json(self) -> dict[str, Any]:
        """A dictionary with the usage matrix rounded to five digits."""
        return {
            "name": self.name,
            "documents": self.documents,
            "tokens": self.tokens,
            "perplexity": round(self.perplexity, 3),
            "unigram_perplexity": round(self.unigram_perplexity, 3),
            "usage": np.round(self.usage_LE, 5).tolist(),
        }


def _unigram(train: NDArray[np.int32], held: NDArray[np.int32], vocabulary: int) -> float:
    counts = np.bincount(train, minlength=vocabulary) + 1.0
    return math.exp(-np.log(counts / counts.sum())[held].mean())


@torch.no_grad()
def domain(text: DomainText, model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerFast) -> DomainResult:
    """Evaluate one domain on rows of ``LENGTH`` held-out tokens, at most ``MOST_ROWS`` of them."""
    config = model.config
    held = tokenizers.encode(tokenizer, text.held_out)
    rows = min(MOST_ROWS, len(held) // LENGTH)
    picked = np.linspace(0, len(held) // LENGTH - 1, rows).astype(int)
    tokens_BT = torch.from_numpy(held[: len(held) // LENGTH * LENGTH].reshape(-1, LENGTH)[picked].astype(np.int64))
    usage = np.zeros((config.num_hidden_layers, config.num_local_experts))
    loss, count = 0.0, 0
    for chunk in tokens_BT.split(16):
        output = model(input_ids=chunk, output_router_logits=True, use_cache=False)
        logits = output.logits[:, :-1].float().flatten(0, 1)
        loss += torch.nn.functional.cross_entropy(logits, chunk[:, 1:].flatten(), reduction="sum").item()
        count += chunk[:, 1:].numel()
        for layer, router_logits in enumerate(output.router_logits):
            chosen = router_logits.topk(config.num_experts_per_tok, dim=-1).indices.flatten().numpy()
            usage[layer] += np.bincount(chosen, minlength=config.num_local_experts)
    return DomainResult(
        name=text.domain.name,
        documents=len(text.held_out),
        tokens=count,
        perplexity=math.exp(loss / count),
        unigram_perplexity=_unigram(
            tokenizers.encode(tokenizer, text.train), tokens_BT.flatten().numpy().astype(np.int32), config.vocab_size
        ),
        usage_LE=usage / usage.sum(1, keepdims=True),
    )

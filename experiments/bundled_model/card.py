"""Evaluate the trained model by domain and write the folder that ships: weights, tokenizer, model card."""

from __future__ import annotations

import argparse
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray
from transformers import MixtralForCausalLM, PreTrainedTokenizerFast

from moeless.experiments.bundled_model import corpus
from moeless.experiments.bundled_model import tokenizer as tokenizers
from moeless.files import read_json, sha256, write_json, write_text

SHIPPED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
GPUS = 8

TEMPLATE = Path(__file__).with_name("card.md.j2")


#: Tokens of a held-out row, and rows of a domain at most.
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
def domain(text: corpus.DomainText, model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerFast) -> DomainResult:
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


def _tops(result: DomainResult, layer: int) -> str:
    order = np.argsort(-result.usage_LE[layer], kind="stable")[:2]
    return f"{order[0]}+{order[1]}: {100 * result.usage_LE[layer][order].sum():.0f} %"


def write(data: Path, work: Path, out: Path) -> None:
    """Evaluate ``work/model`` and fill ``out``; figures go to the card and to ``evaluation.json``."""
    source = work / "model"
    recipe = read_json(work / "recipe.json")
    texts = corpus.load(data, recipe["seed"])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(source))
    model = MixtralForCausalLM.from_pretrained(str(source), dtype=torch.float32).eval()
    results = [domain(text, model, tokenizer) for text in texts]
    weights = np.array([text.domain.weight for text in texts])
    mixed = np.tensordot(weights / weights.sum(), np.stack([r.usage_LE for r in results]), 1)
    pooled = DomainResult("all", 0, 0, 0.0, 0.0, mixed).imbalance(GPUS)

    out.mkdir(parents=True, exist_ok=True)
    for name in SHIPPED:
        shutil.copyfile(source / name, out / name)
    log = [line for line in (work / "train.jsonl").read_text().splitlines() if line]
    losses = [json.loads(line)["loss"] for line in log[-5:]]
    config = model.config
    total = sum(p.numel() for p in model.parameters())
    expert = 3 * config.hidden_size * config.intermediate_size
    idle = config.num_hidden_layers * (config.num_local_experts - config.num_experts_per_tok) * expert
    card = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    write_text(
        out / "README.md",
        card.render(
            layers=config.num_hidden_layers,
            experts=config.num_local_experts,
            top_k=config.num_experts_per_tok,
            hidden=config.hidden_size,
            ffn=config.intermediate_size,
            params=total,
            active=total - idle,
            size=(out / "model.safetensors").stat().st_size,
            vocabulary=config.vocab_size,
            recipe=recipe,
            device="two CPU cores",
            torch=torch.__version__,
            transformers=transformers.__version__,
            final_loss=sum(losses) / len(losses),
            texts=texts,
            python=f"Python {corpus.python_version()}",
            results=results,
            gpus=GPUS,
            tops=_tops,
            pooled=pooled,
        ),
    )
    write_json(
        out / "evaluation.json",
        {
            "recipe": recipe,
            "weights_sha256": sha256(out / "model.safetensors"),
            "imbalance_gpus": GPUS,
            "pooled_imbalance": round(pooled, 4),
            "domains": [result.to_json() for result in results],
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the corpus's text files")
    parser.add_argument("--work", type=Path, required=True, help="the folder that train.py filled")
    parser.add_argument("--out", type=Path, required=True, help="where the shipped folder is written")
    arguments = parser.parse_args()
    write(arguments.data, arguments.work, arguments.out)


if __name__ == "__main__":
    main()

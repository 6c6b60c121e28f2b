"""Evaluate the trained model and write the folder that ships: weights, tokenizer, model card."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers
from jinja2 import Environment, StrictUndefined
from transformers import MixtralForCausalLM, PreTrainedTokenizerFast

from moeless.experiments.bundled_model import corpus, evaluate
from moeless.files import read_json, sha256, write_json, write_text

SHIPPED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
GPUS = 8

TEMPLATE = Path(__file__).with_name("card.md.j2")


def _tops(result: evaluate.DomainResult, layer: int) -> str:
    order = np.argsort(-result.usage_LE[layer], kind="stable")[:2]
    return f"{order[0]}+{order[1]}: {100 * result.usage_LE[layer][order].sum():.0f} %"


def write(data: Path, work: Path, out: Path) -> None:
    """Evaluate ``work/model`` and fill ``out``; figures go to the card and to ``evaluation.json``."""
    source = work / "model"
    recipe = read_json(work / "recipe.json")
    texts = corpus.load(data, recipe["seed"])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(source))
    model = MixtralForCausalLM.from_pretrained(str(source), dtype=torch.float32).eval()
    results = [evaluate.domain(text, model, tokenizer) for text in texts]
    weights = np.array([text.domain.weight for text in texts])
    mixed = np.tensordot(weights / weights.sum(), np.stack([r.usage_LE for r in results]), 1)
    pooled = evaluate.DomainResult("all", 0, 0, 0.0, 0.0, mixed).imbalance(GPUS)

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

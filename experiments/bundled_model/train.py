"""Train the bundled model: a small Mixtral-architecture MoE, seeded and resumable.

The rows of step ``s`` depend on ``(seed, s)`` alone, so a run that was interrupted and resumed from
its checkpoint sees the same data as one that was not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from moeless.experiments.bundled_model import corpus
from moeless.experiments.bundled_model import tokenizer as tokenizers


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the trained weights, besides the corpus."""

    seed: int = 0
    steps: int = 2400
    rows: int = 16
    length: int = 256
    learning_rate: float = 2.5e-3
    warmup_steps: int = 100
    final_learning_rate: float = 1.0e-4
    weight_decay: float = 0.05
    balance: float = 0.003
    hidden_size: int = 192
    expert_intermediate_size: int = 96
    layers: int = 8
    experts: int = 16
    top_k: int = 2
    heads: int = 6
    kv_heads: int = 2

    def config(self, vocabulary: int) -> MixtralConfig:
        """The Transformers configuration of the model."""
        return MixtralConfig(
            vocab_size=vocabulary,
            hidden_size=self.hidden_size,
            intermediate_size=self.expert_intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.hidden_size // self.heads,
            num_local_experts=self.experts,
            num_experts_per_tok=self.top_k,
            max_position_embeddings=2048,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            rms_norm_eps=1e-5,
            sliding_window=None,
            tie_word_embeddings=True,
            router_aux_loss_coef=self.balance,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
        )

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then a cosine to ``final_learning_rate``."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        span = self.learning_rate - self.final_learning_rate
        return self.final_learning_rate + span * 0.5 * (1 + math.cos(math.pi * progress))


def batch(streams: list[np.ndarray], weights: np.ndarray, recipe: Recipe, step: int) -> torch.Tensor:
    """Token rows of a step, ``[rows, length]`` int64; each row is from one domain."""
    rng = np.random.default_rng([recipe.seed, step])
    rows = []
    for domain in rng.choice(len(streams), size=recipe.rows, p=weights):
        start = rng.integers(0, len(streams[domain]) - recipe.length)
        rows.append(streams[domain][start : start + recipe.length])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def balance_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Switch Transformer's balancing loss (arXiv 2101.03961, eq. 4) of each layer alone, averaged.

    The library's own version pools the layers, which lets one layer's skew cancel another's.
    """
    losses = []
    for logits in router_logits:
        probabilities = torch.softmax(logits.float(), dim=-1)
        experts = probabilities.shape[-1]
        chosen = torch.topk(probabilities, top_k, dim=-1).indices
        share = torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel()
        losses.append(experts * (share * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


def _optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), eps=1e-8)


def _save(path: Path, state: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def train(data: Path, work: Path, recipe: Recipe, device: str, checkpoint_steps: int) -> MixtralForCausalLM:
    """Train, or go on from ``work/checkpoint.pt``; the finished model is in ``work/model``."""
    work.mkdir(parents=True, exist_ok=True)
    texts = corpus.load(data, recipe.seed)
    folder = work / "model"
    if (folder / "tokenizer.json").is_file():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
    else:
        tokenizer = tokenizers.train(texts, folder, recipe.seed)
    streams = [tokenizers.encode(tokenizer, text.train) for text in texts]
    weights = np.array([text.domain.weight for text in texts])
    weights = weights / weights.sum()

    torch.manual_seed(recipe.seed)
    model = MixtralForCausalLM(recipe.config(len(tokenizer))).to(device)
    model.set_experts_implementation("grouped_mm")
    model.train()
    optimizer = _optimizer(model, recipe)
    checkpoint = work / "checkpoint.pt"
    first = 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state["recipe"] != asdict(recipe):
            raise SystemExit(f"{checkpoint} was made by another recipe; use another --work folder")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    log = (work / "train.jsonl").open("a")
    began = time.perf_counter()
    for step in range(first, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        tokens = batch(streams, weights, recipe, step).to(device)
        output = model(input_ids=tokens, output_router_logits=True, use_cache=False)
        loss = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
        balance = balance_loss(output.router_logits, recipe.top_k)
        (loss + recipe.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0 or step + 1 == recipe.steps:
            row = {
                "step": step,
                "loss": round(loss.item(), 4),
                "balance": round(balance.item(), 4),
                "tokens_per_second": round((step + 1 - first) * tokens.numel() / (time.perf_counter() - began)),
            }
            log.write(json.dumps(row) + "\n")
            log.flush()
        if (step + 1) % checkpoint_steps == 0 or step + 1 == recipe.steps:
            _save(
                checkpoint,
                {
                    "recipe": asdict(recipe),
                    "step": step + 1,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                },
            )
    log.close()
    model.eval()
    model.to(torch.bfloat16).save_pretrained(str(folder))
    (work / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the corpus's text files")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints, log and the model")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--checkpoint-steps", type=int, default=200)
    arguments = parser.parse_args()
    train(arguments.data, arguments.work, Recipe(steps=arguments.steps), arguments.device, arguments.checkpoint_steps)


if __name__ == "__main__":
    main()

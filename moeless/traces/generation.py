"""Generation whose random numbers depend on seed and request alone, with lengths of its own per request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeless.traces.hooks import Captured, RouterCapture


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: ``temperature`` 0 is greedy; ``top_p`` keeps the smallest set of that mass."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Generated:
    """One batch: generated ids per request, and the routing of each forward pass (the first is the prefill)."""

    output_ids: list[list[int]]
    passes: list[Captured]


def _stop_ids(model: Any, tokenizer: Any) -> list[int]:
    ids: set[int] = set()
    configured = getattr(model, "generation_config", None)
    for value in (getattr(configured, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)):
        ids.update([value] if isinstance(value, int) else value or [])
    return sorted(ids)


class Generator:
    """Batched generation by ``model.generate``, so that every family's cache and positions are its own."""

    def __init__(self, model: Any, tokenizer: Any, sampling: Sampling, capture: RouterCapture | None) -> None:
        from transformers import GenerationConfig

        self.model = model
        self.sampling = sampling
        self.capture = capture
        self.stop_ids = _stop_ids(model, tokenizer)
        pad = getattr(tokenizer, "pad_token_id", None)
        self.pad_id = int(pad) if pad is not None else (self.stop_ids[0] if self.stop_ids else 0)
        # the checkpoint's own defaults (sampling, penalties) would be merged into ours
        model.generation_config = GenerationConfig(pad_token_id=self.pad_id)

    def run(
        self, requests: Sequence[int], prompt_ids: Sequence[Sequence[int]], limits: Sequence[int], *, exact: bool
    ) -> Generated:
        """Generate for one batch.

        Args:
            requests: request ids, which key the random numbers.
            prompt_ids: token ids of each prompt, at least one.
            limits: tokens to generate at most; ``exact`` ignores end-of-text until then.
        """
        import torch
        from transformers import LogitsProcessorList, StoppingCriteriaList

        width = max(len(ids) for ids in prompt_ids)
        input_ids = torch.full((len(prompt_ids), width), self.pad_id, dtype=torch.long)
        mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(prompt_ids):
            input_ids[row, width - len(ids) :] = torch.as_tensor(list(ids))
            mask[row, width - len(ids) :] = 1
        device = self.model.get_input_embeddings().weight.device
        choose = _choose_tokens(requests, width, self.sampling, self.stop_ids if exact else [])
        stop = _stop_rows(width, limits, [] if exact else self.stop_ids)
        with torch.inference_mode():
            sequences = self.model.generate(
                input_ids.to(device),
                attention_mask=mask.to(device),
                do_sample=False,
                max_new_tokens=max(limits),
                use_cache=True,
                logits_processor=LogitsProcessorList([choose]),
                stopping_criteria=StoppingCriteriaList([stop]),
            )
        made = sequences[:, width:].tolist()
        output = [_cut(ids, limit, [] if exact else self.stop_ids) for ids, limit in zip(made, limits, strict=True)]
        return Generated(output, self.capture.take() if self.capture is not None else [])


def _cut(ids: list[int], limit: int, stop_ids: list[int]) -> list[int]:
    """Ids up to and including the first end-of-text, at most ``limit``."""
    for index, token in enumerate(ids[:limit]):
        if token in stop_ids:
            return ids[: index + 1]
    return ids[:limit]


def _stop_rows(width: int, limits: Sequence[int], stop_ids: list[int]) -> Any:
    import torch
    from transformers import StoppingCriteria

    class StopRows(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            done = torch.as_tensor(limits, device=input_ids.device) <= input_ids.shape[1] - width
            if stop_ids:
                ends = torch.as_tensor(stop_ids, device=input_ids.device)
                done |= torch.isin(input_ids[:, -1], ends)
            return done

    return StopRows()


def _choose_tokens(requests: Sequence[int], width: int, sampling: Sampling, forbidden: list[int]) -> Any:
    """A processor that leaves one possible token per row; greedy search then takes it."""
    import torch
    from transformers import LogitsProcessor

    streams = [np.random.default_rng((sampling.seed, request)) for request in requests]

    class ChooseTokens(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            if forbidden:
                scores = scores.clone()
                scores[:, forbidden] = -torch.inf
            if sampling.temperature == 0:
                return scores
            draw = torch.tensor([stream.random() for stream in streams], dtype=torch.float64, device=scores.device)
            ordered, order = torch.sort(scores.double() / sampling.temperature, dim=-1, descending=True, stable=True)
            mass = torch.softmax(ordered, dim=-1).cumsum(dim=-1)
            # the last token of the nucleus is the first whose mass reaches top_p
            last = (mass < sampling.top_p).sum(dim=-1, keepdim=True).clamp(max=mass.shape[-1] - 1)
            target = draw[:, None] * mass.gather(1, last)
            pick = torch.minimum((mass <= target).sum(dim=-1, keepdim=True), last)
            chosen = torch.full_like(scores, -torch.inf)
            return chosen.scatter(1, order.gather(1, pick), 0.0)

    return ChooseTokens()

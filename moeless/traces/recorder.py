"""Recording the routing of a Transformers model on prompts, shard by shard.

Batches are fixed by request index and random numbers keyed by (seed, request), so a recording that was
interrupted repeats its broken batch and ends byte-identical to one that was not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moeless.errors import RunFailed, UserError
from moeless.traces.generation import Generated, Generator, Sampling
from moeless.traces.hf_model import LoadedModel
from moeless.traces.hf_spec import spec_of_model, text_config
from moeless.traces.hooks import RouterCapture
from moeless.traces.info import TraceInfo, library_versions
from moeless.traces.writers import RequestRows, TokenTraceWriter

#: Rows of one shard, at least, and bytes of router inputs that a shard may hold in memory.
SHARD_ROWS = 32_768
SHARD_BYTES = 512 * 2**20


class PromptLike(Protocol):
    """What a prompt must offer; ``workloads.prompts.Prompt`` does."""

    @property
    def text(self) -> str: ...
    @property
    def category(self) -> str: ...
    @property
    def source_id(self) -> str: ...


@dataclass(frozen=True)
class RecordSettings:
    """How to record.

    Attributes:
        max_new_tokens: tokens to generate per request, at most.
        lengths: exact number of tokens to generate, per request (end-of-text is ignored), None to let the model end.
        max_prompt_tokens: longer prompts are cut at their end; None: what the model's context leaves room for.
        router_inputs: ``float16`` or ``bfloat16`` to keep what every gate sees, None to drop it.
        chat_template: whether prompts are wrapped in the tokenizer's chat template, where it has one.
    """

    max_new_tokens: int = 64
    batch_size: int = 8
    sampling: Sampling = field(default_factory=Sampling)
    lengths: Sequence[int] | None = None
    max_prompt_tokens: int | None = None
    router_inputs: str | None = None
    chat_template: bool = True
    shard_rows: int = SHARD_ROWS

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size", "shard_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.sampling.temperature < 0 or not 0 < self.sampling.top_p <= 1:
            raise UserError("the temperature must be at least 0, and top-p between 0 and 1")
        if self.lengths is not None and any(length < 1 for length in self.lengths):
            raise UserError("forced output lengths must be at least 1 token")
        if self.router_inputs not in (None, "float16", "bfloat16"):
            raise UserError(f"router inputs are kept as float16 or bfloat16, not {self.router_inputs!r}")


class Tokens:
    """Prompts as token ids."""

    def __init__(self, tokenizer: Any, *, chat_template: bool, limit: int) -> None:
        self.tokenizer = tokenizer
        self.chat = chat_template and bool(getattr(tokenizer, "chat_template", None))
        self.limit = limit
        self.cut = 0

    def __call__(self, text: str) -> list[int]:
        """Token ids of a prompt, at most ``limit``; an empty one becomes the begin-of-text token."""
        if self.chat:
            turns = [{"role": "user", "content": text}]
            ids = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        else:
            ids = self.tokenizer(text)["input_ids"]
        ids = [int(token) for token in ids]
        self.cut += len(ids) > self.limit
        if not ids:
            start = next((t for t in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id) if t is not None), 0)
            ids = [int(start)]
        return ids[: self.limit]


def record(
    loaded: LoadedModel,
    prompts: Sequence[PromptLike],
    out: Path,
    settings: RecordSettings | None = None,
    *,
    prompt_source: dict[str, Any] | None = None,
    on_batch: Callable[[int, int, int], None] | None = None,
) -> TraceInfo:
    """Generate answers to the prompts and write every token's routing as a token trace.

    ``out`` may hold an unfinished recording of the same command: it is finished. ``on_batch`` is called
    with (requests done, requests, rows).

    Raises:
        UserError: the model has no recordable MoE layer, or ``out`` holds something else.
        RunFailed: the model's forward pass does not show its routing in a way that can be recorded.
    """
    settings = settings or RecordSettings()
    if not prompts:
        raise UserError("there is no prompt to record")
    if settings.lengths is not None and len(settings.lengths) < len(prompts):
        raise UserError(f"{len(settings.lengths)} output lengths are given for {len(prompts)} prompts")
    info = _describe(loaded, prompts, settings, prompt_source or {})
    spec = info.spec
    rows = settings.shard_rows
    if settings.router_inputs is not None:
        rows = max(1, min(rows, SHARD_BYTES // (2 * spec.L * spec.hidden_size)))
    writer = TokenTraceWriter(out, info, shard_rows=rows, resume=True)
    if writer.complete:
        return writer.info
    capture = RouterCapture(loaded.model, router_inputs=settings.router_inputs)
    generator = Generator(loaded.model, loaded.tokenizer, settings.sampling, capture)
    tokens = Tokens(loaded.tokenizer, chat_template=settings.chat_template, limit=_prompt_limit(loaded.model, settings))
    with capture.recording():
        for start in range(writer.num_requests, len(prompts), settings.batch_size):
            requests = range(start, min(start + settings.batch_size, len(prompts)))
            ids = [tokens(prompts[index].text) for index in requests]
            limits = [
                settings.lengths[i] if settings.lengths is not None else settings.max_new_tokens for i in requests
            ]
            made = generator.run(requests, ids, limits, exact=settings.lengths is not None)
            writer.append(batch_rows(requests, ids, made, [prompts[index] for index in requests]))
            if on_batch is not None:
                on_batch(requests[-1] + 1, len(prompts), writer.rows + writer.pending_rows)
    return writer.close()


def describe(loaded: LoadedModel, router_inputs: str | None = None) -> TraceInfo:
    """Description of a token trace of that model, for callers that write rows themselves."""
    spec = spec_of_model(loaded.model, loaded.name)
    return TraceInfo("tokens", spec, loaded.source, router_input_dtype=router_inputs)


def batch_rows(
    requests: Sequence[int], prompt_ids: Sequence[Sequence[int]], made: Generated, prompts: Sequence[PromptLike]
) -> list[RequestRows]:
    """Rows of every request out of a left-padded batch's passes; padding and surplus steps are left out.

    Raises:
        RunFailed: a pass routed another number of tokens than it was given.
    """
    import torch

    batch, width = len(requests), max(len(ids) for ids in prompt_ids)
    prefill, steps = made.passes[0], made.passes[1:]
    expected = [batch * width] + [batch] * len(steps)
    for number, (one, rows) in enumerate(zip(made.passes, expected, strict=True)):
        if len(one.topk_TLK) != rows:
            raise RunFailed(f"pass {number} routed {len(one.topk_TLK)} tokens where {rows} went in; not recordable")

    def collect(name: str) -> Any:
        first = getattr(prefill, name)
        if first is None:
            return None
        first = first.view(batch, width, *first.shape[1:])
        later = [getattr(step, name)[:, None] for step in steps]
        return torch.cat([first, *later], dim=1)

    topk, weights, inputs = collect("topk_TLK"), collect("weights_TLK"), collect("input_TLH")
    made_rows = []
    for row, request in enumerate(requests):
        prompt, output = list(prompt_ids[row]), made.output_ids[row]
        # the last generated token is never fed back, so it has no routing
        span = slice(width - len(prompt), width + len(output) - 1)
        made_rows.append(
            RequestRows(
                request=request,
                topk_TLK=topk[row, span].numpy(),
                prompt_tokens=len(prompt),
                output_tokens=len(output),
                weights_TLK=weights[row, span].numpy(),
                token_T=np.array(prompt + output[:-1], np.int64),
                input_TLH=None if inputs is None else inputs[row, span].clone(),
                category=prompts[row].category,
                source_id=prompts[row].source_id,
            )
        )
    return made_rows


def _prompt_limit(model: Any, settings: RecordSettings) -> int:
    context = int(getattr(text_config(model.config), "max_position_embeddings", None) or 2**20)
    longest = max(settings.lengths) if settings.lengths is not None else settings.max_new_tokens
    room = context - longest
    if room < 1:
        raise UserError(f"{longest} new tokens leave no room for a prompt in a context of {context} tokens")
    return room if settings.max_prompt_tokens is None else max(1, min(room, settings.max_prompt_tokens))


def _describe(
    loaded: LoadedModel, prompts: Sequence[PromptLike], settings: RecordSettings, prompt_source: dict[str, Any]
) -> TraceInfo:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(prompt.text.encode())
        digest.update(b"\0")
    lengths = settings.lengths
    model = loaded.model
    return TraceInfo(
        kind="tokens",
        spec=spec_of_model(model, loaded.name),
        source=loaded.source,
        prompt_source={**prompt_source, "requests": len(prompts), "sha256": digest.hexdigest()},
        seed=settings.sampling.seed,
        router_input_dtype=settings.router_inputs,
        settings={
            "batch_size": settings.batch_size,
            "max_new_tokens": settings.max_new_tokens,
            "temperature": settings.sampling.temperature,
            "top_p": settings.sampling.top_p,
            "max_prompt_tokens": settings.max_prompt_tokens,
            "chat_template": settings.chat_template and bool(getattr(loaded.tokenizer, "chat_template", None)),
            "forced_lengths": None if lengths is None else _digest(lengths[: len(prompts)]),
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "device": next(model.parameters()).device.type,
        },
        versions=library_versions("torch", "transformers", "numpy", "pyarrow"),
    )


def _digest(lengths: Sequence[int]) -> str:
    return hashlib.sha256(",".join(str(int(length)) for length in lengths).encode()).hexdigest()

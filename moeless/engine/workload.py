"""Real prompts with arrivals: the requests of a live run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeless.contracts import Request
from moeless.engine.serving import LiveRequest
from moeless.errors import UserError
from moeless.workloads import arrivals, prompts


@dataclass(frozen=True)
class WorkloadSettings:
    """Which requests are served.

    Attributes:
        prompts: as ``moeless.workloads.prompts.load`` takes it; None for the bundled ones.
        arrivals, request_rate, burstiness, window, time_scale, duration: as in ``moeless.workloads.arrivals.load``.
        requests: served at most.
        prompt_tokens: prompts are cut after so many tokens.
        output_tokens: an answer has as many tokens as its arrival says, at most so many; end-of-text tokens do not end
            it, as usual in serving benchmarks.
    """

    prompts: str | None = None
    arrivals: str = "azure-like"
    request_rate: float | None = None
    burstiness: float | None = None
    window: tuple[float, float] | None = None
    time_scale: float = 1.0
    duration: float | None = None
    requests: int = 50
    prompt_tokens: int = 256
    output_tokens: int = 32
    seed: int = 0


def live_requests(model: Path, settings: WorkloadSettings) -> tuple[LiveRequest, ...]:
    """Requests in order of arrival, prompts drawn by the seed and repeated where there are too few.

    Raises:
        UserError: the prompts, arrivals or the model's tokenizer cannot be read.
    """
    from transformers import AutoTokenizer

    series = arrivals.load(
        settings.arrivals,
        num_requests=settings.requests,
        duration=settings.duration,
        window=settings.window,
        time_scale=settings.time_scale,
        request_rate=settings.request_rate,
        burstiness=settings.burstiness,
        seed=settings.seed,
    )
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(f"{model} has no tokenizer that Transformers reads ({str(error).splitlines()[0]})") from None
    texts = prompts.load(settings.prompts, max_requests=len(series), seed=settings.seed)
    made = []
    for index in range(len(series)):
        prompt = texts[index % len(texts)]
        tokens = tuple(tokenizer(prompt.text)["input_ids"][: settings.prompt_tokens])
        if not tokens:
            raise UserError(f"prompt {prompt.source_id} has no tokens")
        output = settings.output_tokens
        if series.output_N is not None:
            output = min(output, int(series.output_N[index]))
        request = Request(index, float(series.time_N[index]), len(tokens), output, category=prompt.category)
        made.append(LiveRequest(request, tokens))
    return tuple(made)

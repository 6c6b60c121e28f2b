"""Real prompts with arrivals: the requests of a live run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moeless.contracts import Request
from moeless.engine.options import LiveWorkload
from moeless.engine.serving import LiveRequest
from moeless.errors import UserError
from moeless.workloads import prompts


def live_requests(model: Path, settings: LiveWorkload) -> tuple[LiveRequest, ...]:
    """Requests in order of arrival, prompts drawn by the seed and repeated where there are too few.

    Raises:
        UserError: the prompts, arrivals or the model's tokenizer cannot be read.
    """
    from transformers import AutoTokenizer

    series = settings.series()
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

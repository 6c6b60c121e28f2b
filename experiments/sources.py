"""Where routing comes from: the reader's trace, or what is at hand without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moeless.experiments.base import Job, Kind, Options
from moeless.tracking.environment import fingerprint

_RECORDING = "moeless.experiments.cells.recording"
_SYNTHETIC = "moeless.experiments.cells.synthetic"
_PREDICTION = "moeless.experiments.cells.prediction"


@dataclass(frozen=True)
class Source:
    """A trace, and how figures made from it are marked.

    Attributes:
        title: the model's name, as a figure shows it.
        kind: evidence of figures that simulate on it.
        routing: evidence of figures that show the routing itself.
        label: shown on every figure, ``bundled model`` for the bundled one.
        key: tells sources apart in the names of jobs.
        predictor: the load predictor that the paper's system uses on it.
        fitted: artefacts of fitted predictors, by name.
        cluster: where it is served, where that is not the cluster that was asked for.
        quick_requests: how many requests a quick serving run takes; the paper's planner is simulated layer by layer.
    """

    title: str
    job: Job
    kind: Kind
    routing: Kind
    label: str = ""
    key: str = ""
    predictor: str = "history"
    fitted: Mapping[str, Job] = field(default_factory=dict)
    quick_requests: int = 8
    cluster: str | None = None


def given(options: Options) -> Source | None:
    """The reader's own trace."""
    if options.trace is None:
        return None
    from moeless.traces import open_trace

    info = open_trace(options.trace).info
    mark = fingerprint(options.trace)
    job = Job(f"the trace {options.trace.name}", "", {"sha256": mark["sha256"]}, given=options.trace)
    if info.synthetic:
        return Source(info.spec.name, job, "synthetic", "synthetic", key="given")
    label = "bundled model" if info.spec.name == "bundled" else ""
    return Source(info.spec.name, job, "simulated", "measured", label, key="given")


def bundled(options: Options, router_inputs: bool = True) -> Source:
    """The bundled model, recorded on bundled prompts."""
    params: dict[str, Any] = {
        "requests": options.pick(96, 240),
        "max_new_tokens": options.pick(48, 128),
        "router_inputs": "float16" if router_inputs else None,
        "seed": options.seed,
    }
    job = Job("record the bundled model", f"{_RECORDING}:bundled", params, artefact=True)
    source = Source("bundled", job, "simulated", "measured", "bundled model", key="bundled", quick_requests=60)
    if not router_inputs:
        return source
    fitted = {"layer_aware": fitted_predictor(options, source, "layer_aware")}
    return replace(source, predictor="layer_aware", fitted=fitted)


#: Distances that predictors are fitted and measured at.
DISTANCES = (1, 2, 3, 4, 5)


def fitted_predictor(options: Options, source: Source, method: str) -> Job:
    """A load predictor fitted on the source's training requests and measured on its test requests."""
    params = {
        "method": method,
        "distances": list(DISTANCES),
        "max_tokens": options.pick(6000, 50_000),
        "batch_tokens": [32, 512],
        "seed": options.seed,
    }
    label = f"fit {method} on {source.title}"
    return Job(label, f"{_PREDICTION}:fit", params, (source.job,), artefact=True, timed=True)


def synthetic(options: Options, model: str, dataset: str) -> Source:
    """Made-up routing with the model's shapes; the two data sets differ in popularity and lengths."""
    prompt, output = {"lmsys": (200, 40), "sharegpt": (300, 60)}[dataset]
    params = {
        "model": model,
        "dataset": dataset,
        "requests": options.pick(60, 400),
        "prompt_tokens": options.pick(prompt, 4 * prompt),
        "output_tokens": options.pick(output, 4 * output),
        "seed": options.seed,
    }
    job = Job(f"make up routing of {model}, {dataset}", f"{_SYNTHETIC}:trace", params, artefact=True)
    source = Source(model, job, "synthetic", "synthetic", "synthetic routing", f"{model}-{dataset}", quick_requests=12)
    if model == "llama-4-scout" and options.cluster == "a6000x8":
        # in 16 bits, one extra copy per GPU and layer beside the KV cache is more than 48 GB
        return replace(source, title="llama-4-scout (h100x8)", cluster="h100x8")
    return source


#: The paper's three models.
PAPER_MODELS = ("mixtral-8x7b", "phi-3.5-moe", "llama-4-scout")


def routing_sources(options: Options) -> list[Source]:
    """What the routing figures show: the reader's trace, or the bundled model and the paper's models of the figure."""
    mine = given(options)
    if mine is not None:
        return [mine]
    models = options.models or ("mixtral-8x7b", "phi-3.5-moe")
    shown = [synthetic(options, name, "lmsys" if name.startswith("phi") else "sharegpt") for name in models]
    return [bundled(options), *shown]


#: The paper's two prompt sets, and how their stand-ins are called.
DATASETS = ("lmsys", "sharegpt")


def serving_sources(options: Options, dataset: str) -> list[Source]:
    """What the serving figures run on: the reader's trace, or everything at hand for that data set."""
    mine = given(options)
    if mine is not None:
        return [mine]
    return [synthetic(options, name, dataset) for name in options.models or PAPER_MODELS]


def sweep_sources(options: Options) -> list[Source]:
    """What the sweeps run on: one synthetic model, and the bundled one, whose gate inputs allow real prediction."""
    mine = given(options)
    if mine is not None:
        return [mine]
    return [bundled(options), synthetic(options, (options.models or PAPER_MODELS)[0], "lmsys")]


def common_kind(sources: Sequence[Source]) -> Kind:
    """The weakest evidence among the sources: one synthetic one makes the figure synthetic."""
    return "synthetic" if any(source.kind == "synthetic" for source in sources) else sources[0].kind


def common_label(sources: Sequence[Source]) -> str:
    """The label of a figure that shows all of them."""
    return next((source.label for source in sources if source.label), "")

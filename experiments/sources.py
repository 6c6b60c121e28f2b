"""Where routing comes from: the reader's traces, or what is at hand without them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moeless.experiments.base import Job, Kind, Options
from moeless.spec import preset
from moeless.tracking.environment import fingerprint

_RECORDING = "moeless.experiments.cells.recording"
_SYNTHETIC = "moeless.experiments.cells.synthetic"
#: Distances that predictors are fitted and measured at.
DISTANCES = (1, 2, 3, 4, 5)
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
        model: the preset that it stands for.
        predictor: the load predictor that the paper's system uses on it: copies of gates where gate inputs are
            there, otherwise what expert ids of this layer say about the next ones.
        fitted: artefacts of fitted predictors, by name.
        cluster: where it is served, where that is not the cluster that was asked for.
        quick_requests: how many requests a quick serving run takes; the paper's planner is simulated layer by layer.
        layers: MoE layers.
        inputs: whether it holds what gates see.
        ahead: distances that predictors are fitted at.
    """

    title: str
    job: Job
    kind: Kind
    routing: Kind
    label: str = ""
    key: str = ""
    model: str = ""
    predictor: str = "history"
    fitted: Mapping[str, Job] = field(default_factory=dict)
    quick_requests: int = 8
    cluster: str | None = None
    layers: int = 0
    inputs: bool = False
    ahead: tuple[int, ...] = DISTANCES


def given(options: Options) -> list[Source]:
    """The reader's own traces."""
    found: list[Source] = []
    for path in options.traces:
        made = _given(options, path)
        same = sum(other.title == made.title for other in found)
        found.append(replace(made, title=f"{made.title} ({same + 1})") if same else made)
    return found


def _given(options: Options, path: Path) -> Source:
    from moeless.traces import TokenTrace, open_trace, require_kind

    trace = open_trace(path)
    require_kind(trace, "tokens", command="reproduce")
    assert isinstance(trace, TokenTrace)
    spec, mark = trace.spec, fingerprint(path)
    job = Job(f"the trace {path.name}", "", {"sha256": mark["sha256"]}, given=path)
    output = max(1.0, trace.num_tokens / max(1, trace.num_requests))
    source = Source(
        spec.name,
        job,
        "synthetic" if trace.info.synthetic else "simulated",
        "synthetic" if trace.info.synthetic else "measured",
        "synthetic routing" if trace.info.synthetic else "bundled model" if spec.name == "bundled" else "real routing",
        f"given-{mark['sha256'][:8]}",
        spec.name,
        quick_requests=min(60, max(12, int(3000 / output))),
        layers=spec.L,
        inputs=trace.has_router_inputs,
    )
    # beside the bundled model the prediction figures are about that one: measuring ids alone would take minutes unread
    return _with_predictor(options, source, evaluate=source.inputs or not options.beside)


def _with_predictor(options: Options, source: Source, evaluate: bool = True) -> Source:
    method = "layer_aware" if source.inputs else "transition"
    return replace(source, predictor=method, fitted={method: fitted_predictor(options, source, method, evaluate)})


def bundled(options: Options, router_inputs: bool = True) -> Source:
    """The bundled model, recorded on bundled prompts."""
    params: dict[str, Any] = {
        "requests": options.pick(96, 240),
        "max_new_tokens": options.pick(48, 128),
        "router_inputs": "float16" if router_inputs else None,
        "seed": options.seed,
    }
    job = Job("record the bundled model", f"{_RECORDING}:bundled", params, artefact=True)
    source = Source("bundled", job, "simulated", "measured", "bundled model", "bundled", "bundled", quick_requests=60)
    return _with_predictor(options, replace(source, layers=preset("bundled").L, inputs=router_inputs))


def distances(source: Source) -> tuple[int, ...]:
    """Those that the model has layers for."""
    return tuple(d for d in source.ahead if d < source.layers)


def fitted_predictor(options: Options, source: Source, method: str, evaluate: bool = True) -> Job:
    """A load predictor fitted on the source's training requests and measured on its test requests."""
    params = {
        "method": method,
        "distances": list(distances(source)),
        "max_tokens": options.pick(6000, 50_000),
        "batch_tokens": [32, 512],
        "evaluate": evaluate,
        "seed": options.seed,
    }
    label = f"fit {method} on {source.title}"
    return Job(label, f"{_PREDICTION}:fit", params, (source.job,), artefact=True)


#: Mean prompt and output tokens of the two data sets' stand-ins, at quick and at full size.
_LENGTHS = {"lmsys": ((120, 24), (800, 160)), "sharegpt": ((180, 36), (1200, 240))}


def synthetic(options: Options, model: str, dataset: str) -> Source:
    """Made-up routing with the model's shapes; the two data sets differ in popularity and lengths."""
    prompt, output = options.pick(*_LENGTHS[dataset])
    params = {
        "model": model,
        "dataset": dataset,
        "requests": options.pick(60, 700),
        "prompt_tokens": prompt,
        "output_tokens": output,
        "seed": options.seed,
    }
    job = Job(f"make up routing of {model}, {dataset}", f"{_SYNTHETIC}:trace", params, artefact=True)
    key = f"{model}-{dataset}"
    source = Source(model, job, "synthetic", "synthetic", "synthetic routing", key, model, quick_requests=12)
    # how well made-up routing is predicted says nothing about a model: fitted, not measured
    # the sweeps alone look further than one layer ahead
    swept = dataset == "lmsys" and model == (options.models or PAPER_MODELS)[0]
    source = replace(source, layers=preset(model).L, ahead=DISTANCES if swept else (1,))
    source = _with_predictor(options, source, evaluate=False)
    if model == "llama-4-scout" and options.cluster == "a6000x8":
        # in 16 bits, one extra copy per GPU and layer beside the KV cache is more than 48 GB
        return replace(source, title="llama-4-scout (h100x8)", cluster="h100x8")
    return source


#: The paper's three models.
PAPER_MODELS = ("mixtral-8x7b", "phi-3.5-moe", "llama-4-scout")
#: The paper's two prompt sets, and how their stand-ins are called.
DATASETS = ("lmsys", "sharegpt")


def at_hand(options: Options, defaults: Sequence[Source]) -> list[Source]:
    """The reader's traces; with ``beside`` also the defaults, but no stand-in for a model whose real trace is there."""
    mine = given(options)
    if mine and not options.beside:
        return mine
    real = {source.model for source in mine}
    return [*mine, *(source for source in defaults if source.model not in real)]


def routing_sources(options: Options) -> list[Source]:
    """What the routing figures show: the reader's traces, or the bundled model and the paper's models of the figure."""
    models = options.models or ("mixtral-8x7b", "phi-3.5-moe")
    shown = [synthetic(options, name, "lmsys" if name.startswith("phi") else "sharegpt") for name in models]
    return at_hand(options, [bundled(options), *shown])


def serving_sources(options: Options, dataset: str) -> list[Source]:
    """What the serving figures run on: the reader's traces, or everything at hand for that data set."""
    return at_hand(options, [synthetic(options, name, dataset) for name in options.models or PAPER_MODELS])


def sweep_sources(options: Options) -> list[Source]:
    """What the sweeps run on: one synthetic model, and the bundled one, whose gate inputs allow real prediction."""
    first = (options.models or PAPER_MODELS)[0]
    return at_hand(options, [bundled(options), synthetic(options, first, "lmsys")])


def input_sources(options: Options) -> list[Source]:
    """What the figures about gate inputs show: the reader's traces that hold them, or the bundled model."""
    mine = [source for source in given(options) if source.inputs]
    return mine if options.traces and not options.beside else [*mine, bundled(options)]


def common_kind(sources: Sequence[Source]) -> Kind:
    """The weakest evidence among the sources: one synthetic one makes the figure synthetic."""
    return "synthetic" if any(source.kind == "synthetic" for source in sources) else sources[0].kind


def common_label(sources: Sequence[Source]) -> str:
    """The labels of a figure that shows all of them."""
    return ", ".join(dict.fromkeys(source.label for source in sources if source.label))

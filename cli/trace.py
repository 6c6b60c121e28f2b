"""``moeless trace``: record the expert routing of a model on prompts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from moeless.cli import common
from moeless.errors import UserError


@common.command()
def command(
    model: Annotated[
        str, typer.Argument(help="Model folder or hub id of a Mixture-of-Experts model; `bundled` is the small one.")
    ] = "bundled",
    prompts: Annotated[
        str, typer.Argument(help="Prompt file (.jsonl, .json, .csv, .txt, .parquet), hub data set, or `bundled`.")
    ] = "bundled",
    out: common.ArtefactOption = Path("trace"),
    max_requests: Annotated[int | None, typer.Option("--max-requests", min=1, help="Prompts, drawn by seed.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens generated per request.")] = 64,
    max_prompt_tokens: Annotated[
        int | None, typer.Option("--max-prompt-tokens", min=1, help="Cut longer prompts; default: the model's context.")
    ] = None,
    lengths_from: Annotated[
        Path | None,
        typer.Option("--lengths-from", metavar="FILE", help="Force output lengths to those of an arrival trace."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Requests generated together.")] = 8,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0, max=1, help="Nucleus of sampling.")] = 1.0,
    router_inputs: Annotated[
        bool, typer.Option("--router-inputs", help="Also keep what every gate sees (large; trains predictors).")
    ] = False,
    chat_template: Annotated[
        bool, typer.Option("--chat-template/--no-chat-template", help="Wrap prompts where the tokenizer can.")
    ] = True,
    column: Annotated[str | None, typer.Option("--column", help="Prompt column of the source.")] = None,
    category_column: Annotated[str | None, typer.Option("--category-column", help="Category column.")] = None,
    subset: Annotated[str | None, typer.Option("--subset", help="Configuration of a hub data set.")] = None,
    split: Annotated[str | None, typer.Option("--split", help="Split of a hub data set.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N.")] = "auto",
    device_map: Annotated[
        str | None, typer.Option("--device-map", help="Spread a large model over devices: auto, balanced ...")
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Revision of a hub model.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
    wandb: common.KeptRunOption = None,
    quick: common.QuickOption = False,
    seed: common.SeedOption = 0,
    dry_run: common.DryRunOption = False,
) -> common.Report:
    """Record which experts every token of real generation goes to. The same command again finishes a broken one.

    Example: moeless trace bundled bundled --max-requests 64 --max-new-tokens 64 --out traces/bundled
    """
    from moeless.files import check_writable
    from moeless.traces.generation import Sampling
    from moeless.traces.hf_model import LoadOptions, load_model
    from moeless.traces.recorder import RecordSettings, record
    from moeless.traces.store import check_new_or_unfinished
    from moeless.workloads import prompts as prompt_sets

    if quick:
        max_requests, max_new_tokens = min(max_requests or 16, 16), min(max_new_tokens, 16)
    check_writable(out)
    check_new_or_unfinished(out)
    loaded_prompts = prompt_sets.load(
        prompts,
        column=column,
        category_column=category_column,
        subset=subset,
        split=split,
        max_requests=max_requests,
        seed=seed,
    )
    settings = RecordSettings(
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        sampling=Sampling(temperature, top_p, seed),
        lengths=None if lengths_from is None else _lengths(lengths_from, len(loaded_prompts)),
        max_prompt_tokens=max_prompt_tokens,
        router_inputs="bfloat16" if router_inputs else None,
        chat_template=chat_template,
    )
    folder = str(_bundled_model()) if model == "bundled" else model
    options = LoadOptions(revision, dtype, device, device_map, trust_remote_code)
    if dry_run:
        _plan(folder, model, options, settings, [len(prompt.text) for prompt in loaded_prompts], out)
    loaded = load_model(folder, options, name=model if model == "bundled" else None)
    resolved = {"model": model, "prompts": prompts, "out": str(out), "load": dataclasses.asdict(options)}
    resolved |= {"record": dataclasses.asdict(settings)}
    inputs = [path for path in (Path(prompts), lengths_from) if path is not None and path.is_file()]
    with common.artefact_run("trace", loaded.name, resolved, seed, inputs, wandb) as run, common.progress() as bar:
        task = bar.add_task(f"recording {loaded.name}", total=len(loaded_prompts))

        def on_batch(done: int, total: int, rows: int) -> None:
            bar.update(task, completed=done, total=total)
            if run is not None:
                run.log({"requests": done, "rows": rows})

        info = record(
            loaded,
            loaded_prompts,
            out,
            settings,
            prompt_source={"source": prompts if prompts == "bundled" else Path(prompts).name, "column": column},
            on_batch=on_batch,
        )
        if run is not None:
            run.log(info.counts)
            run.produced(out, "trace")
    facts: dict[str, Any] = {
        "trace": str(out),
        "model": info.spec.name,
        "MoE layers": info.spec.L,
        "experts": info.spec.E,
        "top-k": info.spec.K,
        **info.counts,
    }
    notes = [f"note: {note}" for note in info.notes]
    return common.Report({**facts, "notes": list(info.notes)}, [common.facts("Recorded trace", facts), *notes])


def _bundled_model() -> Path:
    import moeless

    folder = Path(moeless.__file__).parent / "assets" / "model"
    if not (folder / "config.json").exists():
        raise UserError("this installation holds no bundled model; give a model folder or hub id")
    return folder


def _lengths(path: Path, requests: int) -> list[int]:
    from moeless.workloads.arrivals import read_arrivals

    series = read_arrivals(path)
    if series.output_N is None:
        raise UserError(f"--lengths-from: {path} holds arrival times only, no output lengths")
    if len(series) < requests:
        raise UserError(
            f"--lengths-from: {path} holds {len(series)} requests, {requests} are to be recorded; "
            f"add --max-requests {len(series)}"
        )
    return [int(length) for length in series.output_N[:requests]]


def _plan(folder: str, model: str, options: Any, settings: Any, characters: list[int], out: Path) -> None:
    from moeless.spec import PRESETS
    from moeless.traces.hf_model import load_config
    from moeless.traces.hf_spec import spec_of_config
    from moeless.traces.plan import recording_plan

    spec = PRESETS["bundled"] if model == "bundled" else spec_of_config(load_config(folder, options), model)
    new_tokens = settings.max_new_tokens
    if settings.lengths is not None:
        new_tokens = sum(settings.lengths) / len(settings.lengths)
    common.dry_run(
        {
            "model": model,
            "out": str(out),
            "load": dataclasses.asdict(options),
            "record": dataclasses.asdict(settings),
            "spec": spec.to_json(),
        },
        recording_plan(
            spec,
            requests=len(characters),
            # English text has about four characters a token
            prompt_tokens=sum(characters) / len(characters) / 4,
            new_tokens=new_tokens,
            batch_size=settings.batch_size,
            router_inputs=settings.router_inputs is not None,
        ),
    )

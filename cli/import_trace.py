"""``moeless import-trace``: routing recorded by another system becomes a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moeless.cli import common
from moeless.errors import UserError


@common.command()
def command(
    file: Annotated[Path, typer.Argument(help="File or folder that the other system wrote.")],
    out: common.ArtefactOption,
    source: Annotated[
        str,
        typer.Option("--from", metavar="FORMAT", help="npz, parquet, csv, sglang, megatron, tensorrt-llm, histogram."),
    ],
    model: Annotated[
        str | None, typer.Option("--model", help="Preset, spec in JSON, or model folder whose shapes these are.")
    ] = None,
    layers: Annotated[int | None, typer.Option("--layers", min=1, help="MoE layers, without --model.")] = None,
    experts: Annotated[int | None, typer.Option("--experts", min=1, help="Experts per layer, without --model.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", min=1, help="Experts per token, without --model.")] = None,
    hidden_size: Annotated[int, typer.Option("--hidden-size", min=1, help="With --layers: width of a token.")] = 4096,
    expert_size: Annotated[int, typer.Option("--expert-size", min=1, help="With --layers: width of an expert.")] = 4096,
    wandb: common.KeptRunOption = None,
    dry_run: common.DryRunOption = False,
) -> common.Report:
    """Read routing recorded by another system into a trace folder.

    Example: moeless import-trace --from npz gpt-oss-20b.npz --model gpt-oss-20b --out traces/gpt-oss-20b
    """
    from moeless.files import check_writable
    from moeless.traces.importers import IMPORTERS
    from moeless.traces.specs import resolve_spec, spec_from_numbers

    importer = IMPORTERS.get(source)
    numbers = (layers, experts, top_k)
    if model is not None and any(number is not None for number in numbers):
        raise UserError("give either --model or --layers, --experts and --top-k, not both")
    if model is not None:
        spec = resolve_spec(model)
    elif layers is None or experts is None or top_k is None:
        raise UserError("the model's shapes are needed: give --model NAME, or --layers, --experts and --top-k")
    else:
        spec = spec_from_numbers(
            layers=layers, experts=experts, top_k=top_k, hidden_size=hidden_size, expert_size=expert_size
        )
    check_writable(out)
    if dry_run:
        if not file.exists():
            raise UserError(f"{file} does not exist")
        size = file.stat().st_size if file.is_file() else sum(part.stat().st_size for part in file.iterdir())
        common.dry_run(
            {"file": str(file), "from": source, "model": spec.to_json(), "out": str(out)},
            {"input_bytes": size},
        )
    settings = {"from": source, "model": spec.to_json(), "out": str(out)}
    # a missing file is the importer's to name
    inputs = [file] if file.exists() else []
    with common.artefact_run("import-trace", spec.name, settings, None, inputs, wandb) as run:
        info = importer(file, out, spec)
        if run is not None:
            run.log(info.counts)
            run.produced(out, "trace")
    counts: dict[str, Any] = {"trace": str(out), "kind": info.kind, "model": info.spec.name, **info.counts}
    notes = [f"note: {note}" for note in info.notes]
    return common.Report({**counts, "notes": list(info.notes)}, [common.facts("Imported trace", counts), *notes])

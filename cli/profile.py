"""``moeless profile``: measure a model's parts on this hardware."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from moeless.cli import common
from moeless.errors import UserError


@common.command()
def command(
    model: Annotated[str, typer.Option("--model", metavar="PRESET", help="Model preset whose shapes are timed.")],
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="cpu, cuda or cuda:N.")] = "cpu",
    ranks: Annotated[int, typer.Option("--ranks", min=1, help="Time all-to-alls among up to this many ranks.")] = 1,
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads of one rank.")] = 1,
    dtype: Annotated[
        list[str] | None, typer.Option("--dtype", metavar="TYPE", help="Type of the experts; repeatable.")
    ] = None,
    links: Annotated[
        str | None, typer.Option("--links", metavar="NAME", help="Link model where no ranks are timed, as h100-dgx.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Measure although the device is busy.")] = False,
    out: common.ArtefactOption = Path("profile.json"),
    quick: common.QuickOption = False,
    dry: common.DryRunOption = False,
) -> common.Report:
    """Measure experts, attention, copies and exchanges, for the `measured` cost model.

    Example: moeless profile --model bundled --device cpu --ranks 2 --out cpu.json
    """
    from moeless.costs.exchange import link_tables
    from moeless.files import check_writable, write_json
    from moeless.profiling.run import ProfileOptions, make_plan, profile_model
    from moeless.profiling.summary import summarise
    from moeless.spec import preset

    spec = preset(model)
    if links is not None and links not in link_tables():
        raise UserError(f"--links: no link model is called {links!r}; there are: {', '.join(sorted(link_tables()))}")
    if out.is_dir():
        raise UserError(f"--out: {out} is a folder; name the profile's file")
    check_writable(out)
    options = ProfileOptions(ranks, tuple(dtype) if dtype else None, threads, links, quick, force)
    plan = make_plan(spec, device, options)
    if dry:
        common.dry_run({"model": model, "out": str(out)} | dataclasses.asdict(options), plan.to_json())
    out.parent.mkdir(parents=True, exist_ok=True)
    with common.progress() as bar:
        task = bar.add_task("profile", total=None)
        document = profile_model(spec, plan, options, out.parent, lambda text: bar.update(task, description=text))
    write_json(out, document)
    summary = summarise(document)
    title = f"{model} on {document['machine']['name']} -> {out}"
    rows = [[name, value] for name, value in summary.items()]
    return common.Report({"out": str(out)} | summary, [common.table(title, ["figure", "value"], rows)])

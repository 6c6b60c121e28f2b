"""The live half of ``moeless serve-bench``: its options as a configuration of the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moeless.cli import common
from moeless.engine.options import LiveConfig
from moeless.errors import UserError

if TYPE_CHECKING:
    from moeless.metrics import Cell
    from moeless.tracking.run import Run


def verification_table(cells: Sequence[Cell]) -> None:
    """What was verified, and what the prompts' perplexity was under each policy; nothing where nothing was measured."""
    rows = []
    for cell in cells:
        if cell.evidence != "measured":
            continue
        entry = cell.settings.get("verification") or {}
        copies = cell.settings["copies"]
        verdict = ("yes" if entry["passed"] else "NO") if entry else "not asked"
        rows.append(
            [
                cell.policy + (" (lossy)" if cell.lossy else ""),
                "lossy by design" if cell.lossy else verdict,
                f"{entry['identical']:,} / {entry['tokens']:,}" if entry else None,
                f"{entry['near_ties']}" if entry else None,
                f"{entry['max_difference']:.1e}" if entry else None,
                cell.settings["prompt_perplexity"],
                f"{cell.layer.parts_ms['expert']:.3f}",
                f"{cell.layer.parts_ms['control']:.3f}",
                f"{copies['loads']:,} ({copies['peer_loads']:,})",
                f"{cell.layer.moved_bytes / 1e6:,.1f}",
            ]
        )
    if not rows:
        return
    columns = ["policy", "verified", "identical tokens", "near ties", "max logit diff", "prompt perplexity"]
    columns += ["expert ms", "control ms", "copies made (from peers)", "moved MB"]
    common.show(common.table("Outputs against the unmodified model, and copies", columns, rows))


def prediction_table(cells: Sequence[Cell]) -> None:
    """The simulator's figures for the same requests, routing and policies, beside what was measured."""
    live = [cell for cell in cells if cell.evidence == "measured"]
    simulated = [cell for cell in cells if cell.evidence != "measured"]
    if len(live) != len(simulated):
        return
    rows = []
    for real, said in zip(live, simulated, strict=True):
        pairs = [(real.layer.parts_ms[name], said.layer.parts_ms[name]) for name in ("expert", "all_to_all", "control")]
        rows.append(
            [
                real.policy,
                *(f"{1e3 * measured:.0f} / {1e3 * predicted:.0f}" for measured, predicted in pairs),
                f"{1e3 * real.layer.mean_ms:.0f} / {1e3 * said.layer.mean_ms:.0f}",
                " / ".join(
                    f"{cell.layer.mean_ms / first.layer.mean_ms:.2f}"
                    for cell, first in ((real, live[0]), (said, simulated[0]))
                ),
                f"{real.layer.imbalance:.2f} / {said.layer.imbalance:.2f}",
                f"{real.layer.replicas:.1f} / {said.layer.replicas:.1f}",
            ]
        )
    columns = ["policy", "expert µs", "exchange µs", "control µs", "layer µs", "vs first", "imbalance", "replicas"]
    title = f"Measured / simulated with {simulated[0].costs} costs, same requests and routing"
    common.show(common.table(title, columns, rows))


def _configured(given: Mapping[str, Any], quick: bool) -> LiveConfig:
    if max(len(given["cluster"] or []), len(given["request_rate"] or [])) > 1:
        raise UserError("a live run has one cluster and one request rate; sweeps belong to --backend sim")
    if len(given["costs"] or []) > 1:
        raise UserError("a live run plans by one cost model; give --costs once")
    limit = given["max_requests"] or LiveConfig.max_requests
    return LiveConfig.given(
        given,
        model=None if given["model"] == "bundled" else given["model"],
        max_requests=min(limit, 8) if quick else limit,
        **{name: (given[name] or [None])[0] for name in ("cluster", "request_rate", "costs")},
    )


def serve_live(
    given: Mapping[str, Any], quick: bool, out: Path | None, wandb: bool | None, dry_run: bool
) -> tuple[list[Cell], Run]:
    """Check, launch, serve, verify; the cells and their run.

    Raises:
        UserError, RunFailed: as the engine does.
    """
    from moeless.engine.bench import LiveBench, check_verified
    from moeless.metrics import Result
    from moeless.metrics.catalogue import logged
    from moeless.tracking.run import start_run

    config = _configured(given, quick)
    bench = LiveBench(config)
    if bench.place is not None and out is None:
        raise UserError("under torchrun a live run needs --out, a folder that all its machines see")
    first_here = bench.place is None or bench.place.local_rank == 0
    for remark in bench.remarks if first_here else ():
        common.remarks.print(f"! {remark}", highlight=False)
    if bench.place is not None and out is not None and bench.place.rank > 0 and not dry_run:
        bench.serve_rank(out)
        raise typer.Exit(0)
    resolved = config.to_json()
    if dry_run:
        common.dry_run(resolved, bench.estimate())
    inputs = [bench.model / name for name in ("config.json", "model.safetensors") if (bench.model / name).is_file()]
    inputs += list(config.predictors)
    with start_run("serve-bench", f"live-{bench.spec.name}", resolved, config.seed, inputs, out, wandb) as record:
        common.remarks.print(f"{config.ranks} {bench.device} ranks, {config.host} host, {len(bench.requests)} requests")
        for remark in bench.remarks:
            record.warn(remark)
        cells = bench.run(record.path)
        for cell in cells:
            record.log(logged(cell))
            for warning in cell.warnings:
                record.warn(f"{cell.policy} ({cell.evidence}): {warning}")
        record.write_result(Result(str(record.manifest["command_line"]), tuple(cells)))
        check_verified(cells)
    return cells, record

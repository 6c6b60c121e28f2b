"""Options of live runs: which requests, how ranks serve them, on what."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from moeless.cluster import Hardware
from moeless.configuration import Component, Seeded, option, options
from moeless.errors import UserError
from moeless.metrics.options import Measuring
from moeless.policy.options import Policies
from moeless.workloads.options import Arrivals, Batching

#: Where copies come from: the cheapest under the cost model, another rank wherever one holds it, or host memory only.
CopySource = Literal["auto", "peer", "host"]


class Live(Component, group="Live"):
    """What only a live run has."""


@dataclass(frozen=True, kw_only=True)
class PromptOptions(Live):
    """What is asked. An answer has as many tokens as its arrival says, at most so many; end-of-text does not end it."""

    prompts: str | None = option(None, "--prompts", "Prompt file, folder or hub id; default: the bundled ones.")
    prompt_tokens: int = option(256, "--max-prompt", "Prompt tokens at most; longer prompts are cut.", minimum=1)
    output_tokens: int = option(32, "--max-output", "Output tokens at most.", minimum=1)


@dataclass(frozen=True, kw_only=True)
class LiveWorkload(PromptOptions, Arrivals):
    """Which requests a live run serves."""

    max_requests: int = 50


@dataclass(frozen=True, kw_only=True)
class ServingOptions(Live, Batching, Policies, Seeded):
    """Options that go from the command line to every rank as they are.

    ``spare_slots`` are places per layer and rank beyond the budget of ``extra_slots``, which keep-alive uses.
    """

    host: str = option("transformers", "--host", "Who lends the rest of the model: megatron or transformers.")
    ranks: int = option(2, "--ranks", "Expert-parallel ranks.", minimum=1)
    copy_from: CopySource = option(
        "auto", "--copy-from", "Copies from other ranks (peer) or host memory; auto takes the cheaper."
    )
    skip_below_tokens: int = option(
        0, "--skip-below", "Iterations of fewer tokens use primaries only, unplanned.", minimum=0
    )
    temperature: float = option(0.0, "--temperature", "0 is greedy.", minimum=0.0)
    top_p: float = option(1.0, "--top-p", "Probability to sample among.")
    verify: bool = option(False, "--verify", "Compare outputs with the unmodified model.")
    spare_slots: int = 1
    keep_alive: str = "10"
    replan_seconds: float = 2.0

    def __post_init__(self) -> None:
        from moeless.serverless import KeepAlive

        super().__post_init__()
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p must lie in (0, 1], got {self.top_p}")
        KeepAlive.parse(self.keep_alive)


@dataclass(frozen=True, kw_only=True)
class LiveConfig(ServingOptions, LiveWorkload, Measuring, Hardware):
    """What ``serve-bench --backend live`` runs; every field goes into the manifest.

    Under torchrun already, this process is a rank of it. ``cluster`` is the one whose links and rates planners assume:
    ``cpu2`` or ``cpu8`` on CPUs, ``h100x8`` on GPUs.
    """

    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "--device", "cpu (gloo) or cuda (NCCL); auto takes GPUs where there are enough."
    )
    launcher: Literal["auto", "fork", "torchrun"] = option(
        "auto", "--launcher", "How ranks start; auto forks on CPUs, torchrun on GPUs."
    )
    dtype: str | None = option(
        None, "--dtype", "float32, bfloat16 or float16; default: float32 on CPUs, the checkpoint's own on GPUs."
    )
    record: bool = option(False, "--record", "Write the first policy's routing as a trace.")
    predict: bool = option(True, "--predict/--no-predict", "The simulator's figures for the same run beside.")
    costs: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The configuration as the manifest keeps it."""
        values = dataclasses.asdict(self) | {"model": str(self.model or "bundled"), "workload": {}}
        for name, known in options(LiveWorkload).items():
            values["workload"][known.live_key or name] = values[name] if name == "seed" else values.pop(name)
        return values

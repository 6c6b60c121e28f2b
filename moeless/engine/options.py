"""How ranks serve: what a configuration and the job that is made from it have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeless.engine.moves import COPY_SOURCES, CopySource
from moeless.errors import UserError
from moeless.serverless import KeepAlive


@dataclass(frozen=True, kw_only=True)
class ServingOptions:
    """Options that go from the command line to every rank as they are.

    Attributes:
        host: who lends the rest of the model, a name of ``moeless.engine.hosts.HOSTS``.
        batching: a scheduler's name; ``token_budget`` and ``max_running`` are continuous batching's.
        extra_slots: places per layer and rank beyond the static ones; ``spare_slots``: those beyond that budget, which
            keep-alive uses.
        keep_alive: ``SECONDS``, ``lru`` or ``adaptive[:SECONDS]``; see :class:`moeless.serverless.KeepAlive`.
        copy_from: where copies come from, one of ``moeless.engine.moves.COPY_SOURCES``.
        replan_seconds: between the plans of a planner that plans by the clock.
        skip_below_tokens: smaller iterations use primaries only, unplanned.
        plan_every: iterations between the plans of a planner that plans per iteration.
        predictors: folders of trained predictors.
        planner_params: parameters other than the defaults, by planner.
        temperature, top_p: of sampling; temperature 0 is greedy.
        verify: keep the generated tokens' logits, score the prompts, and compare with the unmodified model.

    Raises:
        UserError: a value out of its range.
    """

    host: str = "transformers"
    ranks: int = 2
    batching: str = "continuous"
    token_budget: int = 2048
    max_running: int = 64
    extra_slots: int = 1
    spare_slots: int = 1
    keep_alive: str = "10"
    copy_from: CopySource = "auto"
    replan_seconds: float = 2.0
    skip_below_tokens: int = 0
    plan_every: int = 1
    predictors: tuple[Path, ...] = ()
    planner_params: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    temperature: float = 0.0
    top_p: float = 1.0
    verify: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise UserError(f"--ranks must be at least 1, got {self.ranks}")
        if self.plan_every < 1:
            raise UserError(f"--plan-every must be at least 1, got {self.plan_every}")
        if not self.temperature >= 0:
            raise UserError(f"--temperature must be at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p must lie in (0, 1], got {self.top_p}")
        if self.copy_from not in COPY_SOURCES:
            raise UserError(f"--copy-from {self.copy_from!r} is none of {', '.join(COPY_SOURCES)}")
        KeepAlive.parse(self.keep_alive)

    @property
    def batching_options(self) -> dict[str, Any]:
        """What the scheduler takes."""
        if self.batching != "continuous":
            return {}
        return {"token_budget": self.token_budget, "max_running": self.max_running}

    def shared_options(self) -> dict[str, Any]:
        """These options of a class that has more, by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(ServingOptions)}

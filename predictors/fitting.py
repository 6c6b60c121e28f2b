"""Fitting a predictor by name on a trace's training requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from moeless.errors import UserError
from moeless.predictors import PREDICTORS
from moeless.predictors.base import LoadPredictor
from moeless.predictors.checkpoints import Checkpoint, Checkpoints
from moeless.predictors.data import Rows, Sample
from moeless.predictors.gates import Gates
from moeless.predictors.metrics import relative_l1
from moeless.predictors.split import Split
from moeless.predictors.token_level import TokenLevel
from moeless.predictors.token_loads import TokenLoads
from moeless.predictors.variance import Variance, fit_variance
from moeless.predictors.windows import available_phases, windows_of

#: (what, epoch or step, values by name), for progress and curves.
Report = Callable[[str, int, Mapping[str, float]], None]


@dataclass(frozen=True)
class FitSettings:
    """What all fitted methods share.

    Attributes:
        distances: the distances to fit.
        max_tokens: tokens of training requests that are used; 50,000 cover every expert of the supported models
            hundreds of times.
        options: a method's own parameters, by name.
    """

    distances: tuple[int, ...] = (1,)
    max_tokens: int = 50_000
    seed: int = 0
    device: str = "cpu"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.distances or min(self.distances) < 1 or len(set(self.distances)) != len(self.distances):
            raise UserError("distances must be different whole numbers of at least 1")
        if self.max_tokens < 1:
            raise UserError("fitting needs at least 1 token")


@dataclass(frozen=True)
class FitInput:
    """What a method's fit function gets."""

    rows: Rows
    split: Split
    settings: FitSettings
    gates: Gates | None
    report: Report
    checkpoints: Checkpoints | None = None

    def checkpoint(self, stage: str) -> Checkpoint | None:
        """Where a stage of the fit keeps its state, None where it cannot be taken up again."""
        return None if self.checkpoints is None else self.checkpoints.stage(stage)

    def calibration(self, reads: Any) -> Sample:
        """Validation requests that variances and mixtures are chosen on: all of them, up to ``CALIBRATION_LIMIT``.

        A quarter of the training tokens is enough to stop early by, since tokens are many; how far whole iterations
        stray is known from requests alone, which are few.
        """
        return Sample(self.rows, self.split.validation, reads, CALIBRATION_LIMIT, self.settings.seed)

    def sample(self, reads: Any, *, validation: bool = False, share: float = 1.0) -> Sample:
        """The training or the validation sample, or a share of it."""
        requests = self.split.validation if validation else self.split.fit
        limit = self.settings.max_tokens // 4 if validation else self.settings.max_tokens
        if share < 1.0:
            limit = int(share * min(limit, int(self.rows.rows_N[requests].sum())))
        return Sample(self.rows, requests, reads, max(1, limit), self.settings.seed)

    def options(self, kind: type[Any]) -> Any:
        """The method's parameters, checked against their dataclass.

        Raises:
            UserError: a name is unknown or a value is refused.
        """
        import dataclasses

        names = {entry.name: entry for entry in dataclasses.fields(kind)}
        unknown = sorted(set(self.settings.options) - set(names))
        if unknown:
            raise UserError(f"the method has no parameter {unknown[0]!r}; there are: {', '.join(sorted(names))}")
        return kind(**self.settings.options)


def fit(
    name: str,
    rows: Rows,
    split: Split,
    settings: FitSettings,
    *,
    gates: Gates | None = None,
    report: Report | None = None,
    checkpoints: Checkpoints | None = None,
) -> tuple[LoadPredictor, float]:
    """Fit a method; returns the predictor and the seconds that it took, those before a resumption apart.

    Raises:
        UserError: no such method, an option is unknown, or the trace lacks what the method reads.
    """
    kind = PREDICTORS.get(name)
    spec = rows.spec
    if settings.distances and max(settings.distances) >= spec.L:
        raise UserError(f"distance {max(settings.distances)} leaves no layer: {spec.name} has {spec.L} MoE layers")
    started = time.perf_counter()
    maker = getattr(kind, "fit", None)
    if maker is None:
        if settings.options:
            raise UserError(f"predictor {name!r} has no parameters")
        return kind(spec), time.perf_counter() - started
    given = FitInput(rows, split, settings, gates, report or (lambda *_: None), checkpoints)
    predictor: LoadPredictor = maker(given)
    return predictor, time.perf_counter() - started


#: Tokens of validation requests that are forecast to calibrate on.
CALIBRATION_LIMIT = 50_000
#: Sizes of the iterations on which variances are calibrated.
CALIBRATION_TOKENS = (32, 256, 1024)


def calibrate(predictor: TokenLevel, given: FitInput, pairs: Sequence[tuple[int, int]]) -> dict[Any, Variance]:
    """Variance coefficients of each pair, from iterations composed of validation requests."""
    rows = given.rows
    sample = given.calibration(predictor.reads)
    tokens = TokenLoads(predictor, rows, sample.row_T, pairs)
    made = []
    for phase in available_phases(rows):
        for size in CALIBRATION_TOKENS:
            made += windows_of(rows, sample.requests, phase, size, 24, given.settings.seed)
    made = [window for window in made if tokens.has(window.row_T)]
    found = {}
    share_LE = rows.share_LE(given.split.fit)
    for layer, distance in pairs:
        true = [np.bincount(rows.topk_TLK[w.row_T, layer + distance].ravel(), minlength=rows.spec.E) for w in made]
        mean = tokens.sums([w.row_T for w in made], layer, distance)
        load = np.array(true)
        total = load.sum(1, keepdims=True)
        past = relative_l1(share_LE[layer + distance] * total, load).mean()
        skill = 1.0 - float(relative_l1(mean, load).mean() / past) if past > 0 else 0.0
        found[layer, distance] = replace(fit_variance(mean, load), skill=skill)
    return found


def pairs_of(num_layers: int, distances: Sequence[int]) -> list[tuple[int, int]]:
    """Every (layer, distance) whose target exists."""
    return [(layer, d) for d in distances for layer in range(num_layers - d)]

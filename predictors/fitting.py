"""The input of every fit, and the calibration of a fitted predictor's variance.

Axes: I iterations, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from moeless.errors import UserError
from moeless.predictors.base import Reads
from moeless.predictors.checkpoints import Checkpoints
from moeless.predictors.gates import Gates
from moeless.predictors.iterations import available_phases, iterations_of
from moeless.predictors.metrics import relative_l1
from moeless.predictors.request_split import Split
from moeless.predictors.token_level import Pair, TokenLevel
from moeless.predictors.token_loads import TokenLoads
from moeless.predictors.trace_rows import Rows, Sample
from moeless.predictors.variance import fit_variance

#: Called with (stage, epoch or step, values by name) for progress and curves.
Report = Callable[[str, int, Mapping[str, float]], None]
Options = TypeVar("Options")
Method = TypeVar("Method", bound=TokenLevel)

#: Tokens of validation requests that are forecast to calibrate on.
CALIBRATION_LIMIT = 50_000
#: Sizes of the iterations on which variances are calibrated, and how many of each.
CALIBRATION_TOKENS, CALIBRATION_ITERATIONS = (32, 256, 1024), 24


def number(default: float, low: float, high: float = math.inf) -> Any:
    """A field of a method's parameters: its default, whose type is the field's, and its inclusive bounds."""
    return field(default=default, metadata={"bounds": (low, high)})


def parsed(kind: type[Options], options: Mapping[str, Any]) -> Options:
    """A method's parameters as an instance of their dataclass, whose numbers are made by :func:`number`.

    Raises:
        UserError: a name is unknown, or a value is no number within its bounds.
    """
    known = {entry.name: entry for entry in fields(kind)}  # type: ignore[arg-type]
    for name, value in options.items():
        if name not in known:
            raise UserError(f"the method has no parameter {name!r}; there are: {', '.join(sorted(known))}")
        low, high = known[name].metadata.get("bounds", (None, None))
        whole = isinstance(known[name].default, int)
        if low is not None and not (isinstance(value, int if whole else (int, float)) and low <= value <= high):
            bounds = f"between {low:g} and {high:g}" if high < math.inf else f"of at least {low:g}"
            raise UserError(f"parameter {name!r} must be a {'whole ' * whole}number {bounds}, not {value!r}")
    return kind(**options)


@dataclass(frozen=True)
class FitInput:
    """What :meth:`LoadPredictor.fit` gets.

    Attributes:
        split: the requests; a fit uses only those for training.
        distances: the distances to fit.
        max_tokens: training tokens at most; 50,000 reach every expert of the supported models hundreds of times.
        device: where gradient fits run, as torch names it.
        options: the method's own parameters, by name.
        gates: the model's gates, if the method needs them.
        report: called with a stage, its epoch and its curves.
        checkpoints: where stages save their state; None for a fit that cannot be resumed.
    """

    rows: Rows
    split: Split
    distances: tuple[int, ...] = (1,)
    max_tokens: int = 50_000
    seed: int = 0
    device: str = "cpu"
    options: Mapping[str, Any] = field(default_factory=dict)
    gates: Gates | None = None
    report: Report = lambda *_: None
    checkpoints: Checkpoints | None = None

    def __post_init__(self) -> None:
        if not self.distances or min(self.distances) < 1 or len(set(self.distances)) != len(self.distances):
            raise UserError("distances must be different whole numbers of at least 1")
        if self.max_tokens < 1:
            raise UserError("fitting needs at least 1 token")
        spec = self.rows.spec
        if max(self.distances) >= spec.L:
            raise UserError(f"distance {max(self.distances)} leaves no layer: {spec.name} has {spec.L} MoE layers")

    def calibration(self, reads: Reads) -> Sample:
        """The sample for variances and blend weights: all validation requests, up to ``CALIBRATION_LIMIT`` tokens.

        It is larger than the validation sample for early stopping, because errors of whole iterations vary from request
        to request, and requests are few.
        """
        return Sample(self.rows, self.split.validation, reads, CALIBRATION_LIMIT, self.seed)

    def sample(
        self, reads: Reads, *, validation: bool = False, share: float = 1.0, kind: type[Sample] = Sample
    ) -> Sample:
        """The training sample or a share of it, or the validation sample, a quarter as large."""
        requests = self.split.validation if validation else self.split.fit
        limit = min(self.max_tokens // 4 if validation else self.max_tokens, int(self.rows.rows_N[requests].sum()))
        return kind(self.rows, requests, reads, max(1, int(share * limit)), self.seed)


def calibrated(predictor: Method, given: FitInput) -> Method:
    """The predictor, its variance and skill set for each pair from iterations composed of validation requests."""
    rows, sample = given.rows, given.calibration(predictor.reads)
    pairs = pairs_of(rows.spec.L, given.distances)
    tokens = TokenLoads(predictor, rows, sample.row_T, pairs)
    iterations = [
        iteration.row_T
        for phase in available_phases(rows)
        for size in CALIBRATION_TOKENS
        for iteration in iterations_of(rows, sample.requests, phase, size, CALIBRATION_ITERATIONS, given.seed)
        if tokens.has(iteration.row_T)
    ]
    share_LE = rows.share_LE(given.split.fit)
    for layer, distance in pairs:
        load_IE = rows.load_IE(iterations, layer + distance)
        mean_IE = tokens.sums(iterations, layer, distance)
        past = relative_l1(share_LE[layer + distance] * load_IE.sum(1, keepdims=True), load_IE).mean()
        skill = 1.0 - float(relative_l1(mean_IE, load_IE).mean() / past) if past > 0 else 0.0
        predictor.variance[layer, distance] = replace(fit_variance(mean_IE, load_IE), skill=skill)
    return predictor


def pairs_of(num_layers: int, distances: Sequence[int]) -> list[Pair]:
    """All (layer, distance) whose target layer exists."""
    return [(layer, d) for d in distances for layer in range(num_layers - d)]

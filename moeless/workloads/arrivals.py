"""Arrivals from one short specification: a generator with its parameters, or a request trace's file."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from moeless.contracts import Request
from moeless.errors import UserError
from moeless.workloads.arrival_files import read_arrivals
from moeless.workloads.arrival_processes import constant_gaps, gamma_gaps, generate, on_off, positive
from moeless.workloads.arrival_series import ArrivalSeries
from moeless.workloads.azure_like import load_fitted

#: Names of the generators, each with the form of its parameters.
GENERATORS = {
    "azure-like": "azure-like",
    "poisson": "poisson:RATE",
    "gamma": "gamma:RATE:SHAPE",
    "constant": "constant:RATE",
    "on-off": "on-off:RATE:ON:OFF",
}

__all__ = ["GENERATORS", "ArrivalSeries", "load", "parse_window", "read_arrivals", "to_requests"]


def load(
    spec: str | Path,
    *,
    num_requests: int | None = None,
    duration: float | None = None,
    window: tuple[float, float] | None = None,
    time_scale: float = 1.0,
    request_rate: float | None = None,
    burstiness: float | None = None,
    seed: int = 0,
) -> ArrivalSeries:
    """Arrivals as specified.

    Args:
        spec: ``azure-like`` (rate, bursts and lengths of the Azure 2023 conversation trace), ``poisson:RATE``,
            ``gamma:RATE:SHAPE`` (shape below 1 is burstier than Poisson), ``constant:RATE``,
            ``on-off:RATE:ON:OFF`` (seconds; the rate is the mean over both), or a request trace's file.
        num_requests: at most so many; for a generator, exactly so many unless ``duration`` ends it.
        duration: seconds that are generated, or kept of a file, on the clock of what is served.
        window: seconds [start, stop) of a file that are kept, before anything else, on the file's own clock.
        time_scale: factor on all times: 0.5 serves the same pattern at twice the rate.
        request_rate: mean requests per second; of a generator it replaces RATE, otherwise times are rescaled.
        burstiness: gamma shape of ``poisson`` and ``gamma`` gaps, as in vLLM's serving benchmark.
        seed: of the generator.

    Raises:
        UserError: the specification, a parameter or the file is wrong.
    """
    name, *rest = str(spec).split(":")
    positive(time_scale, "the factor on arrival times")
    if time_scale != 1.0 and request_rate is not None:
        raise UserError("a factor on arrival times and a request rate both set the rate; give one of them")
    if name in GENERATORS:
        if window is not None:
            raise UserError(f"a window applies to a request trace's file, not to {name}; give a duration")
        generated = None if duration is None else duration / time_scale
        series = _generate(name, rest, str(spec), num_requests, generated, request_rate, burstiness, seed)
        return series if time_scale == 1.0 else series.scaled(time_scale)
    if burstiness is not None:
        raise UserError(f"burstiness shapes poisson and gamma arrivals, not the file {spec}")
    path = Path(str(spec)).expanduser()
    if not path.exists():
        forms = ", ".join(GENERATORS.values())
        raise UserError(f"arrivals {str(spec)!r} are neither an existing file nor one of {forms}")
    series = read_arrivals(path)
    if window is not None:
        series = series.window(*window)
    if time_scale != 1.0:
        series = series.scaled(time_scale)
    # the rate is that of the requests that are kept
    if num_requests is not None:
        series = series.head(num_requests)
    if request_rate is not None:
        series = series.at_rate(request_rate)
    return series if duration is None else series.window(0.0, duration)


def parse_window(text: str) -> tuple[float, float]:
    """Read ``START:STOP``, seconds of a request trace's file.

    Raises:
        UserError: the text has another form, or does not name a window.
    """
    start, _, stop = text.partition(":")
    try:
        window = (float(start), float(stop))
    except ValueError:
        raise UserError(f"a window of arrivals is given as START:STOP in seconds, got {text!r}") from None
    if not 0 <= window[0] < window[1] < math.inf:
        raise UserError(f"a window of arrivals needs 0 <= START < STOP, got {text!r}")
    return window


def _generate(
    name: str,
    rest: list[str],
    spec: str,
    count: int | None,
    duration: float | None,
    request_rate: float | None,
    burstiness: float | None,
    seed: int,
) -> ArrivalSeries:
    numbers = _numbers(rest, spec, name)
    wanted = GENERATORS[name].count(":")
    # the rate may come from its own option
    if len(numbers) == wanted - 1 and request_rate is not None:
        numbers = [request_rate, *numbers]
    if name == "gamma" and len(numbers) == 1 and burstiness is not None:
        numbers.append(burstiness)
    if len(numbers) != wanted:
        raise UserError(f"arrivals {spec!r} are not of the form {GENERATORS[name]}")
    if burstiness is not None and name not in ("poisson", "gamma"):
        raise UserError(f"burstiness shapes poisson and gamma arrivals, not {name}")
    rng = np.random.default_rng((seed, 0xA221))
    if name == "azure-like":
        return _azure_like(rng, count, duration, request_rate)
    rate = numbers[0] if request_rate is None else request_rate
    if name == "on-off":
        times = on_off(rate, numbers[1], numbers[2], rng, count, duration)
    elif name == "constant":
        times = generate(constant_gaps(rate), rng, count, duration)
    else:
        shape = burstiness if burstiness is not None else numbers[1] if name == "gamma" else 1.0
        times = generate(gamma_gaps(rate, shape), rng, count, duration)
    return ArrivalSeries(spec, times - times[0] if duration is None else times)


def _numbers(rest: list[str], spec: str, name: str) -> list[float]:
    try:
        return [float(text) for text in rest]
    except ValueError:
        raise UserError(f"arrivals {spec!r} are not of the form {GENERATORS[name]}, with numbers") from None


def _azure_like(
    rng: np.random.Generator, count: int | None, duration: float | None, request_rate: float | None
) -> ArrivalSeries:
    if count is None and duration is None:
        raise UserError("generated arrivals need a number of requests or a duration")
    fitted = load_fitted()
    # another rate is the same pattern played faster or slower
    speed = 1.0 if request_rate is None else request_rate / fitted.rate
    if not (speed > 0 and np.isfinite(speed)):
        raise UserError(f"a request rate must be a positive number per second, got {request_rate}")
    times = fitted.times(rng, count, None if duration is None else duration * speed) / speed
    prompt, output = fitted.lengths(rng, len(times))
    return ArrivalSeries("azure-like", times - times[0] if duration is None else times, prompt, output)


def to_requests(series: ArrivalSeries) -> list[Request]:
    """Requests with the series' own lengths and no routing trace (scheduling studies, synthetic loads).

    Raises:
        UserError: the series has no lengths.
    """
    if series.prompt_N is None or series.output_N is None:
        raise UserError(f"{series.name} has arrival times only; take lengths from a trace")
    columns = zip(series.time_N.tolist(), series.prompt_N.tolist(), series.output_N.tolist(), strict=True)
    return [Request(index, time, prompt, output) for index, (time, prompt, output) in enumerate(columns)]

"""All-to-all times of a profile: measured among ranks, or from a table of links.

Axes: S source ranks, G GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moeless.cluster import Cluster
from moeless.contracts import FloatArray
from moeless.costs import links, roofline
from moeless.costs.layer_time import EVEN_OR_FAST, HOT_OR_SLOW, LINKS, RANKS, STATED
from moeless.costs.profile import Curve, Exchange, HardwareProfile
from moeless.costs.profile_reader import SHIPPED
from moeless.errors import UserError
from moeless.files import read_json


def link_tables() -> Mapping[str, Any]:
    """The shipped link models by name: ``fast`` and ``slow`` tables of bytes and seconds, with their provenance."""
    tables: Mapping[str, Any] = read_json(SHIPPED / "links.json")["links"]
    return tables


class ExchangeTimes:
    """One direction of an exchange on a cluster.

    In order of preference: measured among exactly that many ranks; the profile's link model; measured among another
    number of ranks; the cluster's stated links. Everything but the first is said through ``warn``.
    """

    def __init__(self, profile: HardwareProfile, cluster: Cluster, warn: Callable[[str], None]) -> None:
        self.cluster = cluster
        self._warn = warn
        self.measured: Exchange | None = None
        self.fast: Curve | None = None
        self.slow: Curve | None = None
        if cluster.num_gpus == 1:
            return
        exact = [entry for entry in profile.exchange if entry.ranks == cluster.num_gpus]
        if exact:
            self.measured = exact[0]
        elif profile.links is not None:
            self._read_links(profile.links)
        elif profile.exchange:
            self.measured = min(profile.exchange, key=lambda entry: abs(entry.ranks - cluster.num_gpus))
            warn(f"the exchange among {cluster.num_gpus} ranks is taken from one measured among {self.measured.ranks}")
        else:
            warn(f"no exchange was measured: the stated links of cluster {cluster.name} are taken")

    def _read_links(self, name: str) -> None:
        tables = link_tables()
        if name not in tables:
            raise UserError(f"no link model is called {name!r}; there are: {', '.join(sorted(tables))}")
        entry = tables[name]
        self.fast = Curve(np.array(entry["fast"]["bytes"]), np.array(entry["fast"]["seconds"]))
        self.slow = self.fast
        if self.cluster.num_gpus > self.cluster.island_size:
            if "slow" not in entry:
                raise UserError(f"link model {name!r} knows one island only, cluster {self.cluster.name} has several")
            self.slow = Curve(np.array(entry["slow"]["bytes"]), np.array(entry["slow"]["seconds"]))
        self._warn(f"the exchange is computed from the link model {name}, not measured among ranks")

    @property
    def engine(self) -> Exchange | None:
        """Where the engine's own layer was measured among exactly that many ranks."""
        found = self.measured
        whole = found is not None and found.ranks == self.cluster.num_gpus and found.engine_rest is not None
        return found if whole else None

    def tables(self) -> tuple[int, dict[int, tuple[FloatArray, FloatArray]]]:
        """Which of ``layer_time``'s exchanges this is, and its curves."""
        if self.measured is not None:
            kind, even, hot = RANKS, self.measured.uniform, self.measured.hot
        elif self.fast is not None and self.slow is not None:
            kind, even, hot = LINKS, self.fast, self.slow
        else:
            return STATED, {}
        points = {EVEN_OR_FAST: (even.x, even.seconds), HOT_OR_SLOW: (hot.x, hot.seconds)}
        return kind, points

    def beyond(self, even_or_fast: bool, hot_or_slow: bool) -> list[str]:
        """What to say where more bytes were asked for than a curve was measured with."""
        _, points = self.tables()
        asked = [curve for curve, over in ((EVEN_OR_FAST, even_or_fast), (HOT_OR_SLOW, hot_or_slow)) if over]
        return [
            f"exchanges of more than {points[curve][0][-1] / 2**20:.3g} MiB on a link are extrapolated"
            for curve in asked
        ]

    def pair_seconds(self, num_bytes: float, slow: bool) -> float:
        """Weights from one rank to another."""
        if self.measured is not None:
            return self.measured.hot.at(num_bytes)
        curve = self.slow if slow else self.fast
        if curve is not None:
            return curve.at(num_bytes)
        return links.transfer_seconds(self.cluster, num_bytes, "peer-slow" if slow else "peer")

    def gather_seconds(self) -> float:
        """Gathering a few numbers of each rank: measured, else the link's shortest message, else a constant."""
        if self.measured is not None:
            return self.measured.gather_seconds
        if self.slow is not None:
            return float(self.slow.seconds[0])
        return roofline.GATHER_SECONDS

    def linear(self) -> tuple[float, float]:
        """Seconds per byte and seconds of one direction's latency, a line through the slowest table's ends."""
        if self.cluster.num_gpus == 1:
            return 0.0, 0.0
        curve = self.measured.uniform if self.measured is not None else self.slow
        if curve is None or len(curve.x) < 2:
            link = self.cluster.slow if self.cluster.num_gpus > self.cluster.island_size else self.cluster.fast
            return 1.0 / link.bandwidth, link.latency
        # relative least squares, so that small messages count as much as large ones
        columns = np.stack([curve.x, np.ones_like(curve.x)], axis=1) / curve.seconds[:, None]
        (per_byte, latency), *_ = np.linalg.lstsq(columns, np.ones(len(curve.x)), rcond=None)
        if per_byte <= 0 or latency < 0:
            return float(curve.seconds[-1] / curve.x[-1]), 0.0
        return float(per_byte), float(latency)

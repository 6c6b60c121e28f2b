"""Cluster presets describe islands, nodes and both link tiers."""

from __future__ import annotations

import pytest

from moeless.cluster import Cluster, cluster
from moeless.errors import UserError


@pytest.mark.parametrize(
    ("name", "gpus", "nodes", "island"),
    [("a6000x8", 8, 1, 2), ("h100x8", 8, 1, 8), ("h100x8x4", 32, 4, 8), ("cpu2", 2, 1, 2), ("cpu8", 8, 1, 8)],
)
def test_presets_have_the_shape_that_their_name_says(name: str, gpus: int, nodes: int, island: int) -> None:
    made = cluster(name)
    assert (made.num_gpus, made.num_nodes, made.island_size) == (gpus, nodes, island)
    assert Cluster.from_json(made.to_json()) == made


def test_a_last_node_may_be_part_filled() -> None:
    assert cluster("h100x8").with_gpus(12).num_nodes == 2


def test_the_pairs_of_a_workstation_are_islands() -> None:
    made = cluster("a6000x8")
    assert [made.island_of(g) for g in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("name", ["h100", "h100x0", "h100x9", "a6000x8x2", "tpu", ""])
def test_an_unknown_cluster_names_the_known_ones(name: str) -> None:
    with pytest.raises(UserError, match="h100x8"):
        cluster(name)

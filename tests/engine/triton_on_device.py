"""Triton's kernels against float64 and the engine's own order, on fresh random inputs.

``test_triton_kernels.py`` runs these tests in a process of their own, where the interpreter was chosen before anything
could import Triton: ``TRITON_INTERPRET=1 pytest tests/engine/triton_on_device.py``. On a GPU the kernels are compiled.
"""

import secrets

import numpy as np
import pytest
import torch

from moeless.engine import triton_kernels as kernels
from moeless.engine.core import combine, order_by_replica
from moeless.engine.triton_kernels import place_tables

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_split(seed, tokens, top_k, experts, copies):
    """Top-k ids, replicas of random experts sorted as on GPUs, and quotas that cover each expert's tokens."""
    random = np.random.default_rng(seed)
    topk_TK = np.argsort(random.random((tokens, experts)) ** random.integers(1, 4), 1)[:, :top_k].astype(np.int64)
    expert_R = random.permutation(np.concatenate([np.arange(experts), random.integers(0, experts, copies)]))
    quota_R = np.zeros(len(expert_R), np.int64)
    for expert, count in enumerate(np.bincount(topk_TK.reshape(-1), minlength=experts).tolist()):
        mine = np.flatnonzero(expert_R == expert)
        quota_R[mine] = random.multinomial(count, random.dirichlet(np.ones(len(mine))))
    return topk_TK, expert_R.astype(np.int32), quota_R


def places_by_table(topk_TK, bound_EM, shift_EM):
    """What the kernels do, in plain Python."""
    seen, found = {}, []
    for expert in topk_TK.reshape(-1).tolist():
        number = seen.get(expert, 0)
        seen[expert] = number + 1
        copy = int((number >= bound_EM[expert]).sum())
        found.append(number + shift_EM[expert, copy])
    return np.array(found, np.int64)


SIZES = [(1, 1, 4, 0), (7, 2, 5, 3), (40, 4, 32, 8), (33, 8, 130, 20)]


def test_they_can_run_here():
    assert kernels.available(DEVICE)


@pytest.mark.parametrize("size", SIZES)
def test_tables_of_copies_lead_to_the_engines_order(size):
    topk_TK, expert_R, quota_R = random_split(secrets.randbits(32), *size)
    place_N = places_by_table(topk_TK, *place_tables(quota_R, expert_R, size[2]))
    order_N = order_by_replica(torch.from_numpy(topk_TK), quota_R, expert_R).numpy()
    assert (np.argsort(order_N) == place_N).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dispatch_and_combine(size, dtype):
    topk_TK, expert_R, quota_R = random_split(secrets.randbits(32), *size)
    topk = torch.from_numpy(topk_TK).to(DEVICE)
    order_N = order_by_replica(topk, quota_R, expert_R)
    tables = [torch.from_numpy(table).to(DEVICE) for table in place_tables(quota_R, expert_R, size[2])]
    place_N = kernels.places(topk, *tables)
    assert torch.equal(torch.argsort(order_N), place_N.long())
    hidden_TH = torch.randn(size[0], 72, device=DEVICE).to(dtype)
    rows_NH = kernels.scatter_rows(hidden_TH, place_N, size[1])
    assert torch.equal(rows_NH, hidden_TH[order_N // size[1]])
    weight_TK = torch.rand(size[0], size[1], device=DEVICE)
    out = kernels.combine_rows(rows_NH, place_N, weight_TK).double()
    exact = (rows_NH.double()[place_N.long()].view(size[0], size[1], -1) * weight_TK.double()[..., None]).sum(1)
    assert (out - exact).norm() <= (1e-6 if dtype == torch.float32 else 4e-3) * exact.norm()
    engine = combine(rows_NH, order_N, weight_TK, size[0], size[1]).double()
    assert (engine - exact).norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * exact.norm()


@pytest.mark.parametrize("width", [5, 16, 96, 1100])
def test_gated_activation(width):
    both = torch.randn(6, 2 * width, device=DEVICE)
    gate, up = both.double().chunk(2, -1)
    exact = torch.nn.functional.silu(gate) * up
    assert (kernels.silu_gate(both).double() - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 4, 1), (50, 32, 4), (37, 200, 8), (9, 16, 16)])
def test_forecast(tokens, experts, top_k):
    score = torch.randn(tokens, experts, device=DEVICE)
    chosen = torch.topk(score.double(), top_k, -1).indices
    assert torch.equal(
        kernels.forecast_counts(score, top_k).long(), torch.bincount(chosen.reshape(-1), minlength=experts)
    )


def test_no_tokens():
    tables = [torch.from_numpy(t).to(DEVICE) for t in place_tables(np.zeros(4, int), np.arange(4, dtype="i4"), 4)]
    none = torch.empty(0, 2, dtype=torch.int64, device=DEVICE)
    place_N = kernels.places(none, *tables)
    rows = kernels.scatter_rows(torch.empty(0, 8, device=DEVICE), place_N, 2)
    assert kernels.combine_rows(rows, place_N, torch.empty(0, 2, device=DEVICE)).shape == (0, 8)
    assert kernels.forecast_counts(torch.empty(0, 4, device=DEVICE), 2).tolist() == [0, 0, 0, 0]

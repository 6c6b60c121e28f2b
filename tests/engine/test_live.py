"""Live runs on forked ranks: outputs equal the model's, failures end the run with a sentence."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeless.engine import groups, worker
from moeless.engine.elastic import COLUMNS
from moeless.engine.job import Job
from moeless.engine.launch import run_forked
from moeless.engine.options import LiveWorkload
from moeless.engine.policy import resolve_live
from moeless.engine.recording import read_routing, write_trace
from moeless.engine.results import finished_requests, make_cell, read_records
from moeless.engine.start import ranks_of
from moeless.engine.store import ReplicaStore
from moeless.engine.transfers import Transfers
from moeless.engine.verify import Reference, Verification
from moeless.errors import RunFailed, UserError
from moeless.traces import TokenTrace, open_trace


def verify(job: Job, cell: int) -> Verification:
    prompts = {live.request.id: live.token_P for live in job.requests}
    outputs = {entry["request"]: entry["tokens"] for entry in finished_requests(job.folder, cell, job.ranks)}
    logits = {request: np.load(job.folder / f"logits-{cell}-{request}.npy") for request in outputs}
    assert len(outputs) == len(job.requests)
    assert all(len(outputs[live.request.id]) == live.request.output_tokens for live in job.requests)
    return Reference(job.model, torch.float32).compare(prompts, outputs, logits)


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one launch of two ranks left, shared by the tests that read it."""
    return {"folder": tmp_path_factory.mktemp("run")}


@pytest.fixture
def served(make_job: Callable[..., Job], serve: Callable[[Job], None], shared_run: dict[str, Any]) -> Job:
    """Four policies and the oracle on two ranks with the Transformers host, recorded."""
    if "job" not in shared_run:
        job = make_job(
            policies=("static", "eplb:history", "moeless:history", "moeless:gate_reuse:2", "oracle"),
            plan_every=2,
            folder=shared_run["folder"],
            shared=shared_run["folder"],
            replan_seconds=1e-6,
            record=True,
            record_inputs=True,
            copy_from="peer",
        )
        serve(job)
        shared_run["job"] = job
    found: Job = shared_run["job"]
    return found


@pytest.mark.parametrize("cell", range(4))
def test_every_policy_generates_what_the_model_generates(served: Job, cell: int) -> None:
    found = verify(served, cell)
    assert found.passed, found.sentence()


def test_copies_appear_and_move_while_tokens_flow(served: Job) -> None:
    facts = [read_records(served, cell).facts for cell in range(4)]
    assert sum(fact["loads"] for fact in facts[0]) == 0
    for moving in facts[1:]:
        assert sum(fact["loads"] for fact in moving) > 0
        assert sum(fact["moved_bytes"] for fact in moving) > 0
        assert 0 < sum(fact["peer_loads"] for fact in moving) <= sum(fact["loads"] for fact in moving)
        assert sum(fact["peer_failures"] for fact in moving) == 0


def test_static_makes_one_gather_and_two_exchanges_a_layer_and_no_more(served: Job) -> None:
    records = read_records(served, 0)
    layer_calls = records.rows_SILC.shape[1] * served.spec.L
    for fact in records.facts:
        assert fact["collectives"]["gather"] == layer_calls
        assert fact["collectives"]["all_to_all"] == 2 * layer_calls
        assert fact["grouped"] is True


def test_every_assignment_is_computed_once(served: Job) -> None:
    positions = sum(live.request.prompt_tokens + live.request.output_tokens - 1 for live in served.requests)
    for cell in range(5):
        tokens = read_records(served, cell).column("tokens").sum()
        assert tokens == positions * served.spec.K * served.spec.L


def test_the_oracle_balances_and_is_marked_lossy(served: Job) -> None:
    policy = resolve_live(
        "oracle", spec=served.spec, cluster=served.cluster, costs="roofline", extra_slots=1, model=served.model
    )
    records = read_records(served, 4)
    cell = make_cell(served, policy, records, warmup=0, objectives=(), settings={})
    assert cell.lossy
    static = records_imbalance(read_records(served, 0).column("tokens"))
    assert records_imbalance(records.column("tokens")) < static
    assert cell.settings["prompt_perplexity"] is not None


def records_imbalance(load_SIL: Any) -> float:
    return float((load_SIL.max(0) / np.maximum(load_SIL.mean(0), 1e-9)).mean())


def test_a_cell_has_layer_request_and_billing_figures(served: Job) -> None:
    policy = resolve_live(
        "static", spec=served.spec, cluster=served.cluster, costs="roofline", extra_slots=1, model=served.model
    )
    cell = make_cell(served, policy, read_records(served, 0), warmup=1, objectives=(), settings={})
    assert cell.evidence == "measured"
    assert cell.request is not None
    assert cell.request.completed == len(served.requests)
    assert cell.layer.mean_ms == pytest.approx(sum(cell.layer.parts_ms.values()))
    assert cell.layer.replicas == served.spec.E
    assert cell.layer.warm_rate == 1.0
    assert cell.billing.resident > 0


def test_the_recorded_trace_is_the_router_s_own_decisions(served: Job, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_trace(served, read_routing(served), tmp_path / "trace", LiveWorkload())
    trace = open_trace(tmp_path / "trace")
    assert isinstance(trace, TokenTrace)
    assert trace.num_requests == len(served.requests)
    model = AutoModelForCausalLM.from_pretrained(served.model, dtype=torch.float32).eval()
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    outputs = {entry["request"]: entry["tokens"] for entry in finished_requests(served.folder, 0, 2)}
    for live in served.requests:
        rows = trace.rows(live.request.id)
        sequence = [*live.token_P, *outputs[live.request.id][:-1]]
        assert trace.token_T[rows].tolist() == sequence
        seen.clear()
        with torch.inference_mode():
            model(input_ids=torch.tensor([sequence]), use_cache=False)
        true_TLK = torch.stack(seen, 1).numpy()
        assert (np.sort(trace.topk(rows.start, rows.stop), -1) == np.sort(true_TLK, -1)).all()


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe"])
def test_the_megatron_host_generates_what_transformers_does(
    make_job: Callable[..., Job], serve: Callable[[Job], None], kind: str
) -> None:
    job = make_job(kind, host="megatron", policies=("moeless:history",), count=3)
    serve(job)
    found = verify(job, 0)
    assert found.passed, found.sentence()


def test_four_ranks_with_idle_ones_one_second_batches_and_biased_experts(
    make_job: Callable[..., Job], serve: Callable[[Job], None]
) -> None:
    # two requests on four ranks: two ranks have nothing to do; six experts do not divide by four
    job = make_job("gpt_oss", ranks=4, count=2, policies=("eplb:history",), batching="one-second", replan_seconds=1e-6)
    requests = tuple(dataclasses.replace(r, request=dataclasses.replace(r.request, arrival=0.0)) for r in job.requests)
    job = dataclasses.replace(job, requests=requests)
    serve(job)
    found = verify(job, 0)
    assert found.passed, found.sentence()
    tokens = read_records(job, 0).rows_SILC[..., COLUMNS.index("tokens")]
    assert tokens.shape[0] == 4


def killing(job: Job, rank_to_kill: int, arm: Callable[[], None]) -> Callable[[int], None]:
    meeting = groups.Meeting()

    def work(rank: int) -> None:
        ranks = groups.join(rank, job.ranks, meeting=meeting)
        if rank == rank_to_kill:
            arm()
        worker.serve(job, ranks)

    return work


def kill_when(owner: Any, name: str, when: Callable[..., bool]) -> None:
    original = getattr(owner, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if when(self, *args):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args, **kwargs)

    setattr(owner, name, method)


@pytest.mark.parametrize("moment", ["prefill", "decode", "fill", "send_weights", "receive_weights"])
def test_a_rank_killed_at_any_moment_ends_the_run_and_is_named(make_job: Callable[..., Job], moment: str) -> None:
    from moeless.contracts import Phase
    from moeless.engine.serving import ServingLoop

    # one short request of rank 0 is served before anything can fail in decode
    source: Any = "host" if moment == "fill" else "peer"
    job = make_job(policies=("moeless:history",), count=4, verify=False, copy_from=source)
    first = job.requests[0]
    short = dataclasses.replace(first, request=dataclasses.replace(first.request, output_tokens=1))
    late = [dataclasses.replace(r, request=dataclasses.replace(r.request, output_tokens=6)) for r in job.requests[1:]]
    job = dataclasses.replace(job, requests=(short, *late))

    def arm() -> None:
        if moment in ("fill", "send_weights", "receive_weights"):
            state = {"deployed": False}
            deploy = ReplicaStore.deploy

            def deployed(self: ReplicaStore, *args: Any) -> None:
                deploy(self, *args)
                state["deployed"] = True

            ReplicaStore.deploy = deployed  # type: ignore[method-assign]
            kill_when(Transfers, moment, lambda *_: state["deployed"])
        else:
            wanted = Phase.PREFILL if moment == "prefill" else Phase.DECODE
            kill_when(ServingLoop, "_iterate", lambda _, iteration, __: iteration.phase == wanted)

    with pytest.raises(RunFailed, match="rank 1 was killed by SIGKILL"):
        run_forked(killing(job, 1, arm), 2)
    if moment == "decode":
        assert [entry["request"] for entry in finished_requests(job.folder, 0, 2)] == [0]


def test_a_family_that_a_host_does_not_serve_is_refused_by_name(
    make_job: Callable[..., Job], serve: Callable[[Job], None]
) -> None:
    job = make_job("gpt_oss", host="megatron", ranks=1, count=1)
    with pytest.raises(UserError, match="model family 'gpt_oss'"):
        serve(job)


def test_a_job_survives_its_file(make_job: Callable[..., Job], tmp_path: Path) -> None:
    job = make_job(policies=("static", "eplb:history"), planner_params={"eplb": {}})
    job.write(tmp_path / "job.json")
    assert Job.read(tmp_path / "job.json") == job


def test_llama_4_is_served_by_its_own_adapter_also_from_a_multimodal_checkpoint(
    make_job: Callable[..., Job], serve: Callable[[Job], None]
) -> None:
    job = make_job("llama4", policies=("moeless:history",), copy_from="peer")
    serve(job)
    found = verify(job, 0)
    assert found.passed, found.sentence()


def test_without_replicas_elastic_makes_the_same_collectives_and_products_as_static(
    make_job: Callable[..., Job], serve: Callable[[Job], None]
) -> None:
    job = make_job(policies=("static", "elastic:history"), extra_slots=0, count=3, verify=False, batching="one-second")
    requests = tuple(dataclasses.replace(r, request=dataclasses.replace(r.request, arrival=0.0)) for r in job.requests)
    serve(dataclasses.replace(job, requests=requests))
    static, elastic = (read_records(job, cell) for cell in range(2))
    assert (elastic.column("replicas") == job.spec.E).all()
    for mine, theirs in zip(elastic.facts, static.facts, strict=True):
        for name in ("gather", "all_to_all"):
            assert mine["collectives"][name] == theirs["collectives"][name] > 0
        assert mine["products"] == theirs["products"] > 0
    assert (elastic.column("tokens") == static.column("tokens")).all()


def test_copies_that_find_no_memory_leave_the_work_to_those_that_exist(
    make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    deploy, fill, deployed = ReplicaStore.deploy, Transfers.fill, []

    def mark(self: ReplicaStore, *args: Any) -> None:
        deployed.clear()
        deploy(self, *args)
        deployed.append(True)

    def no_memory(self: Transfers, layer: int, copy: Any) -> None:
        if deployed:
            raise MemoryError("out of memory")
        fill(self, layer, copy)

    monkeypatch.setattr(ReplicaStore, "deploy", mark)
    monkeypatch.setattr(Transfers, "fill", no_memory)
    eager = {"elastic": {"skip": False, "economy": 0.0, "patience_iterations": 10**9}}
    job = make_job(policies=("elastic:history",), planner_params=eager, copy_from="host")
    # forked from this process, so that the changed functions are the ranks' too
    job.write(job.folder / "job.json")
    run_forked(ranks_of(str(job.folder / "job.json")), job.ranks)
    found = verify(job, 0)
    assert found.passed, found.sentence()
    facts = read_records(job, 0).facts
    assert sum(fact["failed"] for fact in facts) > 0


def test_no_rank_reads_the_whole_model_and_no_expert_is_read_twice(served: Job) -> None:
    facts, spec = read_records(served, 0).facts, served.spec
    experts = spec.L * spec.E * spec.expert_bytes
    rest = {fact["read_bytes"] for fact in facts}
    assert rest == {spec.non_expert_bytes + experts // served.ranks}
    assert max(rest) < spec.non_expert_bytes + experts


def test_a_broken_checkpoint_or_plan_is_refused_before_launch(
    served: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from moeless.contracts import LayerPlan
    from moeless.engine import bench
    from moeless.policy import ResolvedPolicy

    started: list[Any] = []
    monkeypatch.setattr(bench, "launch", started.append)
    shutil.copytree(served.model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match="not an intact safetensors file"):
        bench.LiveBench(bench.LiveConfig(policies=("static",), model=tmp_path / "model"))
    first = ResolvedPolicy.first_plans

    def without_primaries(self: ResolvedPolicy) -> list[LayerPlan]:
        return [dataclasses.replace(plan, primary_R=np.zeros(plan.R, np.bool_)) for plan in first(self)]

    monkeypatch.setattr(ResolvedPolicy, "first_plans", without_primaries)
    with pytest.raises(UserError, match="expert 0 has 0 primaries"):
        bench.LiveBench(bench.LiveConfig(policies=("static",), max_requests=2))
    assert started == []


def test_the_simulator_serves_what_the_live_run_served(served: Job) -> None:
    from moeless.engine.predicted import predict
    from moeless.engine.worker import policies_of

    policies = policies_of(served)
    cells = predict(served, policies, read_routing(served))
    assert [cell.policy for cell in cells] == [policy.label for policy in policies]
    positions = sum(live.request.prompt_tokens + live.request.output_tokens - 1 for live in served.requests)
    for cell in cells:
        assert cell.evidence == "simulated"
        assert cell.request is not None
        assert cell.request.total_input_tokens + cell.request.total_output_tokens == positions + len(served.requests)

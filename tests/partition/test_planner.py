from __future__ import annotations

import pickle
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_models import LINK, PAGE, RATES, budget, llama_like

from kvcache.tier import Tier
from partition import (
    Bandwidths,
    BudgetError,
    ClusterSpec,
    CodecRate,
    Constraints,
    ModelProfile,
    Objective,
    PartitionPlan,
    PlanError,
    Workload,
    plan,
    runners_up,
)
from partition.explain import forecast_rows, tier_rows

MIB = 1 << 20
SMALL = Workload(prompt_tokens=16, output_tokens=16, concurrency=4)


def on(devices: int, device: int, host: int = 0, nvme: int = 0) -> ClusterSpec:
    return ClusterSpec.local(devices, budget(device, host, nvme), RATES, LINK)


def tiers(made: PartitionPlan) -> dict[str, Tier]:
    return {p.unit: p.tier for shard in made.shards for p in shard.placements}


def test_what_fits_stays_on_the_device() -> None:
    made = plan(llama_like(), on(1, 4 * MIB), SMALL)
    assert set(tiers(made).values()) == {Tier.DEVICE}
    shard = made.shards[0]
    assert shard.ring_bytes == 0
    assert shard.weight_bytes(Tier.DEVICE) == llama_like().num_bytes
    assert made.max_model_len == 1024
    assert made.num_device_blocks == 64
    assert shard.device_kv_bytes == 64 * 16 * 4 * 2 * 4 * 8 * 2
    assert made.max_num_seqs == 4
    assert made.forecast.terms_s["disk"] == 0


def test_small_units_are_always_on_the_device() -> None:
    made = plan(llama_like(), on(1, 256 * 1024, 64 * 1024, 8 * MIB), SMALL)
    placed = tiers(made)
    assert all(placed[f"layers.{i}.small"] is Tier.DEVICE for i in range(4))
    assert Tier.NVME in placed.values()
    assert made.forecast.binds == "disk"
    assert made.shards[0].ring_bytes >= 2 * (64 * 128 * 2 * 2 + PAGE)


def test_uneven_layers_are_cut_where_the_slowest_stage_is_fastest() -> None:
    model = llama_like(num_layers=4, hidden=256, mlp_sizes=(4096, 256, 256, 256), vocab=16)
    made = plan(model, on(2, 16 * MIB), SMALL, constraints=Constraints(pipeline_parallel=2))
    assert [(s.first_layer, s.end_layer) for s in made.stages] == [(0, 1), (1, 4)]


def test_streaming_splits_pay_with_more_shards() -> None:
    model = llama_like(num_layers=8, hidden=256, inter=1024)
    cluster = ClusterSpec.local(4, budget(2 * MIB, 0, 64 * MIB), RATES, LINK, shared=())
    made = plan(model, cluster, SMALL)
    assert made.tensor_parallel * made.pipeline_parallel == 4
    others = runners_up(model, cluster, SMALL)
    layouts = [
        (o.tensor_parallel, o.pipeline_parallel, o.passes_in_flight) for o in (made, *others)
    ]
    # with TP 1 the ring does not fit
    assert sorted(layouts) == [(2, 1, 1), (2, 2, 1), (2, 2, 2), (3, 1, 1), (4, 1, 1)]
    assert all(o.forecast.tokens_per_s <= made.forecast.tokens_per_s for o in others)


def test_least_tpot_still_serves_the_concurrency() -> None:
    cluster = on(2, 4 * MIB, 4 * MIB, 64 * MIB)
    made = plan(llama_like(), cluster, SMALL, Objective.MIN_TPOT)
    assert made.max_num_seqs >= SMALL.concurrency


def test_tied_ends_are_held_once_on_one_stage_and_twice_on_two() -> None:
    model = llama_like(tied=True)
    one = plan(model, on(1, 4 * MIB), SMALL)
    assert sum(s.weight_bytes(t) for s in one.shards for t in Tier) == model.num_bytes
    fixed = Constraints(tensor_parallel=1, pipeline_parallel=2)
    two = plan(model, on(2, 4 * MIB), SMALL, constraints=fixed)
    held = sum(s.weight_bytes(t) for s in two.shards for t in Tier)
    assert held == model.num_bytes + 256 * 64 * 2


@pytest.mark.parametrize(
    ("fixed", "said"),
    [
        (Constraints(tensor_parallel=16), "tensor_parallel is 16"),
        (Constraints(pipeline_parallel=5), "at most 4"),
        (Constraints(pipeline_parallel=3), "the cluster has 2"),
        (Constraints(max_model_len=4096), "the model takes 1024"),
        (Constraints(max_num_seqs=100, max_num_batched_tokens=10), "max_num_batched_tokens = 10"),
    ],
)
def test_contradictions_are_refused(fixed: Constraints, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        plan(llama_like(), on(2, 4 * MIB), constraints=fixed)


def test_fixed_values_are_kept() -> None:
    fixed = Constraints(
        max_model_len=512, max_num_seqs=3, max_num_batched_tokens=128, block_size=32
    )
    made = plan(llama_like(), on(1, 4 * MIB), constraints=fixed)
    assert (made.max_model_len, made.max_num_seqs) == (512, 3)
    assert (made.max_num_batched_tokens, made.block_size) == (128, 32)


@pytest.mark.parametrize(
    ("device", "host", "nvme"),
    [(64 * 1024, 0, 0), (512 * 1024, 64 * 1024, 0), (100 * 1024, 10 * MIB, 10 * MIB), (0, 0, 0)],
)
@pytest.mark.parametrize("devices", [1, 2])
def test_a_refusal_names_budgets_that_then_work_and_are_the_smallest(
    devices: int, device: int, host: int, nvme: int
) -> None:
    model = llama_like(num_layers=8, inter=512)
    with pytest.raises(BudgetError) as caught:
        plan(model, on(devices, device, host, nvme), SMALL)
    assert caught.value.smallest
    for field, size in caught.value.smallest.items():
        given = {"device_bytes": device, "host_bytes": host, "nvme_bytes": nvme}
        assert str(size) in str(caught.value)
        plan(model, on(devices, *{**given, field: size}.values()), SMALL)
        with pytest.raises(BudgetError):
            plan(model, on(devices, *{**given, field: size - PAGE}.values()), SMALL)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.smallest) == (str(caught.value), caught.value.smallest)
    assert copy.status_code == 400


@settings(max_examples=60, deadline=None)
@given(
    layers=st.integers(1, 6),
    inter=st.integers(1, 16),
    devices=st.integers(1, 4),
    device=st.integers(64, 1024),
    host=st.integers(0, 512),
    nvme=st.sampled_from([0, 256, 4096]),
    concurrency=st.integers(1, 40),
)
def test_plans_never_exceed_a_budget(
    layers: int,
    inter: int,
    devices: int,
    device: int,
    host: int,
    nvme: int,
    concurrency: int,
) -> None:
    model = llama_like(num_layers=layers, inter=32 * inter)
    workload = Workload(prompt_tokens=100, output_tokens=28, concurrency=concurrency)
    try:
        made = plan(model, on(devices, device * 1024, host * 1024, nvme * 1024), workload)
    except BudgetError as error:
        assert "smallest" in str(error)
        return
    for shard in made.shards:
        block = model.kv_layout(
            made.stages[shard.stage].first_layer,
            made.stages[shard.stage].end_layer,
            made.block_size,
            shard.tp_rank,
            made.tensor_parallel,
        ).block_bytes
        assert shard.device_kv_bytes == made.num_device_blocks * block
        host_blocks = made.num_host_blocks + made.num_rotating_host_blocks + made.num_tail_blocks
        assert shard.host_kv_bytes == host_blocks * block
        for tier in Tier:
            used = shard.used_bytes(tier)
            assert used <= shard.budget.of(tier)
    units = [u.name for s in made.stages for u in model.stage_units(s.first_layer, s.end_layer)]
    placed = [p.unit for stage in made.stages for p in stage.shards[0].placements]
    assert placed == units
    assert PartitionPlan.from_json(made.to_json()) == made


def test_rows_account_for_every_byte() -> None:
    made = plan(llama_like(), on(2, 256 * 1024, 64 * 1024, 8 * MIB), SMALL)
    rows = tier_rows(made)
    assert len(rows) == 3 * len(made.shards)
    for row in rows:
        assert row.used_bytes == made.shards[row.rank].used_bytes(row.tier)
    assert sum(row.num_units for row in rows) == sum(len(s.placements) for s in made.shards)
    assert forecast_rows(made)[0] == ("throughput", made.forecast.tokens_per_s, "tokens/s")


def test_a_large_model_over_eight_devices_is_planned_quickly() -> None:
    model: ModelProfile = llama_like(
        num_layers=80, hidden=8192, inter=28672, vocab=128256, query=64, key_value=8
    )
    cluster = ClusterSpec.local(
        8, budget(8 << 30, 4 << 30, 800 << 30), RATES, LINK, shared=("disk",)
    )
    start = time.process_time()
    made = plan(model, cluster)
    assert time.process_time() - start < 10  # a guard against blow-ups: 0.6 s on two slow cores
    assert made.tensor_parallel * made.pipeline_parallel == 8


def test_planning_imports_no_torch() -> None:
    code = "import sys, partition; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _with_kv_on_nvme(decode: float, *allowed: str) -> PartitionPlan:
    """The plan for sequences of which the device holds a few, over a disk that binds."""
    rates = replace(
        RATES, kv_codecs=(CodecRate(storage_dtype="int8", encode=decode, decode=decode),)
    )
    cluster = ClusterSpec.local(1, budget(24 * MIB, 2 * MIB, 512 * MIB), rates, LINK)
    load = Workload(prompt_tokens=64, output_tokens=64, concurrency=32)
    fixed = Constraints(kv_storage_dtypes=allowed, max_num_batched_tokens=64)
    model = llama_like(num_layers=16, hidden=512, inter=512, key_value=8)
    return plan(model, cluster, load, constraints=fixed)


def test_kv_is_lossy_only_where_it_may_be_and_pays() -> None:
    lossless = _with_kv_on_nvme(1e12, "auto")
    chosen = _with_kv_on_nvme(1e12, "int8", "auto")
    assert lossless.num_rotating_nvme_blocks > 0 and lossless.forecast.binds == "disk"
    assert (lossless.kv_storage_dtype, chosen.kv_storage_dtype) == ("auto", "int8")
    assert chosen.forecast.decode_pass_s < lossless.forecast.decode_pass_s
    assert "int8" in chosen.reason and "int8" not in lossless.reason
    slow = _with_kv_on_nvme(1e7, "auto", "int8")
    assert slow == lossless
    assert _with_kv_on_nvme(1e7, "int8").kv_storage_dtype == "int8"


def test_the_hosts_cores_attend_where_they_beat_the_link() -> None:
    model = llama_like(num_layers=16, hidden=512, inter=512, key_value=8)
    load = Workload(prompt_tokens=64, output_tokens=64, concurrency=32)

    def made(rates: Bandwidths) -> PartitionPlan:
        cluster = ClusterSpec.local(1, budget(24 * MIB, 512 * MIB, 0), rates, LINK)
        return plan(model, cluster, load, constraints=Constraints(max_num_batched_tokens=64))

    unknown, slow, fast = (
        made(replace(RATES, host_attention=rate)) for rate in (None, RATES.host_to_device / 9, 5e11)
    )
    assert unknown.num_rotating_host_blocks > 0
    assert not unknown.attends_on_host and not slow.attends_on_host and fast.attends_on_host
    assert fast.forecast.decode_pass_s < slow.forecast.decode_pass_s
    assert "attended to there" in fast.reason
    own_cores = made(replace(RATES, copies_overlap=False))
    assert own_cores.attends_on_host and own_cores.forecast.terms_s["host link"] == 0
    # a host of its own is a part more of every layer's attention
    more = fast.forecast.terms_s["latency"] - own_cores.forecast.terms_s["latency"]
    assert more == pytest.approx(16 * RATES.runtime.layer_latency_s)


def test_attention_on_the_host_wants_kv_as_it_is() -> None:
    lossy = _with_kv_on_nvme(1e12, "int8")
    with pytest.raises(PlanError, match="attends_on_host needs KV as the model computes it"):
        replace(lossy, attends_on_host=True).validate()


def test_every_expert_that_a_layer_computes_has_its_latency() -> None:
    model = llama_like(num_layers=4, num_experts=16)
    runtime = replace(RATES.runtime, expert_latency_s=1e-3)

    def latency(rates: Bandwidths, batch: int) -> float:
        cluster = ClusterSpec.local(1, budget(64 * MIB), rates, LINK)
        load = Workload(prompt_tokens=16, output_tokens=16, concurrency=batch)
        return plan(model, cluster, load).forecast.terms_s["latency"]

    for batch in (1, 8):
        more = latency(replace(RATES, runtime=runtime), batch) - latency(RATES, batch)
        assert more == pytest.approx(4 * 16 * model.expert_share(batch) * 1e-3)

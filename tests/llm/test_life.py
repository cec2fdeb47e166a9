"""An engine's life: what its statistics say, what it keeps of prefixes, and what it leaves
behind."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from giantserve import LLM, SamplingParams
from giantserve.errors import EngineDeadError
from giantserve.tokenizer import Tokenizer
from partition.plan import PartitionPlan
from tests.exactness.plans import make_plan
from tests.exactness.zoo import make_prompts

GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
PROMPTS = make_prompts((6, 19, 33))


def left_over() -> tuple[set[int], set[str], set[str]]:
    """Child processes, open descriptors (by what they lead to) and threads of this process."""
    me = psutil.Process()
    links = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            links.add(f"{descriptor} {os.readlink(f'/proc/self/fd/{descriptor}')}")
        except FileNotFoundError:
            continue  # the listing's own
    names = {f"{thread.ident} {thread.name}" for thread in threading.enumerate()}
    return {child.pid for child in me.children(recursive=True)}, links, names


def test_usage_counts_the_prefix_that_was_reused(llm: LLM) -> None:
    prompt = make_prompts((70,), seed=77)[0]
    first, again = (llm.generate(prompt, GREEDY)[0] for _ in range(2))
    assert (first.usage.prompt_tokens, first.usage.completion_tokens) == (70, 12)
    assert first.usage.cached_tokens == 0
    assert again.usage.cached_tokens == 64  # whole blocks of 16, short of the last token
    assert again.token_ids == first.token_ids
    other = llm.generate(prompt, GREEDY, tenant="someone else")[0]
    assert other.usage.cached_tokens == 0
    assert other.token_ids == first.token_ids


def test_chat_renders_the_template(llm: LLM, tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "Say something."}]
    output = llm.chat(messages, GREEDY)
    assert output.prompt_token_ids == tokenizer.render_chat(messages)
    assert output.token_ids == llm.generate(output.prompt_token_ids, GREEDY)[0].token_ids
    assert output.text == tokenizer.decode(output.token_ids)


@pytest.mark.parametrize("tier", ["device", "host", "nvme"])
def test_statistics_count_the_bytes_of_each_tier(
    tier: str, model_path: Path, options: dict[str, Any]
) -> None:
    plan = make_plan(model_path, 1, 1, tier, device_blocks=64, host_blocks=8)
    with LLM(model_path, **options, plan=plan) as llm:
        llm.generate(PROMPTS, GREEDY)
        stats = llm.stats()
    shard = stats["shards"][0]
    moved = {"nvme": 0, "host": 0}
    for link in shard["links"]:
        moved[link["source"]] += link["bytes"]
        assert link["gb_per_s"] > 0
    streamed = sum(p.num_bytes for p in plan.shards[0].placements if p.tier.value == tier)
    if tier == "device":
        assert moved == {"nvme": 0, "host": 0}
        assert shard["resident_bytes"] == streamed
    else:
        # every unit once a pass; the embedding by rows, the first pass of the next cycle ahead
        layers = [p for p in plan.shards[0].placements if p.unit.startswith("layers.")]
        per_pass = sum(p.num_bytes for p in layers if p.tier.value == tier)
        assert per_pass > 0
        assert moved[tier] >= per_pass * stats["passes"]
        assert moved["host" if tier == "nvme" else "nvme"] == 0
    assert stats["requests"] == 3 and stats["generated_tokens"] == 36
    assert 0 < stats["roofline_fraction"] < 1.5
    assert shard["busy_s"] > 0 and shard["passes"] == stats["passes"]
    assert stats["kv"] == {
        "losses": 0,
        "preemptions": 0,
        "prompt_tokens": 6 + 19 + 33,
        "prompt_tokens_cached": 0,
        "device_blocks_cached": (6 + 11) // 4 + (19 + 11) // 4 + (33 + 11) // 4,
        "rotating_blocks_cached": 0,
        "host_blocks_cached": 0,
        "device_blocks": 64,
        "device_blocks_free": 64,
        "rotating_blocks": 0,
        "rotating_blocks_free": 0,
        "rotating_blocks_suspect": 0,
        "host_blocks": 8,
        "host_blocks_free": 8,
    }


def test_nothing_is_left_behind(model_path: Path, nvme_dir: Path) -> None:
    def life() -> None:
        with LLM(
            model_path,
            device_memory="64MiB",
            host_memory="16MiB",
            nvme_dir=nvme_dir,
            allow_unused_tiers=True,
            pipeline_parallel=2,
            max_model_len=128,
        ) as llm:
            llm.generate(PROMPTS, GREEDY)
            during = left_over()
            assert len(during[0] - before[0]) >= 3, "the launcher and two shards were to be seen"
            assert during[1] - before[1] and during[2] - before[2]

    before = left_over()
    life()
    before = left_over()  # whatever libraries open once is open now
    life()
    assert left_over() == before


def test_a_closed_engine_says_so(model_path: Path, options: dict[str, Any]) -> None:
    llm = LLM(model_path, **options)
    llm.close()
    llm.close()
    with pytest.raises(EngineDeadError, match="closed"):
        llm.generate(PROMPTS, GREEDY)
    with pytest.raises(EngineDeadError, match="closed"):
        llm.stats()


def test_two_engines_at_once(model_path: Path, options: dict[str, Any], llm: LLM) -> None:
    with LLM(model_path, **{**options, "pipeline_parallel": 2}) as other:
        outputs: dict[str, list[list[int]]] = {}

        def ask(name: str, engine: LLM) -> None:
            outputs[name] = [o.token_ids for o in engine.generate(PROMPTS * 4, GREEDY)]

        threads = [
            threading.Thread(target=ask, args=pair) for pair in (("first", llm), ("second", other))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert outputs["first"] == outputs["second"]
    assert outputs["first"] == [o.token_ids for o in llm.generate(PROMPTS * 4, GREEDY)]


def test_several_threads_share_one_engine(llm: LLM) -> None:
    alone = [llm.generate(prompt, GREEDY)[0].token_ids for prompt in PROMPTS]
    found: dict[int, list[int]] = {}

    def ask(place: int) -> None:
        found[place] = llm.generate(PROMPTS[place % 3], GREEDY)[0].token_ids

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {place: alone[place % 3] for place in range(12)}


def test_without_any_budget(model_path: Path, options: dict[str, Any], llm: LLM) -> None:
    bare = {k: options[k] for k in ("launcher", "nvme_dir", "allow_unused_tiers")}
    with LLM(model_path, **bare) as free:
        assert free.plan.shards[0].budget.device_bytes > 64 << 20
        tokens = [o.token_ids for o in free.generate(PROMPTS, GREEDY)]
    assert tokens == [o.token_ids for o in llm.generate(PROMPTS, GREEDY)]


def test_a_plan_survives_json(model_path: Path, options: dict[str, Any], llm: LLM) -> None:
    plan = make_plan(model_path, 1, 2, "mixed", device_blocks=32, host_blocks=8)
    text = plan.to_json()
    json.loads(text)
    again = PartitionPlan.from_json(text)
    assert again == plan
    with LLM(model_path, **options, plan=again) as planned:
        assert planned.plan == plan
        tokens = [o.token_ids for o in planned.generate(PROMPTS, GREEDY)]
    assert tokens == [o.token_ids for o in llm.generate(PROMPTS, GREEDY)]


def test_a_call_may_bring_more_prompts_than_a_server_would_queue(llm: LLM) -> None:
    one = SamplingParams(max_tokens=1, temperature=0.0)
    prompts = [[5 + index % 7, 6] for index in range(1500)]
    outputs = llm.generate(prompts, one)
    assert len(outputs) == len(prompts)
    for output in outputs:
        assert output.token_ids == outputs[output.prompt_token_ids[0] - 5].token_ids


def test_prompts_of_one_call_are_read_in_the_same_passes_every_time(
    model_path: Path, options: dict[str, Any]
) -> None:
    prompts = make_prompts((40,) * 12)
    with LLM(model_path, **{**options, "max_num_batched_tokens": 100, "trace": None}) as llm:
        passes = []
        for tenant in ("first", "second", "third"):  # none finds another's prefixes
            before = llm.stats()["passes"]
            llm.generate(prompts, SamplingParams(max_tokens=1, temperature=0.0), tenant=tenant)
            passes.append(llm.stats()["passes"] - before)
    assert passes == [5, 5, 5], "480 tokens, 100 a pass"

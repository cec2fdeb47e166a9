"""How long it takes to plan the largest models over 64 unequal devices.

python -m bench.plan_speed    prints a table as in bench/results/
"""

from __future__ import annotations

import resource
import time

from transformers import DeepseekV3Config, LlamaConfig

from kvcache.tier import TierBudget
from partition import (
    Bandwidths,
    ClusterSpec,
    DeviceSpec,
    GemmRate,
    Link,
    ModelProfile,
    NodeSpec,
    plan,
)

GIB = 1 << 30
NVLINK = Link(bandwidth=300e9, latency_s=8e-6)
PCIE = Link(bandwidth=25e9, latency_s=2e-5)
NETWORK = Link(bandwidth=25e9, latency_s=1e-5)

KINDS = {
    "h200": (127, 4.3e12, 800e12, 50e9, NVLINK),
    "h100": (72, 3.0e12, 800e12, 50e9, NVLINK),
    "a100": (72, 1.8e12, 280e12, 25e9, NVLINK),
    "a40": (43, 0.6e12, 130e12, 25e9, PCIE),
    "l40s": (43, 0.8e12, 300e12, 25e9, PCIE),
    "4090": (21, 0.9e12, 160e12, 25e9, PCIE),
}
"""GiB, bytes/s of memory, FLOP/s, bytes/s from the host, and the link within a node."""

NODES = (
    ("h200", 12),
    ("h100", 10),
    ("a100", 8),
    ("a40", 8),
    ("l40s", 8),
    ("4090", 8),
    ("h100", 6),
    ("a100", 4),
)


def cluster() -> ClusterSpec:
    """64 devices of six kinds on 8 nodes of 4 to 12."""
    return ClusterSpec(
        nodes=tuple(
            NodeSpec(name=f"{kind}-{index}", devices=(_device(kind),) * count, link=KINDS[kind][-1])
            for index, (kind, count) in enumerate(NODES)
        ),
        network=NETWORK,
    )


def _device(kind: str) -> DeviceSpec:
    memory, bandwidth, flops, host, _ = KINDS[kind]
    return DeviceSpec(
        name=kind,
        budget=TierBudget(device_bytes=memory * GIB, host_bytes=64 * GIB, nvme_bytes=800 * GIB),
        bandwidths=Bandwidths(
            device_memory=bandwidth,
            host_to_device=host,
            device_to_host=host,
            disk_read=12e9,
            disk_write=6e9,
            gemm=(
                GemmRate(rows=1, flops_per_s=bandwidth),
                GemmRate(rows=64, flops_per_s=flops / 2),
                GemmRate(rows=1024, flops_per_s=flops),
            ),
        ),
        staged=True,
    )


MODELS = {
    "Llama-3.1-405B": LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=128256,
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
        max_position_embeddings=131072,
    ),
    "DeepSeek-V3 (671B)": DeepseekV3Config(
        architectures=["DeepseekV3ForCausalLM"], dtype="bfloat16", max_position_embeddings=131072
    ),
}


def main() -> None:
    nodes = cluster()
    print("| model | profile s | plan, CPU s | peak memory MB | plan |\n|---|---|---|---|---|")
    for name, config in MODELS.items():
        start = time.process_time()
        profile = ModelProfile.from_config(config)
        profiled = time.process_time()
        made = plan(profile, nodes)
        planned = time.process_time()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
        print(
            f"| {name} | {profiled - start:.2f} | {planned - profiled:.2f} | {peak:.0f} | "
            f"{made.reason} |"
        )


if __name__ == "__main__":
    main()

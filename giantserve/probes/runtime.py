"""What the model code costs beside its matrix products, measured on a small decoder of its own.

The layers are transformers' modules and our attention, as a shard runs them; only the sizes are
small, so that the products vanish beside what is measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LlamaConfig, MixtralConfig

from giantserve.models.batch import ChunkSpec
from giantserve.models.collectives import TensorParallel
from giantserve.models.stage_model import StageModel
from giantserve.probes.timing import seconds_of
from giantserve.sampler import Sampler
from giantserve.sampling_params import SamplingParams
from giantserve.sampling_row import SamplingRow
from kvcache.arena import Arena
from kvcache.kv_store import KVStore
from kvcache.tier import Tier
from partition.bandwidths import RuntimeRates
from partition.profile import ModelProfile
from partition.stage_table import StageTable

NUM_LAYERS = 8
HEADS, KV_HEADS, HEAD_DIM = 4, 1, 64
HIDDEN = HEADS * HEAD_DIM
VOCAB = 32000
BLOCK_SIZE, NUM_BLOCKS = 16, 512
BATCH, ROWS = 8, 64
SHORT, CONTEXT = 16, 1024
NUM_EXPERTS = 8
LEAST_S = 1e-6


class _PlainWeights:
    """Every unit on the device, all the time."""

    whole_experts = True
    is_loaded = True

    def __init__(self, tensors: dict[str, torch.Tensor], stage: StageModel) -> None:
        self._tensors = tensors
        self._names = {unit.name: [p.name for p in unit.parameters] for unit in stage.units}

    def acquire(self, unit: str) -> dict[str, torch.Tensor]:
        return {name: self._tensors[name] for name in self._names[unit]}

    def acquire_experts(self, unit: str, experts: Sequence[int]) -> None:
        return

    def release(self, unit: str) -> None:
        return

    def gather_rows(self, unit: str, tensor: str, ids: torch.Tensor) -> torch.Tensor:
        return self._tensors[tensor][ids]


@torch.no_grad()
def probe_runtime(device: str, dtype: str) -> RuntimeRates:
    """Latencies and rates of what a pass does beside its products. Takes about 2 s."""
    stage = _stage(device, dtype)
    one, few, many = (_seconds(stage, device, rows, SHORT) for rows in (1, BATCH, ROWS))
    long = _seconds(stage, device, BATCH, CONTEXT)
    experts = _seconds(_stage(device, dtype, NUM_EXPERTS), device, 1, SHORT)
    loads = StageTable(stage.profile, 1).loads[0].at(0, NUM_LAYERS)
    read = BATCH * (CONTEXT - SHORT) * float(loads.kv_bytes_per_token)
    moved = (ROWS - BATCH) * float(loads.activation_bytes)
    return RuntimeRates(
        layer_latency_s=one / NUM_LAYERS,
        expert_latency_s=max(0.0, experts - one) / (NUM_LAYERS * NUM_EXPERTS),
        attention=read / max(long - few, LEAST_S),
        elementwise=moved / max(many - few, LEAST_S),
        sampling=_sampling(device),
    )


def _sampling(device: str) -> float:
    """Logits a second that greedy sampling takes in."""
    logits = torch.zeros(ROWS, VOCAB, dtype=torch.bfloat16, device=device)
    params = SamplingParams(temperature=0.0)
    rows = [
        SamplingRow(
            params=params,
            seq_id=index,
            seed=0,
            position=0,
            prompt_token_ids=(),
            output_token_ids=[],
            banned_token_ids=(),
        )
        for index in range(ROWS)
    ]
    sampler = Sampler()
    return ROWS * VOCAB / seconds_of(lambda: sampler.sample(logits.float(), rows), device)


def _stage(device_name: str, dtype: str, num_experts: int = 0) -> StageModel:
    """With experts every token goes through all of them."""
    device = torch.device(device_name)
    kind, name = (MixtralConfig, "Mixtral") if num_experts else (LlamaConfig, "Llama")
    experts = {"num_local_experts": num_experts, "num_experts_per_tok": num_experts}
    config = kind(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=2 * CONTEXT,
        dtype=dtype,
        architectures=[f"{name}ForCausalLM"],
        **(experts if num_experts else {}),
    )
    profile = ModelProfile.from_config(config)
    stage = StageModel(config, profile, 0, NUM_LAYERS, TensorParallel(), device)
    layout = profile.kv_layout(0, NUM_LAYERS, BLOCK_SIZE)
    size = NUM_BLOCKS * layout.block_bytes
    kv = KVStore(
        layout,
        device_arena=Arena(Tier.DEVICE, size, device),
        host_arena=Arena(Tier.HOST, 0, torch.device("cpu")),
        num_device_blocks=NUM_BLOCKS,
        num_host_blocks=0,
    )
    arena = Arena(Tier.DEVICE, 2 * profile.num_bytes + (1 << 20), device)
    tensors = {
        p.name: arena.allocate(p.num_elements * p.dtype_bytes)
        .view(getattr(torch, dtype))
        .view(p.shape)
        .fill_(0.01)
        for p in {p.name: p for unit in stage.units for p in unit.parameters}.values()
    }
    weights = _PlainWeights(tensors, stage)
    stage.attach(weights, kv, {unit.name for unit in stage.units})
    for unit in stage.units:
        stage.take_resident(unit.name, weights.acquire(unit.name), arena)
    return stage


def _seconds(stage: StageModel, device: str, batch: int, context: int) -> float:
    """A decode pass of ``batch`` sequences of ``context`` tokens each."""
    per_sequence = -(-context // BLOCK_SIZE)
    specs = [
        ChunkSpec(
            seq_id=index,
            start=context - 1,
            length=1,
            block_ids=[index * per_sequence + i for i in range(per_sequence)],
        )
        for index in range(batch)
    ]
    ids = torch.zeros(batch, dtype=torch.long, device=device)
    rows = list(range(batch))
    return seconds_of(lambda: stage.forward(ids, specs, BLOCK_SIZE, rows), device)

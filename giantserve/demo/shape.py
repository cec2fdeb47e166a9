"""The models that the demonstration can write, with budgets that are too small for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoShape:
    """A Llama shape, and the device and host memory that each of the two shards may use."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    device_memory: str
    host_memory: str

    def config(self, vocab_size: int) -> Any:
        """The transformers config, for a tokenizer of ``vocab_size`` ids."""
        from transformers import LlamaConfig

        return LlamaConfig(
            architectures=["LlamaForCausalLM"],
            dtype="bfloat16",
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )


SHAPES = {
    "full": DemoShape(
        name="full",
        hidden_size=1536,
        intermediate_size=4096,
        num_layers=30,
        num_heads=24,
        num_kv_heads=4,
        vocab_size=8192,
        device_memory="256MiB",
        host_memory="256MiB",
    ),
    "small": DemoShape(
        name="small",
        hidden_size=512,
        intermediate_size=1408,
        num_layers=12,
        num_heads=8,
        num_kv_heads=2,
        vocab_size=2048,
        device_memory="28MiB",
        host_memory="8MiB",
    ),
}
"""``full`` is 1.5 GB of bf16, ``small`` 70 MB; of both a good third fits only on the disk."""

"""A small tokenizer trained on the spot, for models with random weights."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from giantserve.errors import ConfigError

MIN_VOCAB_SIZE = 300
_CORPUS_BYTES = 6 << 20
_BOS, _EOS, _PAD = "<|begin|>", "<|end|>", "<|pad|>"
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
_CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages -%}
{% if message.role not in ('system', 'user', 'assistant') -%}
{{ raise_exception('unknown role ' + message.role) }}
{%- endif -%}
{{ '<|' + message.role + '|>' }}
{{ message.content }}{{ eos_token }}
{% endfor -%}
{% if add_generation_prompt %}{{ '<|assistant|>' }}
{% endif %}"""


def train_tokenizer(out_dir: str | Path, vocab_size: int) -> None:
    """Train a byte-level BPE of at most ``vocab_size`` ids and save it as a transformers tokenizer.

    The text is the source of Python's standard library, so the result is the same on every run of
    one Python version. It has begin, end and padding tokens and a chat template. Takes a few
    seconds. Raises ``ConfigError`` if ``vocab_size`` cannot hold the bytes and the special tokens.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"vocab_size is {vocab_size}, but a byte-level tokenizer needs {MIN_VOCAB_SIZE} or more"
        )
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_BOS, _EOS, _PAD, *_ROLES],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A",
        pair=f"{_BOS} $A $B",
        special_tokens=[(_BOS, tokenizer.token_to_id(_BOS))],
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_BOS,
        eos_token=_EOS,
        pad_token=_PAD,
        chat_template=_CHAT_TEMPLATE,
    )
    wrapped.save_pretrained(str(out_dir))


def _corpus() -> Iterator[str]:
    """Sources of the standard library in a fixed order, about ``_CORPUS_BYTES`` of them."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    num_bytes = 0
    for path in sorted(folder.glob("*.py")) + sorted(folder.glob("[a-z]*/*.py")):
        if num_bytes >= _CORPUS_BYTES:
            return
        if "site-packages" in path.parts:
            continue
        data = path.read_bytes()
        num_bytes += len(data)
        yield data.decode("utf-8", errors="ignore")

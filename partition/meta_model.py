"""Build a transformers causal LM on the meta device and watch one token go through it.

Nothing here knows an architecture by name: what is cached, which parameters stand before and after
the layers, and whether the attention can be replaced, is read off the modules' own forward pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from partition.errors import UnsupportedArchitectureError

ATTENTION_NAME = "giantserve"
"""The name under which our attention is registered with transformers."""

AttentionFunction = Callable[..., tuple[torch.Tensor, None]]


def _dispatch(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """Call the attention that the module's owner bound to it (see `bind_attention`)."""
    function: AttentionFunction = module.bound_attention  # type: ignore[assignment]
    return function(module, *args, **kwargs)


@dataclass(frozen=True, slots=True)
class LocalMask:
    """Given to the attention function in a mask's place: a query sees the last ``size``
    positions."""

    size: int


def _mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> LocalMask | None:
    return None if local_size is None else LocalMask(local_size)


transformers.AttentionInterface.register(ATTENTION_NAME, _dispatch)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _mask)


def bind_attention(model: nn.Module, function: AttentionFunction) -> None:
    """Make every attention module of ``model`` call ``function(module, query, key, value,
    ...)``."""
    for module in model.modules():
        module.bound_attention = function  # type: ignore[assignment]


def build_meta_model(config: Any, attention: str = ATTENTION_NAME) -> PreTrainedModel:
    """The causal LM of ``config`` on the meta device, with the attention of that registered name.

    Raises UnsupportedArchitectureError where transformers has no causal LM for the config.
    """
    if config.get_text_config() is not config:
        raise UnsupportedArchitectureError(
            f"{config.model_type} is a multimodal model; only text-only causal LMs are served"
        )
    config = type(config).from_dict(config.to_dict())
    try:
        with _quiet(), torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                config, attn_implementation=attention, dtype=config.dtype or torch.float32
            )
    except Exception as error:
        raise UnsupportedArchitectureError(
            f"transformers cannot build a causal LM from this {config.model_type} config: {error}"
        ) from error
    model.config.pad_token_id = None  # else some models look for padding in every batch
    return model.eval()


def trace(config: Any) -> tuple[PreTrainedModel, Observation]:
    """Build the model and observe one token: with our attention, or with its own where it takes
    none."""
    num_layers = int(config.num_hidden_layers)
    refusal: UnsupportedArchitectureError | None = None
    try:
        model = build_meta_model(config)
        seen = observe(model, num_layers)
        if seen.attention_modules:
            return model, seen
    except UnsupportedArchitectureError as error:
        refusal = error
    try:
        model = build_meta_model(config, "eager")
        return model, observe(model, num_layers)
    except UnsupportedArchitectureError as error:
        raise refusal or error from None


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def find_layers(model: nn.Module, num_layers: int) -> tuple[str, nn.ModuleList]:
    """The path and the list of the decoder layers: the outermost ModuleList of that length."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    if not lists:
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} has no single list of its {num_layers} layers"
        )
    return min(lists, key=lambda item: item[0].count("."))


HONOURED = {
    "scaling",
    "softcap",
    "s_aux",
    # the same in the mask, irrelevant in inference, or about kernels we do not call:
    "dropout",
    "sliding_window",
    "is_causal",
    "position_ids",
    "cache_position",
    "use_cache",
    "num_items_in_batch",
}


def refuse_unknown(module: str, mask: Any, options: dict[str, Any]) -> None:
    """Raise where a model passes its attention function something that ours would ignore."""
    unknown = sorted(
        name
        for name, value in options.items()
        if value is not None and name not in HONOURED and not name.startswith("output_")
    )
    if torch.is_tensor(mask) or unknown:
        what = ", ".join(unknown) if unknown else "a mask of its own"
        raise UnsupportedArchitectureError(
            f"{module} passes its attention {what}, which is not honoured"
        )


class CacheObserver(Cache):  # type: ignore[misc]
    """A cache that stores nothing and remembers the shapes it was given."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.last: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        self.last[layer_idx] = (key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return 0

    def get_mask_sizes(self, query_length: Any, *args: Any, **kwargs: Any) -> tuple[int, int]:
        length = query_length.shape[0] if torch.is_tensor(query_length) else query_length
        return int(length), 0

    @property
    def is_compileable(self) -> bool:
        return False


@dataclass(slots=True, kw_only=True)
class Observation:
    """What one token's pass over the meta model showed.

    ``cached`` maps a layer to the key and value shapes that went into its cache.
    ``attends_cached``: the attention function saw just those tensors, once a layer.
    ``layer_outputs``: how many values a layer returns as a tuple, 0 for a bare tensor. ``before``
    and ``after`` are the modules outside the layers that own parameters, by when they ran.
    """

    layers_path: str
    attends_cached: bool = True
    layer_outputs: int = 0
    attention_modules: dict[int, str] = field(default_factory=dict)
    cached: dict[int, tuple[torch.Size, torch.Size]] = field(default_factory=dict)
    before: set[str] = field(default_factory=set)
    after: set[str] = field(default_factory=set)


def observe(model: PreTrainedModel, num_layers: int) -> Observation:
    """Run one token through ``model`` on the meta device.

    Raises UnsupportedArchitectureError where the pass fails, or a layer keeps state that is no KV
    cache.
    """
    layers_path, layers = find_layers(model, num_layers)
    seen = Observation(layers_path=layers_path)
    names = {module: name for name, module in model.named_modules()}
    reached_layers = False

    def attention(
        module: nn.Module, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        index = int(getattr(module, "layer_idx", -1))
        refuse_unknown(
            names[module], args[0] if args else kwargs.pop("attention_mask", None), kwargs
        )
        same = cache.last.get(index, (None, None))
        seen.attends_cached &= key is same[0] and value is same[1]
        seen.attends_cached &= index not in seen.attention_modules
        seen.attention_modules[index] = names[module]
        return query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1]), None

    def enter_layer(module: nn.Module, args: Any) -> None:
        nonlocal reached_layers
        reached_layers = True

    def leave_layer(module: nn.Module, args: Any, output: Any) -> None:
        seen.layer_outputs = len(output) if isinstance(output, tuple) else 0

    def outside(module: nn.Module, args: Any) -> None:
        (seen.after if reached_layers else seen.before).add(names[module])

    bind_attention(model, attention)
    hooks = [layer.register_forward_pre_hook(enter_layer) for layer in layers]
    hooks.append(layers[0].register_forward_hook(leave_layer))
    inside = {module for layer in layers for module in layer.modules()}
    for module in model.modules():
        if module not in inside and next(module.parameters(recurse=False), None) is not None:
            hooks.append(module.register_forward_pre_hook(outside))
    cache = CacheObserver()
    experts = getattr(model.config, "_experts_implementation", None)
    model.config._experts_implementation = "batched_mm"  # the one without data-dependent shapes
    try:
        with torch.no_grad(), torch.device("meta"):
            model(
                input_ids=torch.zeros(1, 1, dtype=torch.long),
                position_ids=torch.zeros(1, 1, dtype=torch.long),
                attention_mask=None
                if model.config._attn_implementation == ATTENTION_NAME
                else torch.ones(1, 1, dtype=torch.long),
                past_key_values=cache,
                use_cache=True,
            )
    except UnsupportedArchitectureError:
        raise
    except Exception as error:
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} keeps state beside a KV cache, or cannot be traced "
            f"({type(error).__name__}: {error})"
        ) from error
    finally:
        model.config._experts_implementation = experts
        for hook in hooks:
            hook.remove()
    seen.cached = {layer: (k.shape, v.shape) for layer, (k, v) in cache.last.items()}
    if sorted(seen.cached) != list(range(num_layers)):
        raise UnsupportedArchitectureError(
            f"{type(model).__name__}: {num_layers - len(seen.cached)} of its {num_layers} layers "
            "cache no keys and values of their own"
        )
    return seen

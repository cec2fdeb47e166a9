"""How the next token is chosen, and when a sequence ends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real

from giantserve.errors import InvalidRequestError

MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 64
MAX_STOP_STRING_CHARS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIAS = 1024
MAX_TOKENS = 2**31 - 1
MIN_TEMPERATURE = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling and stopping rules of one request. Every field is honoured.

    ``temperature`` 0 is greedy, and so is anything below ``MIN_TEMPERATURE``. ``top_k`` 0 (or -1)
    and ``min_p`` 0 are off. ``seed`` makes a request reproducible whatever shares its batch; any
    integer is taken, folded to 64 bits. ``logprobs`` asks for that many alternatives beside the
    chosen token (0: the chosen one only), ``prompt_logprobs`` the same for the prompt's tokens.
    ``stop`` may be given as one string or any iterable of strings and is kept as a tuple; a stop
    string counts once its last character stands at or after the ``min_tokens``-th token.
    ``logit_bias`` maps token ids to what is added to their logits.

    Raises ``InvalidRequestError`` naming the field, its value, what is allowed and the mend.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        checked: dict[str, object] = {
            "max_tokens": _integer("max_tokens", self.max_tokens, 1, MAX_TOKENS),
            "min_tokens": _integer("min_tokens", self.min_tokens, 0, MAX_TOKENS),
            "temperature": _real("temperature", self.temperature, 0.0, 100.0),
            "top_k": max(0, _integer("top_k", self.top_k, -1, MAX_TOKENS)),
            "top_p": _real("top_p", self.top_p, 0.0, 1.0, above=True),
            "min_p": _real("min_p", self.min_p, 0.0, 1.0),
            "seed": None if self.seed is None else _seed(self.seed),
            "n": _integer("n", self.n, 1, MAX_N),
            "stop": _stop(self.stop),
            "stop_token_ids": _stop_token_ids(self.stop_token_ids),
            "logprobs": _count("logprobs", self.logprobs),
            "prompt_logprobs": _count("prompt_logprobs", self.prompt_logprobs),
            "presence_penalty": _real("presence_penalty", self.presence_penalty, -2.0, 2.0),
            "frequency_penalty": _real("frequency_penalty", self.frequency_penalty, -2.0, 2.0),
            "repetition_penalty": _real(
                "repetition_penalty", self.repetition_penalty, 0.0, 100.0, above=True
            ),
            "logit_bias": _logit_bias(self.logit_bias),
        }
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise _refused(name, getattr(self, name), "true or false")
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens is {self.min_tokens} but max_tokens is only {self.max_tokens}; "
                "lower min_tokens or raise max_tokens"
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < MIN_TEMPERATURE

    def check_vocab(self, vocab_size: int) -> None:
        """Raise ``InvalidRequestError`` for a token id outside a model of ``vocab_size`` ids."""
        for name, ids in (
            ("logit_bias", tuple(self.logit_bias)),
            ("stop_token_ids", self.stop_token_ids),
        ):
            for token_id in ids:
                if token_id >= vocab_size:
                    raise InvalidRequestError(
                        f"{name} names token {token_id}, but this model's ids are 0 to "
                        f"{vocab_size - 1}; leave that id out"
                    )


def _refused(name: str, value: object, allowed: str) -> InvalidRequestError:
    shown = repr(value)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    return InvalidRequestError(f"{name} must be {allowed}, but is {shown}; change or omit {name}")


def _integer(name: str, value: object, low: int, high: int) -> int:
    if not isinstance(value, bool) and isinstance(value, Integral) and low <= int(value) <= high:
        return int(value)
    raise _refused(name, value, f"an integer from {low} to {high}")


def _real(name: str, value: object, low: float, high: float, *, above: bool = False) -> float:
    if not isinstance(value, bool) and isinstance(value, Real):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if low <= number <= high and not (above and number == low):
            return number
    span = f"above {low:g} and up to {high:g}" if above else f"from {low:g} to {high:g}"
    raise _refused(name, value, f"a number {span}")


def _count(name: str, value: object) -> int | None:
    return None if value is None else _integer(name, value, 0, MAX_LOGPROBS)


def _seed(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise _refused("seed", value, "an integer")
    return int(value) % 2**64


def _elements(name: str, value: object, allowed: str) -> tuple[object, ...]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise _refused(name, value, allowed)
    return tuple(value)


def _stop(value: object) -> tuple[str, ...]:
    allowed = f"at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_STRING_CHARS} characters each"
    if value is None:
        return ()
    strings: list[str] = []
    for element in (value,) if isinstance(value, str) else _elements("stop", value, allowed):
        if not isinstance(element, str) or not 1 <= len(element) <= MAX_STOP_STRING_CHARS:
            raise _refused("stop", element, allowed)
        strings.append(element)
    if len(strings) > MAX_STOP_STRINGS:
        raise _refused("stop", f"{len(strings)} strings", allowed)
    return tuple(strings)


def _stop_token_ids(value: object) -> tuple[int, ...]:
    allowed = f"at most {MAX_STOP_TOKEN_IDS} token ids"
    if value is None:
        return ()
    elements = _elements("stop_token_ids", value, allowed)
    if len(elements) > MAX_STOP_TOKEN_IDS:
        raise _refused("stop_token_ids", f"{len(elements)} ids", allowed)
    return tuple(_integer("stop_token_ids", element, 0, MAX_TOKENS) for element in elements)


def _logit_bias(value: object) -> dict[int, float]:
    allowed = f"a map of at most {MAX_LOGIT_BIAS} token ids to numbers from -100 to 100"
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _refused("logit_bias", value, allowed)
    if len(value) > MAX_LOGIT_BIAS:
        raise _refused("logit_bias", f"a map of {len(value)} entries", allowed)
    return {
        _integer("logit_bias key", key, 0, MAX_TOKENS): _real(
            f"logit_bias[{key}]", bias, -100.0, 100.0
        )
        for key, bias in value.items()
    }

"""The request bodies. Every field is honoured or refused; types are strict (no bool for an int)."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from giantserve.api.messages import Message
from giantserve.sampling_params import SamplingParams

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_PROMPTS = 2048
INT64 = 2**63

# Fields of the OpenAI API that are not served, each with the value that asks for nothing.
UNSERVED_FIELDS: dict[str, object] = {
    "audio": None,
    "function_call": "none",
    "functions": [],
    "metadata": {},
    "modalities": ["text"],
    "parallel_tool_calls": None,
    "prediction": None,
    "reasoning_effort": None,
    "response_format": {"type": "text"},
    "service_tier": "auto",
    "store": False,
    "suffix": "",
    "tool_choice": "none",
    "tools": [],
    "verbosity": None,
    "web_search_options": None,
}


def _as_stop(value: object) -> object:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return []
    if not isinstance(stops, list) or not all(isinstance(item, str) and item for item in stops):
        raise ValueError("must be a non-empty string or a list of them")
    return stops


def _as_logit_bias(value: object) -> object:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError("must be an object that maps token ids to biases")
    try:
        return {int(key): bias for key, bias in value.items()}
    except ValueError:
        raise ValueError("must map token ids (whole numbers) to biases") from None


def _as_prompts(value: object) -> object:
    """One prompt or many, text or ids, as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(_is_id(item) for item in value):
            return [value]
        if all(isinstance(item, str) for item in value):
            return value
        if all(isinstance(item, list) and item and all(map(_is_id, item)) for item in value):
            return value
    raise ValueError(
        "must be a string, a list of strings, a list of token ids or of such lists, not empty"
    )


def _is_id(value: object) -> bool:
    return type(value) is int


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Body):
    """``include_usage``: a last chunk without choices carries the token counts."""

    include_usage: bool = False


class SamplingFields(_Body):
    """What both endpoints share. A null is the same as leaving the field out."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=0, lt=INT64)
    min_tokens: int = Field(default=0, ge=0, lt=INT64)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    temperature: float = Field(default=1.0, ge=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=-1, lt=INT64)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    seed: int | None = Field(default=None, ge=-INT64, lt=INT64)
    stop: Annotated[list[str], BeforeValidator(_as_stop)] = []
    stop_token_ids: list[Annotated[int, Field(ge=0, lt=INT64)]] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    repetition_penalty: float = Field(default=1.0, gt=0.0)
    logit_bias: Annotated[
        dict[Annotated[int, Field(ge=0, lt=INT64)], Annotated[float, Field(ge=-100.0, le=100.0)]],
        BeforeValidator(_as_logit_bias),
    ] = {}
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    priority: int = Field(default=0, ge=-INT64, lt=INT64)
    user: str = ""

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise ValueError("the body must be a JSON object")
        kept = {name: value for name, value in data.items() if value is not None}
        for name, neutral in UNSERVED_FIELDS.items():
            if name in kept and name not in cls.model_fields:
                if kept[name] != neutral:
                    raise ValueError(f"'{name}' is not supported by this server; leave it out")
                del kept[name]
        return kept

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' needs 'stream': true")
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("'prompt_logprobs' is not available with 'stream': true")
        return self

    def _sampling(
        self, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None
    ) -> SamplingParams:
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
            n=self.n,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            include_stop_str_in_output=self.include_stop_str_in_output,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias,
            skip_special_tokens=self.skip_special_tokens,
        )


class CompletionRequest(SamplingFields):
    """POST /v1/completions. ``max_tokens`` 0 is allowed with ``echo``: it scores the prompt."""

    prompt: Annotated[list[str] | list[list[int]], BeforeValidator(_as_prompts)] = Field(
        max_length=MAX_PROMPTS
    )
    best_of: int | None = None
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _serveable(self) -> Self:
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError(
                f"'best_of' is {self.best_of}; only the value of 'n' ({self.n}) is served"
            )
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("'max_tokens' must be at least 1 unless 'echo' is true")
        return self

    def sampling(self, max_tokens: int) -> SamplingParams:
        """``max_tokens`` as the context allows; an echo with logprobs asks for the prompt's."""
        prompt_logprobs = self.prompt_logprobs
        if self.echo and self.logprobs is not None:
            prompt_logprobs = max(self.logprobs, prompt_logprobs or 0)
        return self._sampling(max_tokens, self.logprobs, prompt_logprobs)


class ChatCompletionRequest(SamplingFields):
    """POST /v1/chat/completions. ``max_completion_tokens`` is the newer name of ``max_tokens``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=INT64)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _serveable(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("'top_logprobs' needs 'logprobs': true")
        if self.max_tokens == 0:
            raise ValueError("'max_tokens' must be at least 1")
        limits = (self.max_tokens, self.max_completion_tokens)
        if None not in limits and limits[0] != limits[1]:
            raise ValueError("'max_tokens' and 'max_completion_tokens' differ; give one of them")
        return self

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def sampling(self, max_tokens: int) -> SamplingParams:
        """``max_tokens`` as the context allows."""
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self._sampling(max_tokens, logprobs, self.prompt_logprobs)

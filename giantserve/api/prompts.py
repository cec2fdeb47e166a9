"""From what a request says to the token ids that the engine runs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from giantserve.api.engine import ServingEngine
from giantserve.api.errors import CONTEXT_LENGTH_EXCEEDED, ParameterError
from giantserve.api.generation import Prompt
from giantserve.api.messages import Message
from giantserve.api.no_tokenizer import codec_of

# Longer texts are tokenised in a thread, so that other clients' streams do not wait for them.
INLINE_CHARACTERS = 8192


async def completion_prompts(
    engine: ServingEngine, given: Sequence[str] | Sequence[list[int]], needs_text: bool
) -> list[Prompt]:
    """Tokenise texts, take ids as they are. ``needs_text``: ids are decoded for the echo."""
    codec = codec_of(engine)
    prompts = []
    for prompt in given:
        if isinstance(prompt, str):
            if len(prompt) > INLINE_CHARACTERS:
                token_ids = await asyncio.to_thread(codec.encode, prompt)
            else:
                token_ids = codec.encode(prompt)
            prompts.append(Prompt(token_ids=token_ids, text=prompt))
        else:
            text = codec.decode(prompt) if needs_text else ""
            prompts.append(Prompt(token_ids=prompt, text=text))
    if not all(prompt.token_ids for prompt in prompts):
        raise ParameterError("the prompt is empty; send at least one token", "prompt")
    return prompts


async def chat_prompt(engine: ServingEngine, messages: Sequence[Message]) -> Prompt:
    """Render the chat template and tokenise."""
    turns = [message.for_template() for message in messages]
    render = codec_of(engine).render_chat
    if sum(len(message.content) for message in messages) > INLINE_CHARACTERS:
        return Prompt(token_ids=await asyncio.to_thread(render, turns))
    return Prompt(token_ids=render(turns))


def remaining_tokens(engine: ServingEngine, prompt: Prompt, asked: int | None) -> int:
    """How many tokens may follow the prompt. Raises ParameterError where ``asked`` are too many."""
    limit, used = engine.max_model_len, len(prompt.token_ids)
    if used >= limit:
        raise ParameterError(
            f"the prompt has {used} tokens, but the context of {limit} must hold one more; "
            "shorten the prompt",
            None,
            CONTEXT_LENGTH_EXCEEDED,
        )
    if asked is not None and used + asked > limit:
        raise ParameterError(
            f"{used} prompt tokens and max_tokens {asked} exceed the context of {limit}; "
            f"ask for at most {limit - used}",
            "max_tokens",
            CONTEXT_LENGTH_EXCEEDED,
        )
    return limit - used

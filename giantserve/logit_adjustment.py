"""Penalties, biases and bans: what changes a row of logits before a token is chosen from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from giantserve.sampling_row import SamplingRow


def adjust_logits(logits_V: torch.Tensor, row: SamplingRow) -> None:
    """Apply the row's adjustments to its logits, in place.

    In this order: the repetition penalty over prompt and output (CTRL, arXiv 1909.05858: positive
    logits are divided, negative ones multiplied), the presence and frequency penalties over the
    output alone (OpenAI's definition), the logit bias, and minus infinity for the banned ids.
    """
    params = row.params
    if params.repetition_penalty != 1.0:
        seen = _ids([*row.prompt_token_ids, *row.output_token_ids], logits_V)
        logits = logits_V[seen]
        penalty = params.repetition_penalty
        logits_V[seen] = torch.where(logits < 0, logits * penalty, logits / penalty)
    if row.output_token_ids and (params.presence_penalty or params.frequency_penalty):
        seen, counts = torch.unique(_ids(row.output_token_ids, logits_V), return_counts=True)
        logits_V[seen] -= params.presence_penalty + params.frequency_penalty * counts
    if params.logit_bias:
        biases = torch.tensor(list(params.logit_bias.values()), device=logits_V.device)
        logits_V[_ids(list(params.logit_bias), logits_V)] += biases
    if row.banned_token_ids:
        vocab_size = logits_V.shape[0]
        banned = [token_id for token_id in row.banned_token_ids if token_id < vocab_size]
        logits_V[_ids(banned, logits_V)] = -torch.inf


def _ids(token_ids: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(token_ids, dtype=torch.int64, device=like.device)

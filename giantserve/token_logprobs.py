"""Log-probabilities of chosen tokens and of their alternatives, under the raw logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from giantserve.outputs import PositionLogprobs, TokenLogprob

_CHUNK_ROWS = 32


def position_logprobs(
    logits_TV: torch.Tensor, token_ids: Sequence[int], num_top: Sequence[int]
) -> list[PositionLogprobs]:
    """For each of T rows: the logprob and rank of its chosen token, and its ``num_top[t]`` best
    ones.

    Rank 1 is the most likely token; tokens of equal logits share the better rank. Works through the
    rows in chunks, so that a long prompt needs no second [T, V] tensor.
    """
    positions: list[PositionLogprobs] = []
    for start in range(0, len(token_ids), _CHUNK_ROWS):
        chunk = slice(start, start + _CHUNK_ROWS)
        positions += _chunk_logprobs(logits_TV[chunk].float(), token_ids[chunk], num_top[chunk])
    return positions


def _chunk_logprobs(
    logits_TV: torch.Tensor, token_ids: Sequence[int], num_top: Sequence[int]
) -> list[PositionLogprobs]:
    ids_T1 = torch.tensor(token_ids, dtype=torch.int64, device=logits_TV.device)[:, None]
    normaliser_T1 = logits_TV.logsumexp(dim=-1, keepdim=True)
    chosen_T1 = logits_TV.gather(1, ids_T1)
    ranks = ((logits_TV > chosen_T1).sum(dim=-1, dtype=torch.int32) + 1).tolist()
    chosen = (chosen_T1 - normaliser_T1)[:, 0].tolist()
    best_TK = logits_TV.topk(min(max(num_top), logits_TV.shape[1]), dim=-1)
    best_logprobs = (best_TK.values - normaliser_T1).tolist()
    best_ids = best_TK.indices.tolist()
    return [
        PositionLogprobs(
            chosen=TokenLogprob(token_id=token_id, logprob=logprob, rank=rank),
            top=tuple(
                TokenLogprob(token_id=best_id, logprob=best_logprob, rank=place)
                for place, (best_id, best_logprob) in enumerate(
                    zip(ids[:count], logprobs[:count], strict=True), start=1
                )
            ),
        )
        for token_id, logprob, rank, ids, logprobs, count in zip(
            token_ids, chosen, ranks, best_ids, best_logprobs, num_top, strict=True
        )
    ]

"""Random choice of tokens: temperature, top-k, top-p, min-p, then one inverse-CDF draw a row.

Shapes: R rows, V vocabulary, K candidates, C blocks of B ids. Every row is computed from itself
alone, by operations whose result does not depend on R, so a row's token is the same in any batch.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from giantserve.sampling_params import SamplingParams

_NUCLEUS_CANDIDATES = 256
_BLOCK = 256


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that ``seed`` (unsigned 64 bit) and ``position`` alone determine."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed % 2**64, position), digest_size=8).digest()
    return float((int.from_bytes(digest, "little") >> 11) * 2.0**-53)


def draw_tokens(
    logits_RV: torch.Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]
) -> list[int]:
    """One token a row, from its filtered distribution; overwrites ``logits_RV`` (float32).

    Filters compose as in transformers: temperature, then the ``top_k`` highest, then the smallest
    set with ``top_p`` of what is left, then all with at least ``min_p`` of the best one's
    probability. Tokens as likely as the last one kept are kept too, so that the result does not
    depend on a sort's tie-breaking.
    """
    probs_RV = filtered_probs(logits_RV, params)
    uniforms_R = torch.tensor(uniforms, dtype=torch.float64, device=probs_RV.device)
    return _inverse_cdf(probs_RV, uniforms_R)


def filtered_probs(logits_RV: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """The probabilities, filtered ones at zero, not renormalised; overwrites ``logits_RV``."""
    device = logits_RV.device
    temperature_R1 = torch.tensor([[p.temperature] for p in params], device=device)
    # With the maximum at zero, no temperature can overflow the quotient upwards.
    logits_RV.sub_(logits_RV.amax(dim=-1, keepdim=True)).div_(temperature_R1)
    probs_RV = logits_RV.softmax(dim=-1)
    cutoff_R = _cutoffs(probs_RV, params)
    if cutoff_R is None:
        return probs_RV
    return torch.where(probs_RV >= cutoff_R[:, None], probs_RV, 0.0)


def _cutoffs(probs_RV: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor | None:
    """The lowest probability that each row keeps, or None if no row filters anything."""
    num_vocab = probs_RV.shape[1]
    ranked = [row for row, p in enumerate(params) if 0 < p.top_k < num_vocab or p.top_p < 1.0]
    if not ranked and not any(p.min_p for p in params):
        return None
    min_p_R = torch.tensor([p.min_p for p in params], device=probs_RV.device)
    cutoff_R = min_p_R * probs_RV.amax(dim=-1)
    if ranked:
        chosen = [params[row] for row in ranked]
        probs = probs_RV if len(ranked) == len(params) else probs_RV[ranked]
        cutoff_R[ranked] = torch.maximum(cutoff_R[ranked], _ranked_cutoffs(probs, chosen))
    return cutoff_R


def _ranked_cutoffs(probs_RV: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """The lowest probability that top-k and then top-p keep, from the K highest of each row."""
    num_vocab = probs_RV.shape[1]
    ks = [p.top_k if 0 < p.top_k < num_vocab else 0 for p in params]
    num_candidates = min(num_vocab, max(*ks, 0 if all(ks) else _NUCLEUS_CANDIDATES))
    cutoff_R, is_wide_R = _candidate_cutoffs(probs_RV, params, ks, num_candidates)
    if bool(is_wide_R.any()):
        wide = is_wide_R.nonzero()[:, 0].tolist()
        wide_params = [params[row] for row in wide]
        cutoff_R[wide], _ = _candidate_cutoffs(
            probs_RV[wide], wide_params, [0] * len(wide), num_vocab
        )
    return cutoff_R


def _candidate_cutoffs(
    probs_RV: torch.Tensor, params: Sequence[SamplingParams], ks: list[int], num_candidates: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cutoffs if K candidates decide them, and which rows' nucleus is wider than K."""
    device = probs_RV.device
    top_RK = _highest(probs_RV, num_candidates)
    last_R = torch.tensor([(k or num_candidates) - 1 for k in ks], device=device)
    last_prob_R = top_RK.gather(1, last_R[:, None])[:, 0]
    is_limited_R = torch.tensor([k > 0 for k in ks], device=device)
    top_p_R = torch.tensor([p.top_p for p in params], device=device)
    if all(p.top_p >= 1.0 for p in params):
        return last_prob_R, torch.zeros_like(is_limited_R)
    cumulative_RK = top_RK.cumsum(dim=-1)
    mass_R = torch.ones_like(last_prob_R)
    if any(ks):
        num_tied_R = (probs_RV >= last_prob_R[:, None]).sum(dim=-1, dtype=torch.int32) - last_R - 1
        kept_R = cumulative_RK.gather(1, last_R[:, None])[:, 0] + num_tied_R * last_prob_R
        mass_R = torch.where(is_limited_R, kept_R, mass_R)
    needed_R = torch.where(top_p_R < 1.0, top_p_R * mass_R, torch.inf)
    # Descending: a token is in the nucleus if those above it do not yet hold the mass needed.
    nucleus_R = (cumulative_RK - top_RK < needed_R[:, None]).sum(dim=-1) - 1
    cutoff_R = top_RK.gather(1, torch.minimum(nucleus_R, last_R)[:, None])[:, 0]
    is_wide_R = ~is_limited_R & (cumulative_RK[:, -1] < needed_R)
    if num_candidates == probs_RV.shape[1]:
        is_wide_R = torch.zeros_like(is_wide_R)
    return cutoff_R, is_wide_R


def _highest(probs_RV: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` highest values of each row, descending.

    Only values: ids of equal values would come in an order that depends on ``count``. For many of
    them on a CPU, NumPy's vectorised sort takes a thirtieth of torch's time.
    """
    if probs_RV.device.type != "cpu" or count <= 1024:
        return probs_RV.topk(count, dim=-1).values
    ascending = np.sort(probs_RV.numpy(), axis=-1)[:, -count:]
    return torch.from_numpy(ascending[:, ::-1].copy())


def _inverse_cdf(weights_RV: torch.Tensor, uniforms_R: torch.Tensor) -> list[int]:
    """The id at which each row's cumulative weight, in vocabulary order, passes its uniform share.

    Two levels, so that only block sums and one block a row are accumulated in double precision.
    """
    padding = -weights_RV.shape[1] % _BLOCK
    if padding:
        weights_RV = functional.pad(weights_RV, (0, padding))
    blocks_RCB = weights_RV.view(weights_RV.shape[0], -1, _BLOCK)
    cumulative_RC = blocks_RCB.sum(dim=-1).double().cumsum(dim=-1)
    target_R1 = uniforms_R[:, None] * cumulative_RC[:, -1:]
    block_R1 = _first_above(cumulative_RC, target_R1)
    before_R1 = functional.pad(cumulative_RC, (1, -1)).gather(1, block_R1)
    rows = torch.arange(len(blocks_RCB), device=weights_RV.device)
    cumulative_RB = blocks_RCB[rows, block_R1[:, 0]].double().cumsum(dim=-1)
    offset_R1 = _first_above(cumulative_RB, target_R1 - before_R1)
    token_ids: list[int] = (block_R1 * _BLOCK + offset_R1)[:, 0].tolist()
    return token_ids


def _first_above(cumulative_RN: torch.Tensor, target_R1: torch.Tensor) -> torch.Tensor:
    """The first index whose cumulative weight exceeds the target; never one of weight zero."""
    index_R1 = torch.searchsorted(cumulative_RN, target_R1, right=True)
    last_R1 = torch.searchsorted(cumulative_RN, cumulative_RN[:, -1:].contiguous())
    return torch.minimum(index_R1, last_R1)

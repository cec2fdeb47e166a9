"""From logits to tokens, on the rank that holds the language-model head."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from giantserve.logit_adjustment import adjust_logits
from giantserve.outputs import PositionLogprobs
from giantserve.sampling_row import SamplingRow
from giantserve.step import SampledToken
from giantserve.token_draw import draw_tokens, uniform
from giantserve.token_logprobs import position_logprobs


class Sampler:
    """Chooses one token a row, from its logits and its own fields alone; keeps no state."""

    @torch.inference_mode()
    def sample(self, logits_SV: torch.Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        """The tokens of the S rows, in order. ``logits_SV`` [rows, vocabulary] is only read.

        Rows whose highest logit is not finite come back as ``overflowed``, and disturb no other.
        """
        if not rows:
            return []
        is_finite_S = logits_SV.amax(dim=-1).isfinite()
        finite: list[bool] = is_finite_S.tolist()
        if not all(finite):
            logits_SV = torch.where(is_finite_S[:, None], logits_SV, 0.0)
        token_ids = self._choose(logits_SV, rows)
        asking = [index for index, row in enumerate(rows) if row.params.logprobs is not None]
        logprobs = dict(
            zip(
                asking,
                position_logprobs(
                    logits_SV if len(asking) == len(rows) else logits_SV[asking],
                    [token_ids[index] for index in asking],
                    [rows[index].params.logprobs or 0 for index in asking],
                ),
                strict=True,
            )
        )
        return [
            SampledToken(
                seq_id=row.seq_id,
                token_id=token_id,
                logprobs=logprobs.get(index),
                overflowed=not finite[index],
            )
            for index, (row, token_id) in enumerate(zip(rows, token_ids, strict=True))
        ]

    @torch.inference_mode()
    def prompt_logprobs(
        self, logits_TV: torch.Tensor, next_token_ids: Sequence[int], k: int
    ) -> list[PositionLogprobs]:
        """Those of the T tokens that follow the T positions, with ``k`` alternatives each."""
        return position_logprobs(logits_TV, next_token_ids, [k] * len(next_token_ids))

    def _choose(self, logits_SV: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
        greedy = [index for index, row in enumerate(rows) if row.params.is_greedy]
        if len(greedy) == len(rows) and not any(row.is_adjusted for row in rows):
            plain: list[int] = logits_SV.argmax(dim=-1).tolist()
            return plain
        token_ids = [0] * len(rows)
        drawn = [index for index, row in enumerate(rows) if not row.params.is_greedy]
        if greedy:
            logits = _adjusted(logits_SV, rows, greedy)
            for index, token_id in zip(greedy, logits.argmax(dim=-1).tolist(), strict=True):
                token_ids[index] = token_id
        if drawn:
            chosen = draw_tokens(
                _adjusted(logits_SV, rows, drawn),
                [rows[index].params for index in drawn],
                [uniform(rows[index].seed, rows[index].position) for index in drawn],
            )
            for index, token_id in zip(drawn, chosen, strict=True):
                token_ids[index] = token_id
        return token_ids


def _adjusted(
    logits_SV: torch.Tensor, rows: Sequence[SamplingRow], indices: list[int]
) -> torch.Tensor:
    """A float32 copy of the given rows of logits, with their adjustments applied."""
    logits = logits_SV[indices].float()
    for place, index in enumerate(indices):
        if rows[index].is_adjusted:
            adjust_logits(logits[place], rows[index])
    return logits

"""One row of a pass's logits: whose it is and how its token is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from giantserve.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRow:
    """What the sampler needs to know of the sequence behind one row of logits.

    ``position`` is the index, within the whole sequence, of the token to be sampled; with ``seed``
    it fixes the random draw. ``prompt_token_ids`` and ``output_token_ids`` feed the penalties and
    are only read. ``banned_token_ids`` may not be chosen now.
    """

    params: SamplingParams
    seq_id: int
    seed: int
    position: int
    prompt_token_ids: Sequence[int] = ()
    output_token_ids: Sequence[int] = ()
    banned_token_ids: Sequence[int] = ()

    @property
    def is_adjusted(self) -> bool:
        """Whether penalties, biases or bans change the logits before the choice."""
        params = self.params
        return bool(
            self.banned_token_ids
            or params.logit_bias
            or params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
        )

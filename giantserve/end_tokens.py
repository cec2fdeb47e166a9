"""Which token ids end a sequence, as a checkpoint declares them."""

from __future__ import annotations

import json
from pathlib import Path

from giantserve.errors import CheckpointError


def read_end_token_ids(model_path: str | Path) -> frozenset[int]:
    """The ``eos_token_id`` of ``generation_config.json``, or else of ``config.json`` (also nested).

    One id or a list of them; empty where neither file declares any. Raises ``CheckpointError`` if a
    file cannot be read as JSON or declares something that is no token id.
    """
    for name in ("generation_config.json", "config.json"):
        path = Path(model_path) / name
        if not path.is_file():
            continue
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
        if not isinstance(config, dict):
            raise CheckpointError(f"{path} must hold a JSON object")
        text_config = config.get("text_config")
        declared = config.get("eos_token_id")
        if declared is None and isinstance(text_config, dict):
            declared = text_config.get("eos_token_id")
        if declared is not None:
            ids = declared if isinstance(declared, list) else [declared]
            if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
                raise CheckpointError(
                    f"{path}: eos_token_id is {declared!r}; it must be a token id or a list of them"
                )
            return frozenset(ids)
    return frozenset()

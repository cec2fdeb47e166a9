"""Profiles by what they were made from, so that planning a known model imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from partition import cache
from partition.profile import ModelProfile

_MADE_BY = ("meta_model.py", "parallel_plan.py", "profile.py", "profiling.py", "sharding.py")
"""The modules of this package that decide what a profile says."""


def cache_path(model: Path, dtype: str, cache_folder: Path | None = None) -> Path | None:
    """The file of the profile of a model folder; None where the folder holds no config.json.

    Its name is a hash of the config, the dtype, the versions of torch and transformers, and the
    code that profiles.
    """
    try:
        config = (model / "config.json").read_bytes()
    except OSError:
        return None
    known = hashlib.sha256(config)
    for name in _MADE_BY:
        known.update((Path(__file__).parent / name).read_bytes())
    known.update("\0".join((dtype, version("torch"), version("transformers"))).encode())
    return (cache_folder or cache.default_cache_folder()) / f"profile-{known.hexdigest()[:24]}.json"


def known_or_made(
    model: str | Path,
    dtype: str,
    trust_remote_code: bool,
    make: Callable[[], ModelProfile],
    cache_folder: Path | None = None,
) -> ModelProfile:
    """The profile of a model folder: the one that is kept, else what ``make`` returns, then kept.

    None is kept of a checkpoint that brings code of its own: the config does not say what it does.
    """
    path = None if trust_remote_code else cache_path(Path(model), dtype, cache_folder)
    if path is None:
        return make()
    profile = cache.load(ModelProfile, path)
    if profile is None:
        profile = make()
        cache.store(path, profile)
    return profile

"""Weight managers that leave nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from kvcache.arena import Arena
from kvcache.shard_store import ShardStore
from kvcache.tier import Tier
from kvcache.unit_layout import UnitLayout
from kvcache.weights import WeightManager
from tests.kvcache.weight_units import CPU, fill, open_files


@pytest.fixture
def managers(tmp_path: Path) -> Iterator[Callable[..., WeightManager]]:
    """Makes loaded managers; closes them and looks for leaks of threads, files and bytes."""
    made: list[WeightManager] = []
    arenas: list[Arena] = []
    threads, files = threading.active_count(), open_files()

    def make(
        units: list[UnitLayout],
        placements: dict[str, Tier],
        ring_units: float = 1.0,
        *,
        fill: Callable[[UnitLayout, torch.Tensor], None] = fill,
        load: Mapping[str, Any] = MappingProxyType({}),
        wait: bool = True,
        **options: Any,
    ) -> WeightManager:
        largest = max(unit.num_bytes for unit in units)
        arenas.extend((Arena(Tier.DEVICE, 8 << 20), Arena(Tier.HOST, 8 << 20)))
        manager = WeightManager(
            units=units,
            placements=placements,
            device=CPU,
            device_arena=arenas[-2],
            host_arena=arenas[-1],
            ring_bytes=int(largest * ring_units),
            store=ShardStore(tmp_path / "weights", "key"),
            **options,
        )
        made.append(manager)
        manager.load(fill, **load)
        if wait:
            manager.wait_until_loaded()
        return manager

    yield make
    for manager in made:
        manager.close()
        manager.close()
    assert [arena.used_bytes for arena in arenas] == [0] * len(arenas)
    assert (threading.active_count(), open_files()) == (threads, files)

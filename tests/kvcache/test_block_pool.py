"""Exact block ids, evictions and copies of small pools."""

from __future__ import annotations

from collections import Counter

import pytest

from kvcache.block_copy import BlockCopy
from kvcache.block_hash import DIGEST_BYTES, hash_block, tenant_of, tenant_root
from kvcache.block_pool import BlockPool, CachedBlock, after_copies
from kvcache.eviction import LeastRecentlyUsed, NextRequests
from kvcache.tier import Tier

A, B, C, D = (hash_block(tenant_root("t"), [n]) for n in range(4))


def to_host(source_id: int, target_id: int) -> BlockCopy:
    return BlockCopy(source=Tier.DEVICE, source_id=source_id, target=Tier.HOST, target_id=target_id)


def to_device(source_id: int, target_id: int) -> BlockCopy:
    return BlockCopy(source=Tier.HOST, source_id=source_id, target=Tier.DEVICE, target_id=target_id)


def allocate(pool: BlockPool, count: int) -> list[int]:
    block_ids = pool.allocate(count)
    assert block_ids is not None
    return block_ids


def test_hashes_tell_tokens_prefix_and_tenant_apart() -> None:
    root = tenant_root("a")
    first = hash_block(root, [1, 2])
    assert len(first) == DIGEST_BYTES
    assert first == hash_block(tenant_root("a"), (1, 2))
    others = [
        hash_block(tenant_root("b"), [1, 2]),
        hash_block(tenant_root(""), [1, 2]),
        hash_block(root, [2, 1]),
        hash_block(root, [1 + 2**32, 2]),
        hash_block(first, [1, 2]),
        tenant_root("a"),
    ]
    assert first not in others
    assert len(set(others)) == len(others)


def test_blocks_are_dealt_in_order_and_reused_last_first() -> None:
    pool = BlockPool(4, 0, 2)
    assert allocate(pool, 3) == [0, 1, 2]
    assert pool.num_free_device_blocks == 1
    pool.free([0, 1, 2])
    assert allocate(pool, 4) == [3, 2, 1, 0]
    assert pool.allocate(1) is None
    assert pool.take_copies() == ()
    pool.check_integrity({0: 1, 1: 1, 2: 1, 3: 1}, {})


def test_a_matched_prefix_is_shared_and_outlives_its_first_owner() -> None:
    pool = BlockPool(4, 0, 2)
    first = allocate(pool, 3)
    pool.cache_full_blocks(first[:2], [A, B])
    match = pool.match_prefix([A, B, C])
    assert match == (CachedBlock(Tier.DEVICE, 0), CachedBlock(Tier.DEVICE, 1))
    assert pool.allocate(1, match) == [0, 1, 3]
    pool.check_integrity({0: 2, 1: 2, 2: 1, 3: 1}, {})
    pool.free(first)
    pool.check_integrity({0: 1, 1: 1, 3: 1}, {})
    assert pool.num_free_device_blocks == 1
    assert pool.match_prefix([B]) == (CachedBlock(Tier.DEVICE, 1),)
    assert pool.match_prefix([C, A]) == ()


def test_an_idle_prefix_does_not_count_as_room_for_the_rest() -> None:
    pool = BlockPool(2, 0, 2)
    owned = allocate(pool, 2)
    pool.cache_full_blocks(owned, [A, B])
    pool.free(owned)
    assert pool.num_free_device_blocks == 2
    assert pool.allocate(1, pool.match_prefix([A, B])) is None
    pool.check_integrity({}, {})
    assert pool.allocate(0, pool.match_prefix([A, B])) == [0, 1]


def test_the_same_content_twice_is_cached_once() -> None:
    pool = BlockPool(3, 0, 2)
    assert allocate(pool, 2) == [0, 1]
    pool.cache_full_blocks([0], [A])
    pool.cache_full_blocks([1], [A])
    assert pool.num_cached_device_blocks == 1
    pool.free([1])
    assert pool.match_prefix([A]) == (CachedBlock(Tier.DEVICE, 0),)
    pool.check_integrity({0: 1}, {})


def test_eviction_demotes_the_least_recently_used_and_tails_before_heads() -> None:
    pool = BlockPool(3, 2, 2)
    owned = allocate(pool, 3)
    pool.cache_full_blocks(owned, [A, B, C])
    pool.free(owned)
    assert allocate(pool, 1) == [2]
    assert pool.take_copies() == (to_host(2, 0),)
    assert allocate(pool, 1) == [1]
    assert pool.take_copies() == (to_host(1, 1),)
    assert pool.match_prefix([A, B, C]) == (
        CachedBlock(Tier.DEVICE, 0),
        CachedBlock(Tier.HOST, 1),
        CachedBlock(Tier.HOST, 0),
    )
    assert allocate(pool, 1) == [0]
    assert pool.take_copies() == (to_host(0, 0),), "the host's oldest, C, makes room for A"
    assert pool.match_prefix([A, B, C]) == (CachedBlock(Tier.HOST, 0), CachedBlock(Tier.HOST, 1))
    assert pool.num_free_host_blocks == 2
    pool.check_integrity({0: 1, 1: 1, 2: 1}, {})


def test_without_host_blocks_eviction_loses_the_content() -> None:
    pool = BlockPool(1, 0, 2)
    pool.cache_full_blocks(allocate(pool, 1), [A])
    pool.free([0])
    assert allocate(pool, 1) == [0]
    assert pool.take_copies() == ()
    assert pool.match_prefix([A]) == ()


def test_a_host_hit_is_promoted_and_stays_on_the_host() -> None:
    pool = BlockPool(2, 2, 2)
    pool.cache_full_blocks(allocate(pool, 1), [A])
    pool.free([0])
    assert allocate(pool, 2) == [1, 0]
    assert pool.take_copies() == (to_host(0, 0),)
    pool.free([1, 0])
    match = pool.match_prefix([A])
    assert match == (CachedBlock(Tier.HOST, 0),)
    assert pool.allocate(1, match) == [0, 1]
    assert pool.take_copies() == (to_device(0, 0),)
    assert pool.match_prefix([A]) == (CachedBlock(Tier.DEVICE, 0),)
    pool.free([0, 1])
    assert allocate(pool, 2) == [1, 0]
    assert pool.take_copies() == (), "the host has A already: evicting it again copies nothing"
    assert pool.match_prefix([A]) == (CachedBlock(Tier.HOST, 0),)


def test_promotion_never_overwrites_the_host_block_it_reads() -> None:
    pool = BlockPool(2, 1, 2)
    pool.cache_full_blocks(allocate(pool, 1), [A])
    pool.free([0])
    assert allocate(pool, 2) == [1, 0]  # demotes A to the only host block
    pool.cache_full_blocks([0, 1], [B, C])
    pool.free([1, 0])
    pool.take_copies()
    # Room for A must come from evicting B, which finds the host block pinned and is lost.
    assert pool.allocate(0, pool.match_prefix([A])) == [0]
    assert pool.take_copies() == (to_device(0, 0),)
    assert pool.match_prefix([B]) == ()
    pool.check_integrity({0: 1}, {})


def test_swap_out_and_in_keep_every_block() -> None:
    pool = BlockPool(3, 3, 2)
    owned = allocate(pool, 3)
    pool.cache_full_blocks(owned[:2], [A, B])
    assert pool.swap_out(owned) == [0, 1, 2]
    assert pool.take_copies() == (to_host(0, 0), to_host(1, 1), to_host(2, 2))
    assert (pool.num_free_device_blocks, pool.num_free_host_blocks) == (3, 0)
    pool.check_integrity({}, {0: 1, 1: 1, 2: 1})
    assert allocate(pool, 2) == [2, 1]  # B's device copy goes; its host block is held, A stays
    assert pool.swap_in([0, 1, 2], 0) is None
    pool.free([1])
    pool.free([2])
    assert pool.swap_in([0, 1, 2], 1) is None
    assert pool.swap_in([0, 1, 2], 0) == [0, 1, 2]
    assert pool.take_copies() == (to_device(1, 1), to_device(2, 2)), "A never left the device"
    assert pool.num_free_host_blocks == 3
    pool.check_integrity({0: 1, 1: 1, 2: 1}, {})


def test_swapping_two_sharers_copies_the_shared_block_once() -> None:
    pool = BlockPool(3, 3, 2)
    first = allocate(pool, 2)
    pool.cache_full_blocks(first[:1], [A])
    second = pool.allocate(1, pool.match_prefix([A]))
    assert second == [0, 2]
    assert pool.swap_out(first) == [0, 1]
    assert pool.swap_out(second) == [0, 2]
    assert pool.take_copies() == (to_host(0, 0), to_host(1, 1), to_host(2, 2))
    pool.check_integrity({}, {0: 2, 1: 1, 2: 1})
    pool.free_host([0, 1])
    pool.check_integrity({}, {0: 1, 2: 1})


def test_swap_out_without_room_changes_nothing() -> None:
    pool = BlockPool(3, 2, 2)
    owned = allocate(pool, 3)
    assert pool.swap_out(owned) is None
    assert pool.take_copies() == ()
    pool.check_integrity(Counter(owned), {})


def test_caching_can_be_off() -> None:
    pool = BlockPool(1, 1, 2, enable_prefix_caching=False)
    pool.cache_full_blocks(allocate(pool, 1), [A])
    assert pool.match_prefix([A]) == ()
    pool.free([0])
    allocate(pool, 1)
    assert pool.take_copies() == ()


def test_misuse_is_caught() -> None:
    with pytest.raises(ValueError, match="0 device, 1 host and 0 rotating blocks of 2 tokens"):
        BlockPool(0, 1, 2)
    pool = BlockPool(2, 0, 2)
    pool.free(allocate(pool, 1))
    with pytest.raises(AssertionError, match="block 0 is freed twice"):
        pool.free([0])
    with pytest.raises(AssertionError, match="block 0 is registered but not held"):
        pool.cache_full_blocks([0], [D])
    allocate(pool, 1)
    with pytest.raises(AssertionError, match="block 1 counts 1 of 0 holders"):
        pool.check_integrity({}, {})


def test_rotating_blocks_are_dealt_out_when_the_device_is_held() -> None:
    pool = BlockPool(2, 0, 2, num_rotating_blocks=2)
    assert allocate(pool, 3) == [0, 1, 2]
    assert (pool.num_free_device_blocks, pool.num_free_active_blocks) == (0, 1)
    pool.free([1, 2])
    assert allocate(pool, 1) == [1]
    assert allocate(pool, 2) == [3, 2]
    assert pool.allocate(1) is None
    assert pool.num_active_blocks == 4
    pool.check_integrity(dict.fromkeys(range(4), 1), {})


def across(source_id: int, target_id: int) -> BlockCopy:
    """Between a device block and a rotating one."""
    return BlockCopy(
        source=Tier.DEVICE, source_id=source_id, target=Tier.DEVICE, target_id=target_id
    )


def test_content_sinks_tier_by_tier_and_the_oldest_is_lost_at_the_bottom() -> None:
    pool = BlockPool(1, 1, 2, num_rotating_blocks=1)
    copies = []
    for content in (A, B, C):
        pool.cache_full_blocks(allocate(pool, 1), [content])
        pool.free([0])
        copies.append(pool.take_copies())
    assert copies == [(), (to_host(0, 0),), (to_device(0, 1), to_host(0, 0))]
    assert pool.match_prefix([C, B, A]) == (
        CachedBlock(Tier.DEVICE, 0),
        CachedBlock(Tier.HOST, 0),
        CachedBlock(Tier.DEVICE, 1),
    )
    assert allocate(pool, 1) == [0]
    assert pool.take_copies() == (to_device(0, 1), to_host(0, 0))
    assert pool.match_prefix([A]) == ()
    assert pool.match_prefix([C, B]) == (CachedBlock(Tier.HOST, 0), CachedBlock(Tier.DEVICE, 1))
    pool.check_integrity({0: 1}, {})


def test_rotating_content_comes_up_where_the_whole_sequence_finds_room() -> None:
    pool = BlockPool(2, 0, 2, num_rotating_blocks=2)
    pool.cache_full_blocks(allocate(pool, 2), [A, B])
    pool.free([0, 1])
    assert allocate(pool, 2) == [1, 0]
    assert pool.take_copies() == (across(1, 2), across(0, 3))
    match = pool.match_prefix([A, B])
    assert match == (CachedBlock(Tier.DEVICE, 3), CachedBlock(Tier.DEVICE, 2))
    assert pool.allocate(0, match) == [3, 2], "the device is held: they rotate"
    pool.free([3, 2])
    pool.free([1])
    assert pool.allocate(0, match) == [3, 2], "one block has room, the other not: both rotate"
    pool.free([3, 2])
    pool.free([0])
    assert pool.take_copies() == ()
    assert pool.allocate(0, match) == [1, 0]
    assert pool.take_copies() == (across(3, 1), across(2, 0))
    assert pool.find(A) == [CachedBlock(Tier.DEVICE, 1), CachedBlock(Tier.DEVICE, 3)]
    pool.check_integrity({0: 1, 1: 1}, {})
    both = {CachedBlock(Tier.DEVICE, 1), CachedBlock(Tier.DEVICE, 3)}
    assert pool.forget([CachedBlock(Tier.DEVICE, 3)]) == both
    assert pool.match_prefix([A]) == ()


def test_a_tenant_cannot_fill_the_cache() -> None:
    pool = BlockPool(4, 0, 2, tenant_share=0.5)
    mine = [hash_block(tenant_root("mine"), [n]) for n in range(3)]
    pool.cache_full_blocks(allocate(pool, 1), [A])
    pool.cache_full_blocks(allocate(pool, 3), mine)
    pool.free([0])
    assert pool.num_cached_device_blocks == 4, "what is held is not counted"
    pool.free([1, 2, 3])
    assert pool.match_prefix([A]) and pool.match_prefix(mine[:2])
    assert pool.match_prefix(mine[2:]) == (), "two of four blocks: the third, freed first, is gone"
    assert (pool.num_cached_device_blocks, pool.num_free_device_blocks) == (3, 4)
    assert allocate(pool, 1) == [3]
    pool.check_integrity({3: 1}, {})


def test_hashes_name_their_tenant() -> None:
    first = hash_block(tenant_root("a"), [1])
    assert tenant_of(hash_block(first, [2])) == tenant_of(first) == tenant_of(tenant_root("a"))
    assert tenant_of(first) != tenant_of(tenant_root("b"))


def _three_cached(pool: BlockPool) -> None:
    owned = allocate(pool, 3)
    pool.cache_full_blocks(owned, [A, B, C])
    pool.free(owned)  # C was used longest ago


def test_what_the_next_requests_want_stays() -> None:
    pool = BlockPool(3, 0, 2, policy=NextRequests())
    _three_cached(pool)
    pool.expect([[C], [B]])
    pool.check_integrity({}, {})
    assert allocate(pool, 1) == [0]  # A, which nobody wants
    assert allocate(pool, 1) == [1]  # B, which is wanted later
    assert pool.match_prefix([C]) == (CachedBlock(Tier.DEVICE, 2),)
    pool.check_integrity({0: 1, 1: 1}, {})


def test_what_nobody_wants_any_more_goes_in_its_turn() -> None:
    pool = BlockPool(3, 0, 2, policy=NextRequests())
    _three_cached(pool)
    pool.expect([[C, B, A]])
    pool.expect([])
    pool.check_integrity({}, {})
    assert pool.num_free_device_blocks == 3
    pool.expect([[A]])
    assert sorted(allocate(pool, 2)) == [1, 2]


def test_content_is_wanted_on_every_tier_and_when_it_comes_later() -> None:
    pool = BlockPool(2, 2, 2, policy=NextRequests())
    owned = allocate(pool, 2)
    pool.cache_full_blocks(owned, [A, B])
    pool.expect([[B]])
    pool.free(owned)
    assert allocate(pool, 2) == [0, 1]  # both sink, A first
    pool.check_integrity({0: 1, 1: 1}, {})
    pool.cache_full_blocks([0, 1], [C, D])
    pool.free([0, 1])
    assert allocate(pool, 1) == [1]  # D takes A's place on the host, not B's
    assert pool.find(B) == [CachedBlock(Tier.HOST, 1)]
    assert pool.find(A) == []


def test_least_recently_used_hears_of_nothing() -> None:
    pool = BlockPool(3, 0, 2, policy=LeastRecentlyUsed())
    _three_cached(pool)
    pool.expect([[C]])
    assert allocate(pool, 1) == [2]


def rotating_with(contents: dict[int, bytes], device: int = 2, host: int = 2) -> BlockPool:
    """Its four rotating blocks are 2 to 5, of which the first two lie on the host."""
    pool = BlockPool(device, host, 2, num_rotating_blocks=4)
    pool.adopt(contents)
    return pool


def cache_on_device(pool: BlockPool, *hashes: bytes) -> list[int]:
    block_ids = allocate(pool, len(hashes))
    pool.cache_full_blocks(block_ids, hashes)
    pool.free(block_ids)
    return block_ids


def test_what_rotates_on_the_host_is_kept_on_the_disk() -> None:
    pool = rotating_with({2: A, 5: B, 3: C})
    assert pool.keep(4) == {5: B, 4: C}
    assert pool.take_copies() == (across(3, 4),)
    pool.check_integrity({}, {})


def test_nothing_is_kept_where_there_is_no_disk() -> None:
    pool = rotating_with({2: A})
    assert pool.keep(6) == {}
    assert pool.take_copies() == ()


def test_what_was_used_last_is_kept_whatever_its_place_on_the_disk() -> None:
    """A has been on the disk for long, but it was used last, on the device; B is older than C."""
    pool = rotating_with({5: A, 4: B})
    assert cache_on_device(pool, A, C) == [0, 1]
    assert pool.keep(4) == {4: C, 5: A}
    assert pool.take_copies() == (across(1, 4),)
    pool.check_integrity({}, {})


def test_what_is_kept_fills_blank_places_first() -> None:
    pool = rotating_with({5: A})
    cache_on_device(pool, B)
    assert pool.keep(4) == {5: A, 4: B}
    assert pool.take_copies() == (across(0, 4),)


def test_a_place_that_loses_its_content_again_is_dealt_out_last() -> None:
    pool = rotating_with({2: A, 3: B, 4: C})
    lost = [CachedBlock(Tier.DEVICE, 5)]
    held = allocate(pool, 2)
    assert allocate(pool, 1) == [5]
    pool.count_losses(lost)
    pool.free([5])
    assert allocate(pool, 1) == [5], "once may be an accident"
    pool.count_losses(lost)
    assert pool.num_suspect_blocks == 1
    pool.check_integrity(dict.fromkeys([*held, 5], 1), {})
    pool.cache_full_blocks([5], [D])
    assert pool.find(D) == []
    pool.free([5])
    pool.check_integrity(dict.fromkeys(held, 1), {})
    assert pool.num_free_active_blocks == 4
    assert allocate(pool, 4) == [2, 3, 4, 5], "cached content goes first"
    pool.free([5])
    assert pool.keep(4) == {}
    pool.count_losses([CachedBlock(Tier.HOST, 1), CachedBlock(Tier.DEVICE, 0)] * 2)
    assert pool.num_suspect_blocks == 1


def test_a_free_place_can_become_suspect() -> None:
    pool = rotating_with({5: A})
    for _ in range(2):
        pool.count_losses([CachedBlock(Tier.DEVICE, 5)])
    assert pool.find(A) == []
    pool.check_integrity({}, {})
    assert allocate(pool, 6) == [0, 1, 2, 3, 4, 5]


def test_lost_content_goes_where_copies_take_it_and_not_where_they_replace_it() -> None:
    host, disk, device = (
        CachedBlock(Tier.HOST, 0),
        CachedBlock(Tier.DEVICE, 2),
        CachedBlock(Tier.DEVICE, 0),
    )

    def copy(source: CachedBlock, target: CachedBlock) -> BlockCopy:
        return BlockCopy(
            source=source.tier,
            source_id=source.block_id,
            target=target.tier,
            target_id=target.block_id,
        )

    assert after_copies([disk], [copy(disk, host)], [copy(host, device)]) == {disk, host, device}
    assert after_copies([host], [copy(host, disk), copy(device, host)], []) == {host}
    assert after_copies([host], [copy(device, host)], [copy(host, disk)]) == {host, disk}
    assert after_copies([disk, host], [], [copy(device, disk), copy(disk, device)]) == {host}

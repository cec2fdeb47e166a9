from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from partition.sharding import Deal, HeadCounts, ShardRule, deal_ranges

heads_and_world = st.tuples(st.integers(1, 8), st.integers(1, 8)).flatmap(
    lambda pair: st.tuples(
        st.just(HeadCounts(query=pair[0] * pair[1], key_value=pair[0])),
        st.integers(1, pair[0] * pair[1]),
    )
)


@given(size=st.integers(1, 100), world=st.integers(1, 16), segments=st.integers(1, 3))
def test_even_deals_every_element_once(size: int, world: int, segments: int) -> None:
    rule = ShardRule(dim=0, segments=segments)
    heads = HeadCounts(query=1, key_value=1)
    dealt = [
        element
        for rank in range(world)
        for start, stop in deal_ranges(rule, size * segments, heads, rank, world)
        for element in range(start, stop)
    ]
    assert sorted(dealt) == list(range(size * segments))


@given(heads_and_world, st.integers(1, 4))
def test_query_heads_are_dealt_once_and_see_their_key_value_heads(
    pair: tuple[HeadCounts, int], width: int
) -> None:
    heads, world = pair
    group = heads.query // heads.key_value
    queries: list[int] = []
    covered: set[int] = set()
    for rank in range(world):
        start, stop = heads.query_range(rank, world)
        kv_start, kv_stop = heads.key_value_range(rank, world)
        queries += range(start, stop)
        covered |= set(range(kv_start, kv_stop))
        # GQA: each of the rank's queries attends to a KV head that the rank holds
        assert {query // group for query in range(start, stop)} == set(range(kv_start, kv_stop))
        for deal, held in (
            (Deal.QUERY_HEADS, (start, stop)),
            (Deal.KEY_VALUE_HEADS, (kv_start, kv_stop)),
        ):
            count = heads.query if deal is Deal.QUERY_HEADS else heads.key_value
            ranges = deal_ranges(ShardRule(dim=0, deal=deal), count * width, heads, rank, world)
            assert ranges == [(held[0] * width, held[1] * width)]
    assert queries == list(range(heads.query))
    assert covered == set(range(heads.key_value))

"""How weights are divided among processes, and what of parts that overlap is kept."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fourbit.checkpoint.file_layout import Item, Part, Shard
from fourbit.checkpoint.parts import Part as Written
from fourbit.checkpoint.parts import Span, _without_overlaps, divided, gaps, planned

SIZES = st.lists(st.lists(st.integers(1, 1000), max_size=12), min_size=1, max_size=4)


def shards_of(sizes):
    def item(name, nbytes):
        return Item(name, False, (Part(name, torch.uint8, (nbytes,), nbytes),))

    return [
        Shard(f"{i}", b"", tuple(item(f"{i}.{j}", nbytes) for j, nbytes in enumerate(each)))
        for i, each in enumerate(sizes)
    ]


@st.composite
def spans(draw, sizes):
    """Parts of some of the items, without overlaps, in order."""
    found = []
    for number, each in enumerate(sizes):
        cuts = sorted(draw(st.sets(st.integers(0, len(each)), max_size=6)))
        found += [planned(Span(number, a, b), "f" * 16) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
    return found


@given(st.data(), SIZES, st.integers(1, 9))
def test_each_item_is_one_process_s_and_bytes_are_even(data, sizes, count):
    shards = shards_of(sizes)
    there = data.draw(spans(sizes))
    todo = gaps(shards, there)
    found = divided(todo, shards, count, lambda item: item.nbytes)
    assert len(found) == count
    flat = [(span.shard, i) for each in found for span in each for i in range(span.first, span.stop)]
    kept = [(part.span.shard, i) for part in there for i in range(part.span.first, part.span.stop)]
    assert flat == sorted(flat) and sorted(flat + kept) == [
        (s, i) for s, each in enumerate(sizes) for i in range(len(each))
    ]
    loads = [sum(sizes[span.shard][i] for span in each for i in range(span.first, span.stop)) for each in found]
    largest = max((sizes[s][i] for s, i in flat), default=0)
    assert all(load <= sum(loads) / count + largest for load in loads)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 9), st.integers(1, 5), st.booleans()), max_size=8))
def test_nothing_is_kept_twice(drawn):
    found = [
        Written(Span(shard, first, first + length), f"{i:016x}", first + length + open_ended)
        for i, (shard, first, length, open_ended) in enumerate(drawn)
    ]
    kept = _without_overlaps(found)
    items = [(part.span.shard, i) for part in kept for i in range(part.span.first, part.span.stop)]
    assert len(items) == len(set(items)) and items == sorted(items)
    all_items = {(part.span.shard, i) for part in found for i in range(part.span.first, part.span.stop)}
    assert set(items) <= all_items
    for part in kept:
        whole = next(each for each in found if each.run == part.run)
        assert part.span.first == whole.span.first and part.span.stop <= whole.span.stop
        if part.sealed:  # nobody writes it any more, and all of it counts
            assert whole.sealed and part == whole


def test_what_was_being_put_together_is_all_kept():
    """The first part had got a piece of the second when the process was killed."""
    first = Written(Span(0, 0, 7), "0" * 16, 10)
    second = planned(Span(0, 5, 10), "0" * 16)
    assert [part.span for part in _without_overlaps([second, first])] == [Span(0, 0, 5), Span(0, 5, 10)]

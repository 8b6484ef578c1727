"""What was used last stays, within both bounds."""

from metaflow_hf.data.cache import BoundedCache


def test_what_was_used_last_stays():
    cache = BoundedCache(max_items=2, max_bytes=100)
    cache.put("a", 1, 10)
    cache.put("b", 2, 10)
    assert cache.get("a") == 1
    cache.put("c", 3, 10)
    assert [cache.get(key) for key in "abc"] == [1, None, 3]


def test_bytes_are_bounded_and_counted_anew_for_a_value_put_again():
    cache = BoundedCache(max_items=10, max_bytes=100)
    for _ in range(5):
        cache.put("a", 1, 60)
    cache.put("b", 2, 40)
    assert (cache.get("a"), cache.get("b")) == (1, 2)
    cache.put("c", 3, 41)
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (None, 2, 3)


def test_what_is_larger_than_the_cache_drives_nothing_out():
    cache = BoundedCache(max_items=10, max_bytes=100)
    cache.put("a", 1, 60)
    cache.put("b", 2, 101)
    assert (cache.get("a"), cache.get("b")) == (1, None)
    cache.put("a", 1, 101)
    assert cache.get("a") is None


def test_a_cleared_cache_has_all_its_room():
    cache = BoundedCache(max_items=10, max_bytes=100)
    cache.put("a", 1, 60)
    cache.clear()
    assert cache.get("a") is None
    cache.put("b", 2, 60)
    cache.put("c", 3, 40)
    assert (cache.get("b"), cache.get("c")) == (2, 3)

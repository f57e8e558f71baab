"""Shards: complete or absent, never half, never wrong."""

import shutil
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitalloc.errors import BitallocError
from bitalloc.store import Store, digest, write_atomically

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_equal_values_have_equal_digests_whatever_came_before(value):
    assert digest(value) == digest(value)
    assert digest([value]) != digest([value, value])


@pytest.fixture
def shard(tmp_path):
    store, key = Store(tmp_path / "store"), digest("work")
    store.put(key, {"rel_error": 0.125, "nbytes": 3}, tensors=b"tensors")
    return store, key


def test_round_trip(shard):
    store, key = shard
    assert store.get(key) == {"rel_error": 0.125, "nbytes": 3}
    assert store.tensors(key).read_bytes() == b"tensors"
    assert store.get(digest("other")) is None


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@pytest.mark.parametrize("harm", ["truncate", "flip", "remove"])
def test_a_harmed_shard_counts_as_absent(shard, suffix, harm):
    store, key = shard
    path = store.path(key, suffix)
    data = path.read_bytes()
    if harm == "remove":
        path.unlink()
    else:
        path.write_bytes(data[:-2] if harm == "truncate" else data.replace(b"5", b"6").replace(b"t", b"u"))
    assert store.get(key) is None


def test_a_shard_under_a_foreign_name_counts_as_absent(shard):
    store, key = shard
    other = digest("other")
    store.path(other).parent.mkdir(parents=True, exist_ok=True)
    store.path(other).write_bytes(store.path(key).read_bytes())
    assert store.get(other) is None


def test_nan_is_never_stored(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        Store(tmp_path).put(digest("x"), {"rel_error": float("nan")})
    assert not list(tmp_path.rglob("*.json"))


def test_a_store_is_itself_and_no_other(tmp_path):
    store = Store(tmp_path / "store")
    first = store.identity()
    assert store.identity() == Store(tmp_path / "x" / ".." / "store").identity() == first
    shutil.copytree(store.root, tmp_path / "copy")
    assert Store(tmp_path / "copy").identity() != first
    store.forget()
    second = store.identity()
    shutil.rmtree(store.root)
    assert len({first, second, store.identity()}) == 3


def test_one_at_a_time_does_the_same_work(tmp_path, monkeypatch):
    store, said, order = Store(tmp_path), threading.Event(), []
    monkeypatch.setattr("bitalloc.store.print", lambda line, **_: (order.append(line), said.set()), raising=False)

    def second():
        with store.lock(digest("work"), "waiting"):
            order.append("second")

    with store.lock(digest("work"), "waiting"), store.lock(digest("other"), "other"):
        thread = threading.Thread(target=second)
        thread.start()
        assert said.wait(30)
        order.append("first")
    thread.join(30)
    assert order == ["waiting", "first", "second"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "table"
    write_atomically(path, b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(BitallocError, match="No space left on device; free space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["table"]

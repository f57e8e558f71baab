"""Shards: complete or absent, never half, never wrong."""

import os
import platform
import shutil
import signal
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitalloc.errors import BitallocError
from bitalloc.lock import Lock
from bitalloc.store import Ledger, Store, digest, write_atomically
from tests.permissions import bound

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


HOLD = """
import sys, time
from pathlib import Path
from bitalloc.store import Store, digest
with Store(Path(sys.argv[1])).lock(digest("work"), ""):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def held(tmp_path):
    """A process that holds the lock of some work."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def taken(store) -> bool:
    """Whether the lock can be had at once, or once a void one has been cleared away."""
    lock = Lock(store.root / "locks" / f"{digest('work')[:24]}.lock")
    got = lock.take() or lock.take()
    if got:
        lock.release()
    return got


def test_a_lock_lasts_as_long_as_its_process_and_not_longer(tmp_path, held, monkeypatch):
    monkeypatch.setattr("bitalloc.lock.STALE_S", 60)
    assert not taken(Store(tmp_path))
    os.kill(held.pid, signal.SIGSTOP)
    assert not taken(Store(tmp_path))
    held.kill()
    held.wait()
    assert taken(Store(tmp_path))
    assert not list((tmp_path / "locks").iterdir())


def test_a_lock_of_another_machine_is_void_once_it_does_not_change(tmp_path, held, monkeypatch):
    monkeypatch.setattr("bitalloc.lock._machine", lambda: "another machine")
    os.kill(held.pid, signal.SIGSTOP)  # it does not renew the lock between two looks
    lock = Lock(tmp_path / "locks" / f"{digest('work')[:24]}.lock")
    for waited, beat in ((0, False), (59, False), (61, True), (122, False)):
        monkeypatch.setattr("time.monotonic", lambda waited=waited: 1000.0 + waited)
        if beat:
            os.utime(lock.path, (1, 1))  # by a clock that is decades off
        assert not lock.take()
    assert lock.take()  # 61 s without a beat: cleared away
    held.kill()
    held.wait()
    lock.release()


def test_of_many_that_clear_a_void_lock_away_one_gets_it(tmp_path):
    path = tmp_path / "lock"
    for _ in range(20):
        path.write_text("")
        locks, got = [Lock(path) for _ in range(4)], []

        def race(lock, got=got):
            for _ in range(3):
                if lock.take():
                    got.append(lock)
                    return

        threads = [threading.Thread(target=race, args=(lock,)) for lock in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 1
        got[0].release()
        assert not list(tmp_path.iterdir())


def test_one_that_was_killed_while_it_cleared_a_lock_away_does_not_stop_the_others(tmp_path, monkeypatch):
    path, guard = tmp_path / "lock", tmp_path / ".lock.clearing"
    path.write_text("")
    guard.touch()
    lock = Lock(path)
    assert not lock.take() and not lock.take() and guard.exists()
    monkeypatch.setattr("bitalloc.lock.STALE_S", 0)
    assert not lock.take() and not guard.exists()
    assert not lock.take() and lock.take()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_goes_with_the_next_attempt_and_nothing_else(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    here = platform.node()
    names = [f".{name}.{host}.{pid}.tmp" for name, host, pid in (
        ("table", here, process.pid), ("table", here, os.getppid()), ("table", "afar", process.pid),
        ("other", here, process.pid),
    )]  # fmt: skip
    for name in names:
        (tmp_path / name).write_text("half")
    write_atomically(tmp_path / "table", b"whole")
    assert {path.name for path in tmp_path.iterdir()} == {"table", *names[1:]}


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


READ_THEN_WRITE = """
import sys
from pathlib import Path
from bitalloc.store import Store, digest
store = Store(Path(sys.argv[1]))
print(store.get(digest("work")))
for attempt in (lambda: store.put(digest("more"), {}), lambda: store.lock(digest("more"), "").__enter__()):
    try:
        attempt()
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_a_store_that_cannot_be_written_is_read_and_refuses_in_one_line(shard):
    store, _ = shard
    store.root.chmod(0o555)
    command = bound(sys.executable, "-c", READ_THEN_WRITE, str(store.root))
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    store.root.chmod(0o755)
    assert lines[0] == "{'nbytes': 3, 'rel_error': 0.125}"
    for line, place in zip(lines[1:], (store.path(digest("more")), store.root / "locks"), strict=True):
        assert line.startswith(f"BitallocError cannot write {place}")
        assert "Permission denied; free space or fix permissions" in line


def test_a_ledger_has_every_batch_that_was_finished_and_heals(tmp_path, capsys):
    store, key = Store(tmp_path), digest("plan and task")
    assert Ledger(store, key).records == {}
    first, second = Ledger(store, key), Ledger(store, key)  # two runs with the same work
    first.add({"a": {"nll": 0.1}, "b": {"nll": 0.2}})
    second.add({"c": {"nll": 0.3}})
    whole = {name: {"nll": value} for name, value in (("a", 0.1), ("b", 0.2), ("c", 0.3))}
    assert Ledger(store, key).records == whole
    with first.path.open("ab") as file:
        file.write(b'{"records":{"d":')  # killed while it wrote
    assert Ledger(store, key).records == whole
    assert f"1 of 3 batches in {first.path} are damaged; their items are computed again" in capsys.readouterr().err
    first.add({"d": {"nll": 0.4}})
    first.path.write_bytes(first.path.read_bytes().replace(b"0.2", b"0.7"))
    assert sorted(Ledger(store, key).records) == ["c", "d"]  # a batch stands or falls as a whole
    assert "1 of 3" in capsys.readouterr().err
    assert sorted(Ledger(store, key).records) == ["c", "d"] and not capsys.readouterr().err


def test_a_ledger_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "store").write_text("a file")
    with pytest.raises(BitallocError, match=r"cannot write .*jsonl: .*; free space or fix permissions, then rerun"):
        Ledger(Store(tmp_path / "store"), digest("x")).add({})

"""The sandbox: what a program cannot do, what it cannot fake, and that nothing runs where it cannot be contained."""

import os
import struct
import subprocess
import sys
import time
from collections import Counter, namedtuple
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitalloc import sandbox
from bitalloc.errors import BitallocError
from bitalloc.sandbox import Limits, inside, seccomp


def _refusal() -> str:
    try:
        sandbox.backend()
    except BitallocError as error:
        return str(error)
    return ""


REFUSAL = _refusal()
contained = pytest.mark.skipif(bool(REFUSAL), reason=REFUSAL or "contained")

# every program says that it got as far as the attempt, and how that ended
ATTEMPTS = {
    "network": "import socket; socket.create_connection(('1.1.1.1', 53), 1)",
    "local socket": "import socket; socket.socket(socket.AF_UNIX)",
    "fork": "os.fork()",
    "fork bomb": "while True: os.fork()",
    "thread": "import threading; threading.Thread(target=print).start()",
    "another program": "import subprocess; subprocess.run([sys.executable, '-c', ''])",
    "shell": "os.execv('/bin/sh', ['sh'])",
    "write at the root": "open('/file', 'w')",
    "write to the library": "open(os.__file__, 'a')",
    "large file": "open('file', 'wb').write(bytes(2**23))",
    "many files": "for n in range(99): open(str(n), 'wb').write(bytes(2**20))",
    "files of the parent": "open(SECRET)",
    "write to files of the parent": "open(SECRET, 'a')",
    "model files": "open(MODEL, 'rb')",
    "proc": "os.listdir('/proc')",
    "environment of the parent": "open(f'/proc/{PARENT}/environ')",
    "own descriptors": "os.listdir('/proc/self/fd')",
    "open descriptors": "[os.fstat(fd) for fd in range(3, 99)]",
    "kill the parent": "os.kill(PARENT, 9)",
    "kill all": "os.kill(-1, 9)",
    "raise a limit": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "memory outside the address space": "os.memfd_create('more')",
    "shared memory": "call('shmget', 0, 2**30, 0o1600)",
    "new namespaces": "call('unshare', 0x10000000)",
    "trace": "call('ptrace', 16, 1, 0, 0)",
    "mount": "call('mount', None, b'/box', b'tmpfs', 0, None)",
    "type into the terminal": "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSTI, b'x')",
    "input": "input()",
}  # fmt: skip

ATTEMPT = """
import ctypes, os, sys
def call(name, *arguments):
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), name)
print("tried", flush=True)
try:
    {attempt}
    print("escaped")
except (OSError, RuntimeError, ValueError, EOFError):
    print("refused")
"""


@contained
@pytest.mark.parametrize("name", ATTEMPTS)
def test_no_way_out(name, tmp_path):
    secret, model = tmp_path / "secret", Path(__file__).parents[1] / "resources/tiny/model.safetensors"
    secret.write_text("secret")
    given = f"PARENT, SECRET, MODEL = {os.getpid()}, {str(secret)!r}, {str(model)!r}\n"
    found = sandbox.run(given + ATTEMPT.format(attempt=ATTEMPTS[name]))
    assert found.output == b"tried\nrefused\n", found
    assert secret.read_text() == "secret"


@contained
def test_the_environment_is_empty_and_the_folder_is_writable(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    seen = "open('file', 'w').write('x'); import os; print(dict(os.environ), os.getcwd(), os.listdir(), os.getuid())"
    assert sandbox.run(seen).output == b"{} /box ['file'] 65534\n"


@contained
def test_loops_hogs_and_floods_end():
    one = Limits(wall_s=1.0)
    stubborn = "import signal\nfor s in (1, 2, 3, 15): signal.signal(s, signal.SIG_IGN)\nwhile True: pass"
    assert [sandbox.run(program, limits=one).ended for program in ("while True: pass", stubborn)] == ["timeout"] * 2
    hog = sandbox.run("x = []\nwhile True: x.append(bytearray(2**24))")
    assert (hog.ended, hog.status) == ("exited", 1)
    assert hog.output.endswith(b"MemoryError\n")
    flood = sandbox.run("while True: print('passed' * 1000)", limits=Limits(output_nbytes=5000))
    assert (flood.ended, len(flood.output)) == ("flooded", 5000)
    closed = sandbox.run("import os, time\nos.close(1); os.close(2)\ntime.sleep(60)", limits=one)
    assert closed.ended == "timeout"


SLEEPS = """
from bitalloc import sandbox
job = {"role": "run", "program": "import time; print('on', flush=True); time.sleep(600)"}
with sandbox._sandboxed(job, sandbox.Limits(wall_s=600.0)) as process:
    print(process.stdout.readline(), flush=True)
    process.wait()
"""


def _descendants(pid: int) -> set[int]:
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found |= {child, *_descendants(child)}
    return found


@contained
@pytest.mark.skipif(not Path("/proc/thread-self/children").exists(), reason="/proc lists no children")
def test_a_killed_parent_takes_its_programs_along():
    with subprocess.Popen([sys.executable, "-c", SLEEPS], stdout=subprocess.PIPE) as parent:
        try:
            assert parent.stdout.readline() == b"b'on\\n'\n"
            programs = _descendants(parent.pid)
        finally:
            parent.kill()
    assert len(programs) == 3  # bubblewrap outside and inside, Python
    until = time.monotonic() + 30
    while time.monotonic() < until and any(Path(f"/proc/{pid}").exists() for pid in programs):
        time.sleep(0.02)
    assert not [pid for pid in programs if Path(f"/proc/{pid}").exists()]


# ---- verdicts ----------------------------------------------------------------------------------------
PROBLEM = {
    "prompt": "def twice(x):\n    return 2 * x\n\n\ndef add(x):\n    ''' One more. '''\n",
    "test": "def check(candidate):\n    for x in range(3):\n        assert candidate(twice(x)) == 2 * x + 1\n",
    "entry_point": "add",
}


def judged(program: str, wall_s: float = 60.0, **changed) -> str:
    verdict = sandbox.judge(program, **{**PROBLEM, **changed}, limits=Limits(wall_s=wall_s))
    return f"{verdict.outcome} {verdict.detail}".strip()


@contained
def test_a_right_program_passes_and_a_wrong_one_fails():
    assert judged("def add(x):\n    return x + 1\n") == "passed"
    assert judged("def add(x):\n    return x + 2\n") == "failed AssertionError"
    assert (
        judged("def add(x):\n    pass\n", test="def check(candidate):\n    len(candidate(1))\n") == "failed TypeError"
    )
    assert judged("def add(x):\n    return y\n") == "error NameError"
    assert judged("def add(x:\n") == "error SyntaxError"
    assert judged("def other(x):\n    return x + 1\n") == "error KeyError"
    assert judged("def add(x):\n    while True: pass\n", wall_s=1.0) == "timeout"


ATTACKS = {
    "exit while loading": ("import os; os._exit(0)", "error died"),
    "exit when called": ("import os\ndef add(x): os._exit(0)", "error died"),
    "sys.exit": ("import sys; sys.exit(0)", "error SystemExit"),
    "SystemExit when called": ("def add(x): raise SystemExit(0)", "error SystemExit"),
    "abort": ("import os\ndef add(x): os.abort()", "error died"),
    "print": ("def add(x): print('passed')", "failed AssertionError"),
    "atexit": ("import atexit; atexit.register(print, 'passed')\ndef add(x): exit(0)", "error NameError"),
    "equals everything": (
        "class Any:\n __eq__ = __ne__ = __bool__ = lambda *a: True\ndef add(x): return Any()",
        "error TypeError",
    ),
    "number that equals everything": (
        "class Any(int):\n __eq__ = __bool__ = lambda *a: True\ndef add(x): return Any(0)",
        "failed AssertionError",
    ),
    "list that equals everything": (
        "class Any(list):\n __eq__ = lambda *a: True\ndef add(x): return Any()",
        "failed AssertionError",
    ),
    "patched builtins": (
        "import builtins\nclass Quiet(BaseException): pass\nbuiltins.AssertionError = Quiet\n"
        "builtins.range = lambda *a: []\ndef add(x): return 0",
        "failed AssertionError",
    ),
    "patched helper": ("def twice(x): return 0\ndef add(x): return 1", "failed AssertionError"),
    "replaced tests": ("def check(candidate): pass\ndef add(x): return 0", "failed AssertionError"),
    "patched encoder": (
        "import json\njson.dumps = lambda *a, **k: '{\"passed\": true}'\ndef add(x): return 0",
        "error garbled",
    ),
    "exception by another name": (
        "E = type('0 passed', (Exception,), {})\ndef add(x): raise E",
        "error unnamed",
    ),
    "garbage": (
        "import os\nfor fd in range(1, 32):\n try: os.write(fd, b'\\xff\\n' * 99)\n except OSError: pass",
        "error garbled",
    ),
    "forged answers": (
        "import os\nfor fd in range(1, 32):\n try: os.write(fd, b'\"ready\"\\n{\"passed\": 1}\\n[]\\n')\n"
        " except OSError: pass\ndef add(x): return x + 1",
        "error garbled",
    ),
    "endless answer": ("def add(x): return 'x' * 2**22", "error too_long"),
    "deep answer": ("def add(x):\n a = []\n for i in range(10**5): a = [a]\n return a", "error RecursionError"),
    "object": ("def add(x): return add", "error TypeError"),
}  # fmt: skip


@contained
@pytest.mark.parametrize("name", ATTACKS)
def test_a_pass_cannot_be_faked(name):
    program, verdict = ATTACKS[name]
    assert judged(program) == verdict


SEARCH = """
import gc, inspect, os, sys
def add(needles):
    frame, seen = inspect.currentframe(), [sys.argv, sys.orig_argv, os.environ, globals()]
    while frame := frame.f_back:
        seen += [frame.f_locals, frame.f_globals]
    text = repr([*seen, *gc.get_objects()])
    return [needle for needle in needles if needle[::-1] in text]
mark = "known"
"""


@contained
def test_neither_nonce_nor_tests_are_within_reach(monkeypatch):
    monkeypatch.setattr("secrets.token_hex", lambda size: "abcdef" * size)
    test = "def check(f):\n    found = f(['fedcba' * 3, 'arbez', 'nwonk'])\n    assert found == ['nwonk'], 'zebra'\n"
    assert judged(SEARCH, test=test) == "passed"


@contained
def test_tests_that_cannot_run_are_no_verdict():
    right = "def add(x):\n    return x + 1\n"
    with pytest.raises(
        BitallocError, match=r"tests of add did not run \(ZeroDivisionError.*check the data set"
    ) as error:
        judged(right, test="1 / 0")
    assert "\n" not in str(error.value)
    with pytest.raises(BitallocError, match="did not run"):
        judged(right, test="import os; os._exit(0)")
    # tests that print what they like do not pass for it
    assert judged("def add(x): return 0", test="def check(f):\n    print('0' * 32, 'passed')\n    assert f(1)") == (
        "failed AssertionError"
    )


@contained
def test_values_come_back_as_they_are():
    test = (
        "import math\nfrom collections import Counter\n"
        "def check(f):\n"
        "    assert f((1, 2.5)) == (1, 2.5) != [1, 2.5]\n"
        "    assert f({1: [None, {'a': {3}}], (1,): b'x'}) == {1: [None, {'a': {3}}], (1,): b'x'}\n"
        "    assert math.isnan(f(float('nan'))) and f(-math.inf) == -math.inf\n"
        "    assert f(10**5000) == 10**5000 and f('\\ud800é\\n\\0') == '\\ud800é\\n\\0' and f(2j) == 2j\n"
        "    assert f(True) is True and f(None) is None and f('') == ''\n"
    )
    assert judged("def add(x): return x", test=test) == "passed"
    lazy = "def check(f):\n    assert list(f(3)) == [0, 1, 2]\n"
    assert judged("def add(x): yield from range(x)", test=lazy) == "passed"


finite = {"allow_nan": False}
keys = st.text() | st.integers()
scalars = keys | st.none() | st.booleans() | st.binary() | st.floats(**finite) | st.complex_numbers(**finite)
plain = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(keys, inner) | st.sets(keys),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(plain)
def test_packing_keeps_values_and_types(value):
    import json

    back = inside.unpack(json.loads(json.dumps(inside.pack(value))))
    assert back == value
    assert type(back) is type(value)


def test_subclasses_cross_as_what_they_derive_from():
    Point = namedtuple("Point", "x y")
    assert inside.unpack(inside.pack([Point(1, 2), Counter("aa")])) == [(1, 2), {"a": 2}]
    with pytest.raises(TypeError):
        inside.pack(object())
    for foreign in ({"a": 1}, ["exec", [1]], ["list"], ["dict", [1]]):
        with pytest.raises((ValueError, TypeError)):
            inside.unpack(foreign)


# ---- the filter --------------------------------------------------------------------------------------
def filtered(program: bytes, arch: int, number: int) -> int:
    """What the filter returns: the instructions that it uses, interpreted."""
    steps, place, register = list(struct.iter_unpack("=HBBI", program)), 0, 0
    while True:
        code, yes, no, k = steps[place]
        place += 1
        if code == 0x06:
            return k
        if code == 0x20:
            register = {0: number, 4: arch}[k]
        else:
            place += yes if {0x15: register == k, 0x35: register >= k}[code] else no


@pytest.mark.parametrize("machine", seccomp.ARCHITECTURES)
def test_the_filter_refuses_what_it_lists_and_nothing_else(machine):
    arch, place = seccomp.ARCHITECTURES[machine]
    program = seccomp.program(machine)
    listed = {numbers[place] for numbers in seccomp.DENIED.values()} - {None}
    for number in range(500):
        assert filtered(program, arch, number) == (0x50001 if number in listed else 0x7FFF0000)
    assert filtered(program, arch, 0x40000039) == 0x50001  # fork by its other number
    assert filtered(program, 0x40000003, 1) == 0x80000000  # 32-bit calls, numbered otherwise


def test_an_unknown_machine_is_refused():
    with pytest.raises(BitallocError, match="not executed on riscv64"):
        seccomp.program("riscv64")


# ---- closed by default -------------------------------------------------------------------------------
@pytest.fixture
def path(tmp_path, monkeypatch):
    """A PATH of one folder, and no memory of another backend."""
    sandbox.backend.cache_clear()
    sandbox._python()
    monkeypatch.setenv("PATH", str(tmp_path))
    yield tmp_path
    sandbox.backend.cache_clear()


def refused(folder: Path) -> str:
    """The line with which a program is refused that would leave a file."""
    for attempt in (sandbox.run, lambda program: sandbox.judge(program, **PROBLEM)):
        with pytest.raises(BitallocError) as error:
            attempt(f"open({str(folder / 'executed')!r}, 'w')\ndef add(x): return x + 1")
        assert not (folder / "executed").exists()
        assert "\n" not in str(error.value)
    return str(error.value)


def fake(folder: Path, script: str) -> None:
    (folder / "bwrap").write_text(f"#!/bin/bash\n{script}\n")
    (folder / "bwrap").chmod(0o755)


def test_without_bubblewrap_nothing_is_executed(path):
    assert "apt-get install bubblewrap" in refused(path)


def test_where_namespaces_are_forbidden_nothing_is_executed(path):
    fake(path, "echo 'bwrap: No permissions to create new namespace' >&2; exit 1")
    line = refused(path)
    assert "No permissions to create new namespace" in line
    assert "nothing was executed" in line
    assert "sysctl" in line


def test_a_bubblewrap_that_does_not_contain_is_found_out(path):
    fake(path, f'exec {sys.executable} -S -c "${{@: -1}}"')
    line = refused(path)
    assert "cannot contain a program here" in line
    assert "socket" in line
    assert "files" in line

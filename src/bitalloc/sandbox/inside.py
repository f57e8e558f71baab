"""What runs inside the sandbox: handed as text to a bare Python, so standard library only and nothing of bitalloc.

One of three roles. `run`: a program, as a script. `candidate`: a program whose function is called over a pipe.
`judge`: the tests, which call that function from another sandbox. Only plain values cross the pipe, one line of
JSON each way, so that the tests compare values of Python's own types, never objects that the program made.
"""

import contextlib
import json
import os
import random
import resource
import sys

LONGEST = 2**20  # bytes of an answer
CONTAINERS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "iterator": iter}


class ProgramError(Exception):
    """The program raised, died, or answered with something that is no plain value; says which in one word."""


def pack(value):
    """A plain value as JSON: containers are [type, contents], so that every type comes back as itself.

    Subclasses cross as what they derive from. Raises TypeError for anything else.

    >>> pack((1, [2.5, None], {"a": True}))
    ['tuple', [1, ['list', [2.5, None]], ['dict', [['a', True]]]]]
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, bytes | bytearray):
        return ["bytes", list(value)]
    if isinstance(value, dict):
        return ["dict", [[pack(key), pack(item)] for key, item in value.items()]]
    for name, kind in CONTAINERS.items():
        if kind is not iter and isinstance(value, kind):
            return [name, [pack(item) for item in value]]
    if hasattr(value, "__iter__"):
        return ["iterator", [pack(item) for item in value]]
    raise TypeError(type(value).__name__)


def unpack(message):
    """The value behind `pack`'s JSON; a mapping or an unknown tag raises ValueError.

    >>> unpack(pack((1, [2.5, {3}], {"a": b"x"})))
    (1, [2.5, {3}], {'a': b'x'})
    """
    if not isinstance(message, list | dict):
        return message
    kind, parts = message
    if kind == "complex":
        return complex(*parts)
    if kind == "bytes":
        return bytes(parts)
    if kind == "dict":
        return {unpack(key): unpack(item) for key, item in parts}
    if kind in CONTAINERS:
        return CONTAINERS[kind]([unpack(part) for part in parts])
    raise ValueError("unknown type")


def say(pipe, message):
    pipe.write(json.dumps(message) + "\n")
    pipe.flush()


def silence(descriptor):
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, descriptor)
    os.close(null)


def run(job):
    exec(compile(job["program"], "program", "exec"), {"__name__": "__main__"})


def candidate(job):
    """Say "started" before any of the program runs; then answer every call with a value or the exception's name."""
    requests, replies = os.fdopen(job["requests"], "r"), os.fdopen(job["replies"], "w")
    say(replies, "started")
    scope = {"__name__": "candidate"}
    try:
        exec(compile(job["program"], "program", "exec"), scope)
        function, reply = scope[job["entry_point"]], "ready"
    except BaseException as error:  # noqa: BLE001 - whatever a program does is its answer
        function, reply = None, {"raised": type(error).__name__}
    say(replies, reply)
    for line in requests:
        try:
            reply = json.dumps({"value": pack(function(*unpack(json.loads(line))))})
        except BaseException as error:  # noqa: BLE001
            reply = json.dumps({"raised": type(error).__name__})
        replies.write(reply + "\n")
        replies.flush()


def judge(job):
    """Write "<nonce> <outcome> <detail>" at the end; no line means that the data set or the sandbox is broken."""
    requests, replies = os.fdopen(job["requests"], "w"), os.fdopen(job["replies"], "rb")
    verdict = os.fdopen(os.dup(1), "w")
    silence(1)
    if replies.readline(LONGEST) != b'"started"\n':
        sys.exit("the sandbox of the program did not start")

    def function(*arguments):
        with contextlib.suppress(BrokenPipeError):
            say(requests, pack(arguments))
        return answer(listen(replies))

    scope = {"__name__": "tests"}
    exec(compile(job["prompt"], "prompt", "exec"), scope)  # helpers of the tests, as the data set has them
    scope[job["entry_point"]] = function
    exec(compile(job["test"], "test", "exec"), scope)
    outcome, detail = "passed", ""
    try:
        answer(listen(replies))
        scope["check"](function)
    except ProgramError as error:
        outcome, detail = "error", str(error)
    except Exception as error:  # noqa: BLE001 - an assertion, or a value that the tests cannot work with
        outcome, detail = "failed", type(error).__name__
    print(job["nonce"], outcome, detail, file=verdict, flush=True)


def listen(replies):
    """The next line of the program's process: anything at all may stand there."""
    line = replies.readline(LONGEST)
    if not line.endswith(b"\n"):
        raise ProgramError("too_long" if line else "died")
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise ProgramError("garbled") from None


def answer(reply):
    """The value that the program's function returned, or None once it is ready."""
    if reply == "ready":
        return None
    try:
        if "raised" in reply:
            name = reply["raised"]
            raise ProgramError(name if name.isidentifier() and len(name) < 64 else "unnamed")
        return unpack(reply["value"])
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError):
        raise ProgramError("garbled") from None


def main():
    with os.fdopen(os.dup(0)) as stdin:
        job = json.load(stdin)
    silence(0)
    os.environ.clear()
    sys.set_int_max_str_digits(0)  # long numbers are answers too
    random.seed(0)  # a verdict should repeat
    for name, most in job["limits"].items():
        resource.setrlimit(getattr(resource, name), (most, most))
    {"run": run, "candidate": candidate, "judge": judge}[job["role"]](job)


if __name__ == "__main__":
    main()

"""A seccomp filter for one Python process: it may compute, but make no process, socket, namespace or mount.

Classic BPF over `struct seccomp_data` {int nr; u32 arch; ...}, as bubblewrap's --seccomp reads it (man 2 seccomp).
What is refused gets EPERM. These calls reach parts of the kernel that a function from numbers to numbers never
needs, among them every way to hold memory that RLIMIT_AS does not count.
"""

from __future__ import annotations

import errno
import platform
import struct

from bitalloc.errors import BitallocError

# linux/audit.h: AUDIT_ARCH_*, and the place in DENIED
ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

# system call -> number on x86_64 (asm/unistd_64.h), on aarch64 (asm-generic/unistd.h; None: it has none)
DENIED: dict[str, tuple[int, int | None]] = {
    "fork": (57, None), "vfork": (58, None), "clone": (56, 220), "clone3": (435, 435),
    "unshare": (272, 97), "setns": (308, 268), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438), "process_madvise": (440, 440),
    "socket": (41, 198), "socketpair": (53, 199), "io_uring_setup": (425, 425),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186),
    "semget": (64, 190), "mq_open": (240, 180),
}  # fmt: skip

_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_JMP|JGE|K, BPF_RET|K
_KILL, _REFUSE, _ALLOW = 0x80000000, 0x00050000 | errno.EPERM, 0x7FFF0000
_X32 = 0x40000000  # numbers of x86_64's other interface


def program(machine: str | None = None) -> bytes:
    """struct sock_filter after struct sock_filter for `machine`, this one by default; refuses one it does not know."""
    machine = machine or platform.machine()
    if machine not in ARCHITECTURES:
        raise BitallocError(
            f"code written by a model is not executed on {machine}: its system calls are not in bitalloc/sandbox/"
            f"seccomp.py; execute on {' or '.join(ARCHITECTURES)}"
        )
    arch, place = ARCHITECTURES[machine]
    steps = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, arch), (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
        (_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _REFUSE),
    ]  # fmt: skip
    for numbers in DENIED.values():
        if numbers[place] is not None:
            steps += [(_EQUAL, 0, 1, numbers[place]), (_RETURN, 0, 0, _REFUSE)]
    return b"".join(struct.pack("=HBBI", *step) for step in (*steps, (_RETURN, 0, 0, _ALLOW)))

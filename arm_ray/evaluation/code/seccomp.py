"""A filter of system calls, as the bytes that ``bwrap --seccomp`` reads. No dependencies.

Namespaces hide the machine; this takes away what would let a program get around the limits, or
that programs on benchmarks have no use for and that kernels have had bugs in:

* new namespaces and mounts: in its own user namespace a program could mount a ``tmpfs`` of any
  size, which no limit of a process counts;
* memory outside the address space: ``memfd_create`` and System V shared memory;
* sockets other than local and internet ones: those of virtual machines (``AF_VSOCK``) reach the
  host of this machine past any network namespace;
* tracing, keys, ``bpf``, ``perf``, ``userfaultfd``, ``io_uring``, the kernel's log.

A call that is refused fails with EPERM; the program goes on.
"""

from __future__ import annotations

import os
import platform
import struct

# machine -> number in <linux/audit.h>, and numbers of system calls by name
_ARCHITECTURES: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (
        0xC000003E,
        {
            "clone": 56, "unshare": 272, "setns": 308, "mount": 165, "umount2": 166,
            "pivot_root": 155, "chroot": 161, "memfd_create": 319, "shmget": 29, "ptrace": 101,
            "process_vm_readv": 310, "process_vm_writev": 311, "add_key": 248,
            "request_key": 249, "keyctl": 250, "bpf": 321, "perf_event_open": 298,
            "userfaultfd": 323, "open_by_handle_at": 304, "syslog": 103, "socket": 41,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "clone": 220, "unshare": 97, "setns": 268, "mount": 40, "umount2": 39,
            "pivot_root": 41, "chroot": 51, "memfd_create": 279, "shmget": 194, "ptrace": 117,
            "process_vm_readv": 270, "process_vm_writev": 271, "add_key": 217,
            "request_key": 218, "keyctl": 219, "bpf": 280, "perf_event_open": 241,
            "userfaultfd": 282, "open_by_handle_at": 265, "syslog": 116, "socket": 198,
        },
    ),
}  # fmt: skip
# Newer calls have the same number everywhere.
_COMMON = {
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428,
    "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433,
    "mount_setattr": 442, "memfd_secret": 447,
}  # fmt: skip
_CLONE3 = 435

# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET.
_NEW_NAMESPACES = 0x7E020000

# AF_UNIX, AF_INET, AF_INET6
_FAMILIES = (1, 2, 10)

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_EPERM, _ENOSYS = 1, 38
# struct seccomp_data: number, architecture, instruction pointer, arguments of 8 bytes.
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16


def filter_program(machine: str | None = None) -> bytes | None:
    """Returns the filter for this kind of machine, or nothing where none is known."""
    known = _ARCHITECTURES.get(machine or platform.machine())
    if known is None:
        return None
    architecture, numbers = known
    code = [
        _op(_LOAD, _ARCHITECTURE),
        _op(_EQUAL, architecture, 1, 0),
        _op(_RETURN, _KILL),
        _op(_LOAD, _NUMBER),
        # x32: the same calls under other numbers. No number of the others is as high.
        _op(_AT_LEAST, 0x40000000, 0, 1),
        _op(_RETURN, _ERRNO | _EPERM),
        # The arguments of clone3 are behind a pointer. Without it the C library uses clone.
        _op(_EQUAL, _CLONE3, 0, 1),
        _op(_RETURN, _ERRNO | _ENOSYS),
        _op(_EQUAL, numbers["clone"], 0, 4),
        _op(_LOAD, _FIRST_ARGUMENT),
        _op(_ANY_BIT, _NEW_NAMESPACES, 0, 1),
        _op(_RETURN, _ERRNO | _EPERM),
        _op(_RETURN, _ALLOW),
        _op(_EQUAL, numbers["socket"], 0, 2 + 2 * len(_FAMILIES)),
        _op(_LOAD, _FIRST_ARGUMENT),
    ]
    for family in _FAMILIES:
        code += [_op(_EQUAL, family, 0, 1), _op(_RETURN, _ALLOW)]
    code.append(_op(_RETURN, _ERRNO | _EPERM))
    for name, number in [*numbers.items(), *_COMMON.items()]:
        if name not in ("clone", "socket"):
            code += [_op(_EQUAL, number, 0, 1), _op(_RETURN, _ERRNO | _EPERM)]
    code.append(_op(_RETURN, _ALLOW))
    return b"".join(code)


def filter_file(program: bytes) -> int:
    """Returns a descriptor that reads the filter from its start; the caller closes it."""
    descriptor = os.memfd_create("seccomp", os.MFD_CLOEXEC)
    os.write(descriptor, program)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)

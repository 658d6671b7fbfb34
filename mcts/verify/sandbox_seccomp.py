"""The system calls that a sandboxed program may make, as a seccomp filter.

What is not listed here does not exist for the program (ENOSYS): sockets of any kind, ptrace and the memory of other
processes, mounts and namespaces, shared memory and message queues outside the memory limit, io_uring, bpf, keys.
Numbers are from the kernel's own headers (asm/unistd_64.h, asm-generic/unistd.h).
"""

from __future__ import annotations

import errno
import platform
import struct

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Machine -> column of the tables below, AUDIT_ARCH of <linux/audit.h>."""

Numbers = dict[str, tuple[int | None, int | None]]
"""System call -> its number on x86_64 and on aarch64; None where that machine has no such call."""

# fmt: off
ALLOWED: Numbers = {
    # memory and time
    "brk": (12, 214), "mmap": (9, 222), "munmap": (11, 215), "mremap": (25, 216), "mprotect": (10, 226),
    "madvise": (28, 233), "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115),
    "nanosleep": (35, 101), "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153),
    "getitimer": (36, 102), "setitimer": (38, 103), "alarm": (37, None), "getrandom": (318, 278),
    "getrusage": (98, 165), "sysinfo": (99, 179), "uname": (63, 160), "getcpu": (309, 168),
    "sched_getaffinity": (204, 123), "sched_yield": (24, 124), "prlimit64": (302, 261), "getrlimit": (97, 163),
    "membarrier": (324, 283),
    # files
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "pwrite64": (18, 68), "preadv": (295, 69), "pwritev": (296, 70), "lseek": (8, 62), "open": (2, None),
    "openat": (257, 56), "creat": (85, None), "close": (3, 57), "close_range": (436, 436), "dup": (32, 23),
    "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59), "fcntl": (72, 25),
    "flock": (73, 32), "fsync": (74, 82), "fdatasync": (75, 83), "truncate": (76, 45), "ftruncate": (77, 46),
    "fallocate": (285, 47), "stat": (4, None), "fstat": (5, 80), "lstat": (6, None), "newfstatat": (262, 79),
    "statx": (332, 291), "statfs": (137, 43), "fstatfs": (138, 44), "access": (21, None), "faccessat": (269, 48),
    "faccessat2": (439, 439), "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50), "getdents": (78, None),
    "getdents64": (217, 61), "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None), "rename": (82, None),
    "renameat": (264, 38), "renameat2": (316, 276), "link": (86, None), "linkat": (265, 37), "unlink": (87, None),
    "unlinkat": (263, 35), "symlink": (88, None), "symlinkat": (266, 36), "readlink": (89, None),
    "readlinkat": (267, 78), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "umask": (95, 166),
    "utimensat": (280, 88), "copy_file_range": (326, 285), "sendfile": (40, 71), "poll": (7, None),
    "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72), "epoll_create": (213, None),
    "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None), "epoll_pwait": (281, 22),
    "eventfd2": (290, 19),
    # the process itself
    "execve": (59, 221), "exit": (60, 93), "exit_group": (231, 94), "arch_prctl": (158, None),
    "set_tid_address": (218, 96), "set_robust_list": (273, 99), "rseq": (334, 293), "futex": (202, 98),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137), "sigaltstack": (131, 132), "pause": (34, None), "restart_syscall": (219, 128),
    "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "getresuid": (118, 148), "getresgid": (120, 150),
    "getgroups": (115, 158), "getpgid": (121, 155), "getpgrp": (111, None), "getsid": (124, 156),
    "capget": (125, 90), "wait4": (61, 260), "waitid": (247, 95),
}
"""What an interpreter needs to run one program on its own files."""

SIGNALS: Numbers = {
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131),
}
"""Harmless where only the program's own processes can be named, in a PID namespace of its own."""

PROCESSES: Numbers = {
    "fork": (57, None), "vfork": (58, None), "clone": (56, 220), "setsid": (112, 157), "setpgid": (109, 154),
}
"""Making processes and threads, where the limits allow more than one."""
# fmt: on

TERMINAL_REQUESTS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""ioctl: TCGETS (isatty), TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX. No TIOCSTI, no device."""
IOCTL = (16, 29)
SIGNAL_OWNERS = (8, 10, 15)
"""fcntl: F_SETOWN, F_SETSIG, F_SETOWN_EX. They have the kernel send any signal to any process of the user."""
NEW_NAMESPACES = 0x7E020080
"""clone: CLONE_NEWNS, NEWTIME, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET."""

# struct seccomp_data: nr at byte 0, arch at 4, args (8 bytes each, low half first) from 16
NUMBER, ARCHITECTURE, FIRST, SECOND = 0, 4, 16, 24
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000 | errno.ENOSYS
X32 = 0x40000000
"""x86_64 calls numbered from here are the x32 ABI: the same calls by another door."""


def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """One BPF instruction (struct sock_filter)."""
    return struct.pack("=HBBI", code, if_true, if_false, value)


def filter_program(*, processes: bool, signals: bool, machine: str | None = None) -> bytes | None:
    """The filter as an array of struct sock_filter, None where this machine has no table here.

    processes: it may make processes and threads. signals: it may send signals. machine: None, the one we run on.
    """
    known = ARCHITECTURES.get(machine or platform.machine())
    if known is None:
        return None
    column, architecture = known
    calls = ALLOWED | (SIGNALS if signals else {}) | (PROCESSES if processes else {})
    allow = instruction(RETURN, ALLOW)
    refuse = instruction(RETURN, REFUSE)
    program = [
        instruction(LOAD, ARCHITECTURE),
        instruction(EQUAL, architecture, 1, 0),
        instruction(RETURN, KILL),
        instruction(LOAD, NUMBER),
    ]
    if column == 0:
        program += [instruction(AT_LEAST, X32, 0, 1), instruction(RETURN, KILL)]
    for name, numbers in calls.items():
        number = numbers[column]
        if number is not None and name not in ("clone", "fcntl", "prlimit64"):
            program += [instruction(EQUAL, number, 0, 1), allow]
    if processes:
        number = PROCESSES["clone"][column]
        assert number is not None
        program += [instruction(EQUAL, number, 0, 4), instruction(LOAD, FIRST)]
        program += [instruction(ANY_BIT, NEW_NAMESPACES, 0, 1), refuse, allow]
    number = ALLOWED["prlimit64"][column]
    assert number is not None
    # its own limits only: process 0 is the caller
    program += [instruction(EQUAL, number, 0, 4), instruction(LOAD, FIRST)]
    program += [instruction(EQUAL, 0, 0, 1), allow, refuse]
    number = ALLOWED["fcntl"][column]
    assert number is not None
    program += [instruction(EQUAL, number, 0, 2 + 2 * len(SIGNAL_OWNERS)), instruction(LOAD, SECOND)]
    for command in SIGNAL_OWNERS:
        program += [instruction(EQUAL, command, 0, 1), refuse]
    program += [allow]
    program += [instruction(EQUAL, IOCTL[column], 0, 2 + 2 * len(TERMINAL_REQUESTS)), instruction(LOAD, SECOND)]
    for request in TERMINAL_REQUESTS:
        program += [instruction(EQUAL, request, 0, 1), allow]
    return b"".join([*program, refuse, refuse])

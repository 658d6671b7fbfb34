"""What `mcts.verify.sandbox` starts for each program, in an interpreter of its own. Standard library only.

Three processes. The *launcher* enters new user, PID, mount, network, IPC and UTS namespaces and waits. *Init*
(process 1 in there) builds a root of its own out of read-only system libraries and a scratch folder, leaves the host's
root behind, and reaps. The *program* lowers its limits, gives up its user, its capabilities and most system calls, and
becomes the interpreter. When the program ends, init ends, and the kernel kills whatever is left in the PID namespace;
the launcher's `waitpid` returns after that. When the launcher is killed, or the process that started it dies, init is
killed.

stdin: three lengths (struct "=3Q"), then that many bytes each of seccomp filter, program text, and the program's stdin.
Control pipe, lines out: `space ID`, `go` (the program's next act is exec), `exit STATUS CPU_SECONDS PEAK_KIB`,
`failed WORDS` (what the host did not give).
"""

from __future__ import annotations

# the module around it costs 6 ms at each start, for its enums
import _signal as signal  # type: ignore[import-not-found]
import ctypes
import os
import resource
import struct

TYPE_CHECKING = False  # typing's own would have to be imported
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SECCOMP_MODE_FILTER = 2
SYS_MOUNT_SETATTR = 442  # the same number on every machine
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

NOBODY = 65534
"""The program's user and group inside; outside it is the user who started it, or nobody where that was root."""
NEW_ROOT = "/tmp"  # any folder that every host has; covered only in the new mount namespace
HOST = "/host"
SCRATCH = "/scratch"
PROGRAM = "/program.py"
OPEN_FILES = 64

libc = ctypes.CDLL(None, use_errno=True)


class Missing(Exception):
    """What the host does not give, as a noun."""


def call(what: str, result: int) -> None:
    """Raise Missing where a libc function returned -1."""
    if result == -1:
        raise Missing(f"{what} ({os.strerror(ctypes.get_errno())})")


def prctl(option: int, *values: int) -> int:
    words = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    return int(libc.prctl(ctypes.c_int(option), *words))


def mount(what: str, source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    call(what, libc.mount(*encoded[:3], ctypes.c_ulong(flags), encoded[3]))


def read_only(path: str) -> None:
    """Everything mounted at and under `path`: read-only, no devices, no setuid."""
    attributes = struct.pack("=4Q", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, 0, 0, 0)
    arguments = ctypes.c_int(AT_FDCWD), os.fsencode(path), ctypes.c_uint(AT_RECURSIVE), attributes, ctypes.c_size_t(32)
    call("read-only mounts (Linux 5.12 or newer)", libc.syscall(ctypes.c_long(SYS_MOUNT_SETATTR), *arguments))


def die_with_parent(parent: int) -> None:
    """SIGKILL for this process when the one that made it dies. To be called again after each change of user."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def enter_namespaces() -> None:
    """Root maps itself to root inside (to build the mounts) and nobody to nobody; any other user is nobody inside."""
    spaces = CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    uid, gid, me = os.geteuid(), os.getegid(), os.getpid()
    if uid != 0:
        call("unprivileged user namespaces", libc.unshare(ctypes.c_int(spaces)))
        try:
            write("/proc/self/setgroups", "deny")
            write("/proc/self/gid_map", f"{NOBODY} {gid} 1")
            write("/proc/self/uid_map", f"{NOBODY} {uid} 1")
        except OSError as error:
            raise Missing(f"a user mapping ({error.strerror})") from error
        return
    # only a process outside can map more than one user
    ready, answer = os.pipe(), os.pipe()
    helper = os.fork()
    if helper == 0:
        die_with_parent(me)
        os.read(ready[0], 1)
        try:
            write(f"/proc/{me}/gid_map", f"0 {gid} 1\n{NOBODY} {NOBODY} 1\n")
            write(f"/proc/{me}/uid_map", f"0 {uid} 1\n{NOBODY} {NOBODY} 1\n")
        except OSError as error:
            os.write(answer[1], (error.strerror or "refused").encode())
        os._exit(0)
    made = libc.unshare(ctypes.c_int(spaces))
    errno = ctypes.get_errno()
    os.write(ready[1], b".")
    os.close(answer[1])
    words = os.read(answer[0], 200).decode()
    os.waitpid(helper, 0)
    for descriptor in (*ready, answer[0]):
        os.close(descriptor)
    ctypes.set_errno(errno)
    call("user namespaces", made)
    if words:
        raise Missing(f"a user mapping ({words})")
    os.setgroups([])


def build_root(binds: Sequence[str], scratch_bytes: int, files: Mapping[str, bytes]) -> None:
    """A new root in memory: `files` {path: bytes}, the paths `binds` of the host read-only, a scratch folder."""
    size = sum(map(len, files.values())) + (1 << 20)
    mount("a private mount namespace", None, "/", None, MS_REC | MS_PRIVATE)
    mount("a tmpfs", "tmpfs", NEW_ROOT, "tmpfs", MS_NOSUID | MS_NODEV, f"size={size},nr_inodes=4096,mode=755")
    os.mkdir(NEW_ROOT + HOST)
    number = SYS_PIVOT_ROOT[os.uname().machine]
    root, host = os.fsencode(NEW_ROOT), os.fsencode(NEW_ROOT + HOST)
    call("pivot_root", libc.syscall(ctypes.c_long(number), root, host))
    os.chdir("/")
    for path in binds:
        source = HOST + path
        if os.path.islink(source):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.symlink(os.readlink(source), path)
            continue
        if os.path.isdir(source):
            os.makedirs(path, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))
        mount(f"a bind mount of {path}", source, path, None, MS_BIND | MS_REC)
        for packages in ("site-packages", "dist-packages"):
            cover = os.path.join(path, packages)
            if os.path.isdir(cover):
                mount("a tmpfs", "tmpfs", cover, "tmpfs", MS_NOSUID | MS_NODEV, "size=4096,nr_inodes=2,mode=755")
    call("unmounting the host's root", libc.umount2(os.fsencode(HOST), MNT_DETACH))
    os.rmdir(HOST)
    for path, content in files.items():
        with open(path, "wb") as file:
            file.write(content)
    os.mkdir(SCRATCH)
    read_only("/")
    options = f"size={scratch_bytes},nr_inodes=1024,mode=700,uid={NOBODY},gid={NOBODY}"
    mount("a scratch folder", "tmpfs", SCRATCH, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)


def limit(kind: int, value: int) -> None:
    resource.setrlimit(kind, (value, value))


class Setting:
    """What the program is started with."""

    def __init__(self, arguments: list[str]) -> None:
        numbers = list(map(int, arguments[:6]))
        self.control, self.starter, self.cpu, self.memory, self.processes, self.scratch = numbers
        self.cwd, self.python, *self.binds = arguments[6:]
        self.isolated = not self.cwd
        self.cwd = self.cwd or SCRATCH
        self.program = PROGRAM if self.isolated else os.path.join(self.cwd, "program.py")
        # a user who is not root is also the user of the launcher and of init
        self.user_processes = self.processes + (0 if os.geteuid() == 0 else 2)


def become_program(setting: Setting, parent: int, filter_bytes: bytes) -> None:
    """Never returns: limits, user, capabilities, filter, exec."""
    # SIGXCPU at the limit tells it from any other kill; who catches that meets SIGKILL a second later
    resource.setrlimit(resource.RLIMIT_CPU, (setting.cpu, setting.cpu + 1))
    limit(resource.RLIMIT_AS, setting.memory)
    limit(resource.RLIMIT_FSIZE, setting.scratch)
    limit(resource.RLIMIT_NOFILE, OPEN_FILES)
    limit(resource.RLIMIT_STACK, min(setting.memory, 8 << 20))
    limit(resource.RLIMIT_MEMLOCK, 0)
    limit(resource.RLIMIT_MSGQUEUE, 0)
    # 1 and not 0: it also keeps a core handler of the host (a pipe in core_pattern) from being started
    limit(resource.RLIMIT_CORE, 1)
    if setting.isolated:
        limit(resource.RLIMIT_NPROC, setting.user_processes)
        if os.geteuid() == 0:
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
    die_with_parent(parent)
    os.umask(0o077)
    os.chdir(setting.cwd)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    call("no_new_privs", prctl(PR_SET_NO_NEW_PRIVS, 1))
    os.write(setting.control, b"go\n")
    instructions = ctypes.create_string_buffer(filter_bytes, len(filter_bytes))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(filter_bytes) // 8, ctypes.addressof(instructions)))
    os.set_inheritable(0, True)
    call("seccomp filters", prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(program)))
    # not -I, which would ignore the hash seed; there is no environment but this one
    environment = {"HOME": setting.cwd, "TMPDIR": setting.cwd, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
    os.execve(setting.python, [setting.python, "-P", "-s", "-S", "-B", "-X", "utf8", setting.program], environment)


def guarded(control: int, work: Callable[[], None]) -> None:
    """Run `work`, which never returns; say in the control pipe what stopped it."""
    try:
        work()
    except Missing as error:
        os.write(control, f"failed {error}\n".encode())
    except OSError as error:
        os.write(control, f"failed {error.strerror or error} {error.filename or ''}\n".encode())
    except BaseException as error:  # noqa: BLE001 - a child must never run on into its parent's code
        os.write(control, f"failed {type(error).__name__}: {error}\n".replace("\n", " ").encode() + b"\n")
    finally:
        os._exit(1)


def reap(child: int, control: int) -> None:
    """Wait for everything until `child` has ended; report how."""
    while True:
        pid, status, usage = os.wait4(-1, 0)
        if pid == child:
            seconds = usage.ru_utime + usage.ru_stime
            os.write(control, f"exit {os.waitstatus_to_exitcode(status)} {seconds:.6f} {usage.ru_maxrss}\n".encode())
            return


def main(arguments: list[str]) -> None:
    setting = Setting(arguments)
    control, isolated = setting.control, setting.isolated
    os.set_inheritable(control, False)
    die_with_parent(setting.starter)
    with open(0, "rb", closefd=False) as source:
        lengths = struct.unpack("=3Q", source.read(24))
        filter_bytes, text, given = (source.read(length) for length in lengths)
    init = 0

    def stop(_number: int, _frame: object) -> None:
        if init:
            os.kill(init, signal.SIGKILL)
        else:
            os._exit(1)

    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    signal.signal(signal.SIGTERM, stop)
    if isolated:
        try:
            enter_namespaces()
        except (Missing, OSError) as error:
            os.write(control, f"failed {error}\n".encode())
            return
    die_with_parent(setting.starter)
    alive, mine = os.pipe()
    init = os.fork()
    if init:
        os.close(alive)
        if isolated:
            space = os.stat("/proc/self/ns/pid_for_children").st_ino
            os.write(control, f"space {space}\n".encode())
        os.write(mine, b"!")  # not before: the space cannot be read any more once its first process has ended
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        os.waitpid(init, 0)
        os._exit(0)  # without the interpreter's own goodbye

    def run_init() -> None:
        os.close(mine)
        os.umask(0o022)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if not os.read(alive, 1):  # the end of the file: the launcher died before the line above
            os._exit(1)
        os.close(alive)
        files = {setting.program: text, setting.program + ".stdin": given}
        if isolated:
            call("a host name of its own", libc.sethostname(b"sandbox", 7))
            build_root(setting.binds, setting.scratch, files)
        else:
            for path, content in files.items():
                with open(path, "wb") as file:
                    file.write(content)
        descriptor = os.open(setting.program + ".stdin", os.O_RDONLY)
        os.dup2(descriptor, 0)
        os.close(descriptor)
        me = os.getpid()
        child = os.fork()
        if child == 0:
            guarded(control, lambda: become_program(setting, me, filter_bytes))
        for number in (0, 1, 2):
            os.close(number)
        prctl(PR_SET_DUMPABLE, 0)
        reap(child, control)
        os._exit(0)

    guarded(control, run_init)

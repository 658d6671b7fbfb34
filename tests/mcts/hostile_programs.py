"""Programs that try to get out of the sandbox, to outlive it, or to take the machine down.

Each prints ESCAPED where it got what it wanted, and whatever secret it could read.
"""
# ruff: noqa: E501 - a program is clearer on its own lines than wrapped

from __future__ import annotations

from dataclasses import dataclass

from mcts.verify.sandbox import Outcome, Sandbox, SandboxError


def can_isolate() -> str:
    """What this machine lacks for the sandbox; empty where it lacks nothing."""
    try:
        Sandbox().require()
    except SandboxError as error:
        return str(error)
    return ""


MISSING = can_isolate()
OK, EXIT, TIMEOUT, MEMORY, OUTPUT, ERROR = Outcome
GONE = frozenset({OK, EXIT})
"""It ended by itself, empty-handed."""


@dataclass(frozen=True, slots=True)
class Hostile:
    name: str
    program: str
    outcomes: frozenset[Outcome]
    processes: int = 1


def hostile(name: str, program: str, *outcomes: Outcome, processes: int = 1) -> Hostile:
    return Hostile(name, program, frozenset(outcomes) or GONE, processes)


TRY = """
def attempt(act, *words):
    try:
        print("ESCAPED", act(*words))
    except (OSError, RuntimeError) as error:
        print("refused:", error)
"""

CTYPES = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def syscall(number, *words):
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(w) if isinstance(w, int) else w for w in words])
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
"""

HOSTILE = [
    # --- it never ends ---
    hostile("endless loop", "while True: pass", TIMEOUT),
    hostile("sleeps for ever", "import time\nwhile True: time.sleep(1000)", TIMEOUT),
    hostile("stops itself", "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nwhile True: pass", TIMEOUT),
    hostile(
        "catches every signal and loops",
        "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, lambda *_: None)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
        TIMEOUT,
    ),
    hostile(
        "closes its files and loops", "import os\nfor n in range(1000):\n    try: os.close(n)\n"
        "    except OSError: pass\nwhile True: pass", TIMEOUT,
    ),
    hostile("loops at exit", "import atexit\n@atexit.register\ndef _():\n    while True: pass", TIMEOUT),
    hostile("a tower of powers", "print(10 ** 10 ** 10)", TIMEOUT, MEMORY, EXIT),
    hostile("a regular expression that explodes", "import re\nre.match(r'(a+)+$', 'a' * 60 + 'b')", TIMEOUT),
    # --- it eats the machine ---
    hostile("memory bomb", "held = []\nwhile True: held.append(bytearray(1 << 20))", MEMORY),
    hostile("one huge allocation", "bytes(1 << 40)", MEMORY),
    hostile(
        "memory through shared mappings",
        "import mmap\nheld = []\nwhile True:\n    m = mmap.mmap(-1, 1 << 20)\n    m.write(b'x' * (1 << 20))\n"
        "    held.append(m)", MEMORY, EXIT,
    ),
    hostile("endless output", "while True: print('x' * 10000)", OUTPUT),
    hostile("endless errors", "import sys\nwhile True: print('x' * 10000, file=sys.stderr)", OUTPUT),
    hostile("one huge write", "import os\nos.write(1, b'x' * (64 << 20))", OUTPUT),
    hostile("fork bomb", TRY + "import os\nfor _ in range(1000): attempt(os.fork)"),
    hostile("fork bomb where processes are allowed", "import os\nwhile True:\n    try: os.fork()\n"
            "    except OSError: pass", TIMEOUT, processes=8),
    hostile("thread bomb", TRY + "import threading, time\nfor _ in range(200):\n"
            "    attempt(threading.Thread(target=time.sleep, args=(100,)).start)"),
    hostile(
        "zombie farm",
        "import os\nmade = 0\nfor _ in range(1000):\n    try:\n        if os.fork() == 0: os._exit(0)\n        made += 1\n"
        "    except OSError: pass\nprint('ESCAPED' if made > 8 else made)", processes=8,
    ),
    hostile(
        "fills the scratch folder",
        "n = 0\ntry:\n    while n < 1000:\n        open(str(n), 'wb').write(b'x' * (1 << 20)); n += 1\n"
        "except OSError as error: print(error)\nprint('ESCAPED' if n > 4 else n)",
    ),
    hostile(
        "a million small files",
        "n = 0\ntry:\n    while n < 1000000: open(str(n), 'w').close(); n += 1\n"
        "except OSError as error: print(error)\nprint('ESCAPED' if n > 2000 else n)",
    ),
    hostile("one huge file", TRY + "attempt(open('big', 'wb').truncate, 1 << 40)"),
    hostile("fills /dev/shm", TRY + "attempt(open, '/dev/shm/full', 'wb')"),
    hostile(
        "memory outside its address space", CTYPES + TRY
        + "attempt(syscall, 319, b'memfd', 0)\nattempt(syscall, 29, 0, 1 << 24, 0o1600)\n"
        "attempt(syscall, 240, b'/queue', 0o102, 0o600, None)",
    ),
    hostile(
        "memory in pipes",
        "import fcntl, os\nheld = total = 0\ntry:\n    while True:\n        r, w = os.pipe()\n        held += 1\n"
        "        os.set_blocking(w, False)\n        fcntl.fcntl(w, 1031, 1 << 20)\n        total += os.write(w, bytes(1 << 20))\n"
        "except OSError as error: print(error)\nprint('ESCAPED' if total > 64 << 20 else total)",
    ),
    # --- it breaks the interpreter ---
    hostile("deep recursion", "def f(n): return f(n + 1)\nf(0)", EXIT),
    hostile("recursion without a limit", "import sys\nsys.setrecursionlimit(10 ** 9)\nf = lambda n: f(n + 1)\nf(0)",
            EXIT, MEMORY),
    hostile("nesting that breaks the parser", "eval('(' * 100000)", EXIT, MEMORY, OUTPUT),
    hostile("segmentation fault", "import ctypes\nctypes.string_at(0)", EXIT),
    hostile("abort", "import os\nos.abort()", EXIT),
    hostile("kills itself", "import os\nos.kill(os.getpid(), 9)", ERROR, EXIT),
    hostile("text that is no program", "\x00\ud800 def", EXIT),
    # --- it looks around ---
    hostile("reads the parent's environment", TRY + "import os\n"
            "for who in (os.getppid(), 1, 'self', PARENT):\n    attempt(lambda: open(f'/proc/{who}/environ').read())"),
    hostile("prints its own environment", "import os\nprint(dict(os.environ))"),
    hostile("reads files of the host", TRY + "for p in (SECRET_FILE, '/etc/passwd', '/etc/hostname', '/dev/mem',\n"
            "          '/dev/vda', '/proc/version', '/sys/kernel', '/proc/1/root'):\n    attempt(open, p)"),
    hostile("walks the whole tree", "import os\nfor folder, _, names in os.walk('/'):\n"
            "    if folder.startswith(('/usr/lib', '/lib')): continue\n"
            "    for n in names:\n        if n == 'secret.txt': print('ESCAPED', folder)"),
    hostile("symbolic link to a secret", TRY + "import os\nos.symlink(SECRET_FILE, 'link')\nattempt(open, 'link')\n"
            "os.symlink('/', 'root')\nattempt(open, 'root' + SECRET_FILE)\n"
            "attempt(open, '../' * 40 + SECRET_FILE[1:])\nattempt(os.link, SECRET_FILE, 'hard')"),
    hostile("swaps a link under the reader", TRY + "import os\nos.mkdir('d')\n"
            "for _ in range(200):\n    os.rmdir('d')\n    os.symlink(os.path.dirname(SECRET_FILE), 'd')\n"
            "    attempt(open, 'd/secret.txt')\n    os.unlink('d')\n    os.mkdir('d')"),
    hostile("reads what files it was left", "import os\nfor n in range(3, 256):\n    try:\n        os.fstat(n)\n"
            "        print('ESCAPED', n)\n    except OSError: pass"),
    hostile("chroot and out", TRY + "import os\nos.mkdir('d')\nattempt(os.chroot, 'd')\nattempt(os.chroot, '/')"),
    hostile("file handles past the mounts", CTYPES + TRY + "attempt(syscall, 304, -100, b'x' * 32, 0)\n"
            "attempt(syscall, 303, -100, b'/usr', b'x' * 32, b'y' * 8, 0)"),
    # --- it reaches out ---
    hostile("writes outside", TRY + "for p in ('/x', '/usr/lib/x', '/etc/x', '/program.py', '/tmp/x', SECRET_FILE,\n"
            "          __import__('os').__file__):\n    attempt(open, p, 'a')"),
    hostile("network", TRY + "import socket\nattempt(socket.create_connection, ('127.0.0.1', PORT), 1)\n"
            "attempt(socket.socket, socket.AF_INET6)\nattempt(socket.socket, socket.AF_UNIX)\n"
            "attempt(socket.getaddrinfo, 'example.org', 80)"),
    hostile("abstract unix socket", TRY + "import socket\n"
            "attempt(lambda: socket.socket(socket.AF_UNIX).connect('\\0' + SOCKET))"),
    hostile("kills everything it can name", "import os, signal\nfor n in (os.getppid(), 1, 0, PARENT, -PARENT):\n"
            "    for s in (signal.SIGTERM, signal.SIGKILL):\n        try:\n            if n: os.kill(n, s)\n"
            "        except OSError: pass\nfor n in range(3, 5000):\n    try:\n        os.kill(n, 9)\n"
            "        print('ESCAPED', n)\n    except OSError: pass\nos.kill(-1, 9)\nprint('here')"),
    hostile("another binary", TRY + "import os\nfor p in ('/bin/sh', '/usr/bin/env', '/usr/bin/unshare'):\n"
            "    attempt(os.execv, p, [p])"),
    hostile("traces init", CTYPES + TRY + "attempt(syscall, 101, 16, 1, 0, 0)\nattempt(syscall, 101, 0, 0, 0, 0)\n"
            "attempt(syscall, 310, 1, 0, 0, 0, 0, 0)"),
    hostile(
        "raw system calls", CTYPES + TRY
        + "for number in (165, 272, 308, 155, 161, 250, 321, 425, 298, 323, 428, 430, 442, 246, 175, 169, 170, 41, 53, 133,\n"
        "               435, 56 | 1 << 20):\n    attempt(syscall, number, 0x10000000, 0, 0, 0, 0)",
    ),
    hostile("raises its limits", "import resource\nfor k in (0, 1, 6, 7, 8, 9, 12):\n    try:\n"
            "        resource.setrlimit(k, (resource.RLIM_INFINITY,) * 2)\n        print('ESCAPED', k, resource.getrlimit(k))\n"
            "    except (OSError, ValueError): pass"),
    hostile("becomes root", TRY + "import os\nfor f in (os.setuid, os.setgid, os.seteuid): attempt(f, 0)\n"
            "attempt(os.setgroups, [0])"),
    hostile("x32 system call", CTYPES + "syscall(0x40000000 + 39)\nprint('ESCAPED')", EXIT),
    hostile(
        "32-bit system call",
        "import ctypes, mmap\nm = mmap.mmap(-1, 4096, prot=7)\nm.write(bytes.fromhex('b814000000cd80c3'))\n"
        "at = ctypes.addressof(ctypes.c_char.from_buffer(m))\nctypes.CFUNCTYPE(ctypes.c_int)(at)()\nprint('ESCAPED')", EXIT,
    ),
    # --- it wants to outlive its limit ---
    hostile("daemon by double fork", "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
            "        os.setpgid(0, 0)\n        time.sleep(100000)\n    os._exit(0)\nos.wait()", OK, processes=8),
    hostile("parent dies, child holds the pipes", "import os, time\nif os.fork() == 0: time.sleep(100000)", OK, processes=8),
    hostile("swarm that ignores signals", "import os, signal, time\nfor n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\n"
            "for _ in range(20):\n    try:\n        if os.fork() == 0: break\n    except OSError: pass\nos.setsid() if os.getpid() != 2 "
            "else None\nwhile True: time.sleep(1000)", TIMEOUT, processes=8),
    hostile("new namespaces by clone", CTYPES + TRY + "attempt(syscall, 56, 0x10000000 | 17, 0, 0, 0, 0)\n"
            "attempt(syscall, 435, b'\\0' * 64, 64)\nattempt(syscall, 272, 0x10000000)", processes=8),
    # --- it looks for a way that nobody thought of ---
    hostile("starts itself anew for ever", "import os, sys\nos.execv(sys.executable, [sys.executable, '-S', sys.argv[0]])", TIMEOUT),
    hostile("moves its CPU limit when told of it", "import resource, signal\ndef more(*_):\n    hard = resource.getrlimit(0)[1]\n"
            "    resource.setrlimit(0, (hard, hard))\nsignal.signal(signal.SIGXCPU, more)\nwhile True: pass", TIMEOUT),
    hostile("a chain of children, each with seconds of its own", "import os, time\nif os.fork():\n    while True: time.sleep(100)\n"
            "while True:\n    end = time.process_time() + 0.3\n    while time.process_time() < end: pass\n"
            "    if os.fork(): os._exit(0)", TIMEOUT, processes=8),
    hostile("tells the launcher that it ended well", "import os\nfor fd in range(3, 64):\n    for text in (b'exit 0 0.0 0\\n', b'failed nothing\\n'):\n"
            "        try: print('ESCAPED', os.write(fd, text))\n        except OSError: pass\nos._exit(3)", EXIT),
    hostile("asks the kernel to signal the parent", TRY + "import fcntl, os, signal, struct\nr, w = os.pipe()\n"
            "attempt(fcntl.fcntl, r, 10, signal.SIGKILL)\nattempt(fcntl.fcntl, r, fcntl.F_SETOWN, PARENT)\n"
            "attempt(fcntl.fcntl, r, 15, struct.pack('ii', 1, PARENT))\nfcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)\nos.write(w, b'x')"),
    hostile("a setuid copy of the interpreter", TRY + "import os, shutil, sys\nshutil.copyfile(sys.executable, 'python')\n"
            "os.chmod('python', 0o6755)\nattempt(os.execv, './python', ['./python', '-c', 'print(\"ESCAPED\")'])"),
    hostile("a library of its own before the real ones", "import os, shutil, sys\nif os.environ.get('LD_PRELOAD'): sys.exit()\n"
            "with open('evil.so', 'wb') as file: file.write(b'\\x7fELF' + bytes(1000))\n"
            "os.execve(sys.executable, [sys.executable, '-S', sys.argv[0]], {'LD_PRELOAD': '/scratch/evil.so', 'LD_LIBRARY_PATH': '/scratch'})"),
    hostile("machine code from a file", TRY + "import mmap, os\nos.makedirs('x')\nwith open('x/code', 'wb+') as file:\n"
            "    file.write(bytes(4096)); file.flush()\n    attempt(mmap.mmap, file.fileno(), 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC)"),
    hostile("writes into the libraries and its own program", TRY + "import os, sys\nfor path in (sys.executable, os.__file__, sys.argv[0], "
            "sys.argv[0] + '.stdin', '/etc/ld.so.cache'):\n    attempt(open, path, 'r+b')\n    attempt(os.unlink, path)\n    attempt(os.chmod, path, 0o777)\n"
            "    attempt(os.rename, path, '/scratch/moved')\n    attempt(os.link, path, '/scratch/linked')"),
    hostile("moves the scratch folder away", TRY + "import os\nfor act in ((os.rename, '/scratch', '/other'), (os.rmdir, '/scratch'), (os.mkdir, '/other'),"
            " (os.symlink, '/', '/other'), (os.mkdir, '/lib/other'), (os.mkdir, '/tmp')): attempt(*act)"),
    hostile("climbs above the root", TRY + "import os\nfor path in ('/' + '../' * 50, '/..', '../' * 50):\n    os.chdir(path)\n"
            "    print(sorted(os.listdir('.')))\n    attempt(open, '.' + SECRET_FILE)\n    attempt(os.listdir, './home')\n    attempt(os.listdir, './proc')"),
    hostile("removes the ground under itself", TRY + "import os\nos.makedirs('a/b/c')\nos.chdir('a/b/c')\n"
            "os.rmdir('/scratch/a/b/c')\nattempt(os.getcwd)\nattempt(open, '../../../../..' + SECRET_FILE)"),
    hostile("a million names for one file", "import os\nopen('f', 'w').close()\nn = 0\ntry:\n    while True:\n        os.link('f', str(n)); n += 1\n"
            "except OSError as error: print(error)\nprint('ESCAPED' if n > 2000 else n)"),
    hostile("a file with a hole of a terabyte", "import os\ntry:\n    os.truncate(os.open('f', 66), 1 << 40)\n    print('ESCAPED')\n"
            "except OSError as error: print(error)"),
    hostile("sends a library to its output", "import os, sys\nfile = os.open(sys.executable, 0)\nwhile True: os.sendfile(1, file, 0, 1 << 20)", OUTPUT),
    hostile("fills the output through a hundred copies of it", "import os\ncopies = [os.dup(1 + k % 2) for k in range(50)]\nwhile True:\n"
            "    for fd in copies: os.write(fd, b'x' * 4096)", OUTPUT),
    hostile("floods itself with timers", "import signal\nsignal.signal(signal.SIGALRM, lambda *_: None)\n"
            "signal.setitimer(0, 1e-6, 1e-6)\nwhile True: pass", TIMEOUT),
    hostile("children that take turns to write", "import os\nfor _ in range(5): os.fork()\nwhile True: os.write(1, b'x' * 100)", OUTPUT, EXIT, processes=8),
    hostile("waits for input that never comes", "import os, sys\nsys.stdin.read()\nr, w = os.pipe()\nos.read(r, 1)", TIMEOUT),
    hostile("leaves by a thread while the main one hangs", "import threading, time, os\nfor _ in range(6):\n    try: threading.Thread(target=lambda: [0 for _ in iter(int, 1)], daemon=True).start()\n"
            "    except RuntimeError: pass\ntime.sleep(100000)", TIMEOUT, processes=8),
    hostile("reads the memory of its neighbours", CTYPES + TRY + "attempt(syscall, 434, PARENT, 0)\nattempt(syscall, 438, 0, 0, 0)\nattempt(syscall, 312, 1, PARENT, 0, 0, 0)\n"
            "attempt(syscall, 440, 0, 0, 0, 0, 0)\nattempt(open, '/dev/mem')\nattempt(open, f'/proc/{PARENT}/mem')\nattempt(open, '/proc/1/environ')"),
    hostile("an abstract name, a packet, a netlink", TRY + "import socket\nfor family in (1, 2, 10, 16, 17, 38, 40):\n    for kind in (1, 2, 3):\n"
            "        attempt(socket.socket, family, kind)\nattempt(socket.socketpair)"),
    hostile("says that it needed memory", "import sys\nsys.stderr.write('MemoryError\\n')\nsys.exit(1)", MEMORY),
]  # fmt: skip

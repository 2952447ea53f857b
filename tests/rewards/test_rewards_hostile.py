"""Rewards that attack: each is contained, and the honest samples beside it are still scored."""

# ruff: noqa: E501, S108  # an attack a line, on places that are there

from __future__ import annotations

import os
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tinker_mcp.training.rewards.contract import Scored
from tinker_mcp.training.rewards.jail import Jail, Sample

OpenJail = Callable[..., Jail]
SECRET = "tml-a-secret-that-must-stay-here"

HONEST = """
import ctypes, os, signal, sys, threading, time
def reward(completion, row):
    if completion != "attack":
        return float(len(completion))
"""

pytestmark = pytest.mark.skipif(os.uname().sysname != "Linux", reason="jails are Linux's")


def attacking(code: str) -> str:
    """A reward that is honest until a completion says "attack"."""
    return HONEST + textwrap.indent(textwrap.dedent(code), "    ")


def score(jail: Jail, *completions: str) -> list[Scored]:
    samples = [Sample((text,), ({},)) for text in completions]
    return [result for results in jail.score(samples) for result in results]


def attacked(jail: Jail) -> Scored:
    """What the attack was scored, between honest samples that must have their values."""
    before, attack, after, last = score(jail, "ab", "attack", "abc", "abcd")
    assert [before, after, last] == [Scored(2.0), Scored(3.0), Scored(4.0)]
    assert score(jail, "a") == [Scored(1.0)]
    return attack


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """No process of a jail is alive when a test is over."""
    yield
    _, alive = psutil.wait_procs(below(), timeout=5)
    assert alive == []


def below() -> list[psutil.Process]:
    """The jails' processes of this test run."""
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if "rewards.inside" in " ".join(process.cmdline())
    ]


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's home with the key wherever one may lie."""
    home = tmp_path_factory.mktemp("user")
    (home / ".tinker").mkdir()
    (home / ".tinker" / "credentials.json").write_text(SECRET)
    (home / ".netrc").write_text(SECRET)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("TINKER_API_KEY", SECRET)
    monkeypatch.setenv("TINKER_CREDENTIAL_CMD", f"echo {SECRET}")
    return home


READS = {
    "its environment": "return sum(SECRET in value for value in os.environ.values())",
    "the parent's environment": "return float(SECRET in open('/proc/PARENT/environ').read())",
    "its own /proc": "return float(SECRET in open('/proc/self/environ').read())",
    "the first process's": "return float(SECRET in open('/proc/1/environ').read())",
    "the parent's memory": "return float(len(open('/proc/PARENT/mem', 'rb').read(1)))",
    "the stored key": "return float(SECRET in open('USER_HOME/.tinker/credentials.json').read())",
    "the netrc": "return float(SECRET in open('USER_HOME/.netrc').read())",
    "a hidden file beside it": "return float(SECRET in open('BESIDE/.env').read())",
    "a file beside it named for a key": "return len(open('BESIDE/api_key.txt').read())",
    "a link beside it": "return float(SECRET in open('BESIDE/data.txt').read())",
    "the folder beside it": "return len(os.listdir('BESIDE/..'))",
    "the passwords": "return len(open('/etc/shadow').read())",
    "the users": "return len(open('/etc/passwd').read())",
}


@pytest.mark.parametrize("what", READS)
def test_the_key_is_not_read_from(what: str, jailed: OpenJail, home: Path, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(SECRET)
    (tmp_path / "api_key.txt").write_text(SECRET)
    (tmp_path / "data.txt").symlink_to(home / ".netrc")
    code = READS[what].replace("SECRET", repr(SECRET)).replace("PARENT", str(os.getpid()))
    code = code.replace("USER_HOME", str(home)).replace("BESIDE", str(tmp_path))
    attack = attacked(jailed(attacking(code)))
    if what == "its environment":
        assert attack == Scored(0.0)  # there is nothing to find
    else:
        assert attack.value is None
        assert "Error" in str(attack.error)


SOCKETS = {
    "tcp": "import socket; socket.create_connection(('127.0.0.1', PORT)); return 1",
    "udp": "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT));"
    " return 1",
    "raw netlink": "import socket; socket.socket(16, socket.SOCK_RAW); return 1",
    "unix": "import socket; socket.socket(socket.AF_UNIX).connect('/run/docker.sock'); return 1",
    "a pair led astray": "import socket; a, b = socket.socketpair(type=socket.SOCK_DGRAM);"
    " a.sendto(b'x', '/dev/log'); return 1",
    "listening": "import socket; socket.create_server(('127.0.0.1', 0)); return 1",
    "urllib": "import urllib.request; urllib.request.urlopen('http://127.0.0.1:PORT'); return 1",
    "io_uring": "libc = ctypes.CDLL(None, use_errno=True); p = ctypes.create_string_buffer(256)\n"
    "if libc.syscall(425, 4, p) >= 0: return 1\nraise OSError(ctypes.get_errno())",
}


@pytest.mark.parametrize("how", SOCKETS)
def test_no_socket_opens(how: str, jailed: OpenJail) -> None:
    attack = attacked(jailed(attacking(SOCKETS[how].replace("PORT", "9"))))
    assert attack.value is None
    assert "Error" in str(attack.error)
    assert "Refused" not in str(attack.error)  # then a packet would have left


PROCESSES = {
    "a fork bomb": "while True: os.fork()",
    "a program": "import subprocess; subprocess.run(['/bin/true']); return 1",
    "a shell": "return 1.0 if os.system('true') == 0 else None",
    "a daemon": "if os.fork() == 0:\n    os.setsid(); time.sleep(600)\nreturn 1",
    "posix_spawn": "os.posix_spawn(sys.executable, ['python'], {}); return 1",
    "multiprocessing": "import multiprocessing as m; p = m.Process(target=print); p.start()\nreturn 1",
    "a raw clone": "libc = ctypes.CDLL(None, use_errno=True)\n"
    "if libc.syscall(56, 17, 0, 0, 0, 0) >= 0: return 1\nraise OSError(ctypes.get_errno())",
    "new namespaces": "libc = ctypes.CDLL(None, use_errno=True)\n"
    "if libc.unshare(0x10000000) == 0: return 1\nraise OSError(ctypes.get_errno())",
    "ptrace": "libc = ctypes.CDLL(None, use_errno=True)\n"
    "if libc.ptrace(16, PARENT, 0, 0) == 0: return 1\nraise OSError(ctypes.get_errno())",
    "its parent's memory": "libc = ctypes.CDLL(None, use_errno=True)\n"
    "if libc.process_vm_readv(PARENT, 0, 0, 0, 0, 0) >= 0: return 1\n"
    "raise OSError(ctypes.get_errno())",
    "killing its parent": "os.kill(PARENT, 9); return 1",
    "killing what it calls its parent": "os.kill(os.getppid(), 9); return 1",
    "killing everybody": "os.kill(-1, 9); return 1",
    "killing its group": "os.killpg(0, 9); return 1",
    "its parent's limits": "import resource\n"
    "resource.prlimit(PARENT, resource.RLIMIT_NOFILE, (0, 0)); return 1",
}


@pytest.mark.parametrize("what", PROCESSES)
def test_it_neither_starts_nor_reaches_another_process(what: str, jailed: OpenJail) -> None:
    attack = attacked(jailed(attacking(PROCESSES[what].replace("PARENT", str(os.getpid())))))
    assert attack.value is None
    launcher_and_cell = 2
    assert len(below()) == launcher_and_cell


THREADS = """
def spin():
    time.sleep(60)
threading.stack_size(65536)
while True:
    threading.Thread(target=spin, daemon=True).start()
"""
EXITS = {
    "os._exit": ("os._exit(0)", "its process ended"),
    "os._exit with a status": ("os._exit(3)", "status 3"),
    "sys.exit": ("sys.exit()", "SystemExit"),
    "a segmentation fault": ("ctypes.string_at(0)", "signal 11"),
    "abort": ("os.abort()", "signal"),
    "recursion": ("def f(): return f()\nf()", "RecursionError"),
    "deep recursion": ("sys.setrecursionlimit(10**9)\ndef f(): return str(f())\nf()", ""),
    "threads without end": (THREADS, ""),
    "KeyboardInterrupt": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "an error that cannot be told": (
        "class E(Exception):\n    def __str__(self): raise self\nraise E",
        "it raised E",
    ),
}


@pytest.mark.parametrize("how", EXITS)
def test_an_end_costs_one_sample(how: str, jailed: OpenJail) -> None:
    code, told = EXITS[how]
    attack = attacked(jailed(attacking(code)))
    assert attack.value is None
    assert told in str(attack.error)


def test_it_inherits_no_descriptor_but_its_own_pipes(jailed: OpenJail) -> None:
    code = """
    def is_open(descriptor):
        try: return bool(os.fstat(descriptor))
        except OSError: return False
    return sum(map(is_open, range(256)))
    """
    streams, requests_and_answers = 3, 2
    assert attacked(jailed(attacking(code))) == Scored(streams + requests_and_answers)


def test_killing_itself_costs_one_sample(jailed: OpenJail) -> None:
    # As the first process of its namespace it does not even notice.
    attack = attacked(jailed(attacking("os.kill(os.getpid(), 9); time.sleep(60)")))
    assert attack.value is None


LOOPS = {
    "busy": "while True: pass",
    "asleep": "time.sleep(600)",
    "deaf": "for n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
    "    except (OSError, ValueError): pass\nwhile True: pass",
    "catching everything": "while True:\n    try:\n        while True: pass\n"
    "    except BaseException: pass",
    "in C, with the interpreter held": "return 9 ** 9 ** 9",
}


@pytest.mark.parametrize("how", LOOPS)
def test_a_loop_ends_at_the_limit(how: str, jailed: OpenJail) -> None:
    jail = jailed(attacking(LOOPS[how]), wall_s=0.5)
    began = time.monotonic()
    attack = attacked(jail)
    assert attack == Scored(None, "it took longer than 0.5 s")
    assert time.monotonic() - began < 8


MEMORY = {
    "10 GB at once": "return len(bytearray(10 * 2**30))",
    "10 GB bit by bit": "kept = []\nwhile True: kept.append(bytearray(2**24))",
    "10 GB shared": "import mmap\nkept = []\nwhile True:\n"
    "    kept.append(mmap.mmap(-1, 2**26)); kept[-1].write(b'x' * 2**26)",
    "a memory file": "f = os.memfd_create('x'); os.write(f, b'x'); return 1",
    "System V memory": "libc = ctypes.CDLL(None, use_errno=True)\n"
    "if libc.shmget(0, 2**30, 0o1600) >= 0: return 1\nraise OSError(ctypes.get_errno())",
    "a long number": "return 10 ** 3_000_000",
}


@pytest.mark.parametrize("how", MEMORY)
def test_memory_is_bounded(how: str, jailed: OpenJail) -> None:
    limits = {"memory_bytes": 256 * 2**20, "address_bytes": 2**30, "wall_s": 8}
    attack = attacked(jailed(attacking(MEMORY[how]), **limits))
    assert attack.value is None


WRITES = {
    "a new file": "open('OUTSIDE/new', 'w'); return 1",
    "an old file": "open('OUTSIDE/kept.txt', 'w'); return 1",
    "appending": "open('OUTSIDE/kept.txt', 'a'); return 1",
    "truncating": "os.truncate('OUTSIDE/kept.txt', 0); return 1",
    "truncating by opening": "os.open('OUTSIDE/kept.txt', os.O_RDONLY | os.O_TRUNC); return 1",
    "deleting": "os.unlink('OUTSIDE/kept.txt'); return 1",
    "deleting all": "import shutil; shutil.rmtree('OUTSIDE'); return 1",
    "renaming": "os.rename('OUTSIDE/kept.txt', 'OUTSIDE/b'); return 1",
    "moving it in": "os.rename('OUTSIDE/kept.txt', os.environ['HOME'] + '/b'); return 1",
    "a link": "os.link('OUTSIDE/kept.txt', 'OUTSIDE/b'); return 1",
    "a symbolic link": "os.symlink('/etc', 'OUTSIDE/b'); return 1",
    "a folder": "os.mkdir('OUTSIDE/b'); return 1",
    "a mode": "os.chmod('OUTSIDE/kept.txt', 0o777); return 1",
    "an owner": "os.chown('OUTSIDE/kept.txt', os.getuid(), os.getgid()); return 1",
    "a time": "os.utime('OUTSIDE/kept.txt', (0, 0)); return 1",
    "an attribute": "os.setxattr('OUTSIDE/kept.txt', 'user.x', b'x'); return 1",
    "a device": "os.mknod('OUTSIDE/b', 0o60600, 0x800); return 1",
    "/tmp": "open('/tmp/tinker-mcp-hostile', 'w'); return 1",
    "/dev/shm": "open('/dev/shm/tinker-mcp-hostile', 'w'); return 1",
    "a remount": "libc = ctypes.CDLL(None, use_errno=True)\n"
    "if libc.mount(b'none', b'/', None, 32, None) == 0: return 1\n"
    "raise OSError(ctypes.get_errno())",
    "chroot": "os.chroot('OUTSIDE'); return 1",
}


@pytest.mark.parametrize("what", WRITES)
def test_nothing_outside_changes(what: str, jailed: OpenJail, tmp_path: Path) -> None:
    outside = tmp_path / "project"
    outside.mkdir()
    kept = outside / "kept.txt"
    kept.write_text("kept")
    before = kept.stat()
    attack = attacked(jailed(attacking(WRITES[what].replace("OUTSIDE", str(outside)))))
    assert attack.value is None
    assert [path.name for path in outside.iterdir()] == ["kept.txt"]
    assert kept.read_text() == "kept"
    after = kept.stat()
    assert (after.st_mode, after.st_mtime, after.st_uid) == (
        before.st_mode,
        before.st_mtime,
        before.st_uid,
    )


def test_the_reward_file_itself_cannot_be_rewritten(jailed: OpenJail, tmp_path: Path) -> None:
    source = attacking("open(__file__, 'w').write('def reward(c, r): return 1')")
    assert attacked(jailed(source)).value is None
    assert (tmp_path / "reward.py").read_text() == source


def test_its_scratch_folder_is_writable_and_small(jailed: OpenJail) -> None:
    code = """
    home = os.environ['HOME']
    with open(home + '/a', 'w') as file: file.write('abc')
    if open(home + '/a').read() != 'abc': return 0
    for n in range(10_000):
        with open(f'{home}/{n}', 'wb') as file: file.write(bytes(2**20))
    return 1
    """
    attack = attacked(jailed(attacking(code), wall_s=20))
    assert "Errno" in str(attack.error)


PRINTS = {
    "a gigabyte": "for _ in range(1024): print('x' * 2**20)",
    "nothing, its streams closed": "os.close(1); os.close(2); time.sleep(60)",
    "to stderr": "while True: sys.stderr.write('x' * 2**16)",
    "past Python": "while True: os.write(1, b'x' * 2**16)",
}


@pytest.mark.parametrize("how", PRINTS)
def test_printing_is_bounded_and_goes_nowhere(
    how: str, jailed: OpenJail, capfd: pytest.CaptureFixture[str]
) -> None:
    attack = attacked(jailed(attacking(PRINTS[how]), wall_s=1.0))
    is_silent = how.startswith("nothing")
    told = "it took longer than 1 s" if is_silent else "it printed more than 1024 KiB"
    assert attack == Scored(None, told)
    assert capfd.readouterr() == ("", "")


RESULTS = {
    "NaN": "return float('nan')",
    "infinity": "return float('inf')",
    "a string": "return '1.0'",
    "True": "return True",
    "None": "return None",
    "a list": "return [1.0]",
    "a huge string": "return 'x' * 2**28",
    "a huge number": "return 10**400",
    "complex": "return 1j",
    "a pickle bomb": "class Bomb:\n    def __reduce__(self): return os.system, ('touch OUTSIDE/x',)\n"
    "return Bomb()",
    "a pickled bomb as bytes": "return b\"cos\\nsystem\\n(S'touch OUTSIDE/x'\\ntR.\"",
    "a float that attacks": "class F(float):\n    def __float__(self): os._exit(1)\nreturn F('nan')",
    "an item that attacks": "class F:\n    def item(self): os._exit(1)\nreturn F()",
    "an item that recurses": "class F:\n    def item(self): return self.item()\nreturn F()",
}


@pytest.mark.parametrize("what", RESULTS)
def test_a_result_that_is_no_number_is_an_error(
    what: str, jailed: OpenJail, tmp_path: Path
) -> None:
    attack = attacked(jailed(attacking(RESULTS[what].replace("OUTSIDE", str(tmp_path)))))
    assert attack.value is None
    assert attack.error
    assert not (tmp_path / "x").exists()


FINDS_PIPES = """
import struct, json
def pipes():
    for descriptor in range(3, 256):
        try:
            target = os.fstat(descriptor).st_mode
        except OSError:
            continue
        if (target & 0o170000) == 0o010000:
            yield descriptor
def say(body):
    for descriptor in pipes():
        try:
            os.write(descriptor, struct.pack('>I', len(body)) + body)
        except OSError:
            pass
"""
FORGERIES = {
    "another sample's answer": 'json.dumps({"id": 999, "results": [1.0]}).encode()',
    "too many values": 'json.dumps({"id": 1, "results": [1.0, 1.0]}).encode()',
    "NaN": 'b\'{"id": 1, "results": [NaN]}\'',
    "no JSON": "b'\\x80\\x04cos\\nsystem\\n'",
    "no object": "b'[]'",
    "deep JSON": "b'[' * 4000",
    "a long number": "b'{\"id\": 1, \"results\": [' + b'9' * 8000 + b']}'",
    "another type": 'b\'{"id": 1, "results": "x"}\'',
    "a true": 'b\'{"id": 1, "results": [true]}\'',
    "an error that is none": 'b\'{"id": 1, "results": [{"error": {"a": []}}]}\'',
    "control characters": 'b\'{"id": 1, "results": [{"error": "\\\\u001b[2J\\\\n\\\\nhi"}]}\'',
}


@pytest.mark.parametrize("what", FORGERIES)
def test_a_forged_answer_scores_nothing(what: str, jailed: OpenJail) -> None:
    code = f"say({FORGERIES[what]}); time.sleep(60)"
    attack = attacked(jailed(FINDS_PIPES + attacking(code), wall_s=1.0))
    assert attack.value is None
    assert str(attack.error).isprintable()


def test_a_frame_that_promises_gigabytes_is_not_awaited(jailed: OpenJail) -> None:
    code = "[os.write(d, b'\\xff\\xff\\xff\\xff') for d in (1, 2)]\nsay(b'x' * 2**20)"
    assert attacked(jailed(FINDS_PIPES + attacking(code))).value is None


def test_an_answer_before_the_question_is_not_believed(jailed: OpenJail) -> None:
    code = """
    def later():
        time.sleep(0.05)
        say(json.dumps({"id": 5, "results": [99.0]}).encode())
    threading.Thread(target=later).start()
    return 1
    """
    jail = jailed(FINDS_PIPES + attacking(code))
    score(jail, "ab", "attack")
    time.sleep(0.3)
    assert score(jail, "abc", "abcd") == [Scored(3.0), Scored(4.0)]


def test_a_thread_left_behind_costs_nobody_a_sample(jailed: OpenJail) -> None:
    code = """
    threading.Timer(0.05, os._exit, [1]).start()
    return 1
    """
    source = attacking(code).replace("float(len", "time.sleep(0.1) or float(len")
    results = score(jailed(source), "ab", "attack", "abc", "abcd")
    assert [result.value for result in results] == [2.0, 1.0, 3.0, 4.0]


def test_attacks_while_the_file_loads_are_contained(jailed: OpenJail, tmp_path: Path) -> None:
    for code in ("import os; os._exit(0)", "while True: pass", "import os; os.fork()", "1 +"):
        with pytest.raises(Exception, match=r"reward\.py cannot be used: it"):
            jailed(code, start_s=1.0)


def test_the_end_of_this_process_ends_the_jail(tmp_path: Path) -> None:
    import subprocess
    import sys

    program = """
import os, signal, time
from tinker_mcp.training.rewards.jail import *
jail = Jail(Program("file", "r", "def reward(c, r): return 1"), Limits())
jail.open()
print(jail._cell._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    launcher = int(run.stdout)
    limit = time.monotonic() + 5
    while psutil.pid_exists(launcher) and time.monotonic() < limit:
        if psutil.Process(launcher).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.01)
    else:
        assert not psutil.pid_exists(launcher)

"""Code tasks: each completion is a program, tried against tests in a process of its own.

The keeper runs no foreign code. It forks a worker for a completion, which shuts itself in before
it sees the code, and believes of it only what can be checked: outputs are compared here, and the
expected ones never enter the worker. Of tests written as `assert` lines the worker must say that
they passed; it is told them, and the word to say, after the completion's own code has run.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import re
import secrets
import select
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from tinker_mcp.training.rewards.inside import cell, frames, kernel, seccomp
from tinker_mcp.training.rewards.inside.errors import UnusableError
from tinker_mcp.training.rewards.inside.graders import expected
from tinker_mcp.training.rewards.inside.worker import told

Work: TypeAlias = Callable[[int, int], None]
"""What a worker does, with the descriptor it reads from and the one it writes to."""

_FENCED = re.compile(r"```[\w-]*\n(.*?)```", re.DOTALL)
_MAX_OUTPUT_BYTES = 2**20


def serve(config: dict[str, Any], held: dict[str, bool], requests: int, answers: int) -> None:
    """Answer requests until there are no more."""
    keeper = _Keeper(config, held, (requests, answers))
    with contextlib.suppress(OSError):
        kernel.no_new_privileges()
        seccomp.restrict_keeper()
    frames.send(answers, {"held": keeper.trial()})
    sys.path += config["site"]
    arguments = frames.receive(requests)["arguments"]
    frames.send(answers, {"is_batch": False})
    while True:
        try:
            request = frames.receive(requests)
        except EOFError:
            return
        try:
            row, code = request["rows"][0], program_of(request["completions"][0])
            tests = expected(row, arguments)
            passed = keeper.passed(code, tests, row, arguments["timeout_s"])
            value = sum(passed) / len(passed) if arguments["partial"] else float(all(passed))
            results: list[Any] = [value]
        except Exception as error:  # of the row's tests: the completion's own stay in the worker
            why = str(error) if isinstance(error, UnusableError) else told(error, "")
            results = [{"error": why}]
        frames.send(answers, {"id": request["id"], "results": results})


def program_of(completion: str) -> str:
    """The last fenced block, or all of it where there is none."""
    blocks = _FENCED.findall(completion)
    return str(blocks[-1]) if blocks else completion


class _Keeper:
    def __init__(
        self, config: dict[str, Any], held: dict[str, bool], private: tuple[int, int]
    ) -> None:
        self._config = config
        self._held = held
        self._private = private

    def trial(self) -> dict[str, bool]:
        """What isolates a worker, found by one that does nothing else."""

        def work(reading: int, writing: int) -> None:
            frames.send(writing, _Keeper.walls)

        with _Worker(self, work) as worker:
            found = worker.receive(time.monotonic() + 10)
        return found if isinstance(found, dict) else {}

    walls: Mapping[str, bool] = {}
    """In a worker: what isolates it."""

    def passed(self, code: str, tests: Any, row: Mapping[str, Any], timeout_s: float) -> list[bool]:
        """Which tests the code passes; all fail when it does not even load.

        Raises:
            UnusableError: The tests are of no known form.
        """
        deadline = time.monotonic() + timeout_s
        if isinstance(tests, str):
            with contextlib.suppress(ValueError):
                tests = json.loads(tests)
        if isinstance(tests, str):
            tests = [tests]
        if not isinstance(tests, list) or not tests:
            raise UnusableError("the tests are neither text nor a list")
        if all(isinstance(test, str) for test in tests):
            return self._asserts(code, tests, row, deadline)
        if not all(isinstance(test, dict) and {"input", "output"} <= set(test) for test in tests):
            raise UnusableError('each test must be text, or have "input" and "output"')
        if tests[0].get("testtype") == "functional" or tests[0].get("func_name"):
            return self._functional(code, tests, deadline)
        return [self._prints(code, test, deadline) for test in tests]

    def enclose(self) -> None:
        """In a new worker: shut it in."""
        for descriptor in self._private:
            os.close(descriptor)
        cell.end_with_parent()
        _Keeper.walls = cell.enclose(self._config, self._held)
        vars(builtins).update(exit=sys.exit, quit=sys.exit)  # as programs expect, without `site`

    def _asserts(
        self, code: str, tests: Sequence[str], row: Mapping[str, Any], deadline: float
    ) -> list[bool]:
        entry = row.get("entry_point") if isinstance(row, Mapping) else None

        def work(reading: int, writing: int) -> None:
            scope = _run(code)
            frames.send(writing, "loaded")
            word, tests = frames.receive(reading)
            for test in tests:
                try:
                    exec(test, scope)  # noqa: S102
                    if isinstance(entry, str) and "check" in scope:
                        scope["check"](scope[entry])
                    is_passed = True
                except BaseException:
                    is_passed = False
                frames.send(writing, [word, is_passed])

        word = secrets.token_hex()
        with _Worker(self, work) as worker:
            if worker.receive(deadline) != "loaded":
                return [False] * len(tests)
            worker.send([word, list(tests)], deadline)
            return [worker.receive(deadline) == [word, True] for _ in tests]

    def _functional(
        self, code: str, tests: Sequence[Mapping[str, Any]], deadline: float
    ) -> list[bool]:
        name = tests[0].get("func_name") or (tests[0].get("metadata") or {}).get("func_name")
        if not isinstance(name, str):
            raise UnusableError("the tests name no function (func_name)")
        inputs = [_arguments(test["input"]) for test in tests]

        def work(reading: int, writing: int) -> None:
            scope = _run(code)
            solution = scope.get("Solution")
            function = scope[name] if name in scope else getattr(solution(), name)  # type: ignore[misc]
            for given in inputs:
                try:
                    frames.send(writing, {"output": function(*given)})
                except BaseException:
                    frames.send(writing, {})

        with _Worker(self, work) as worker:
            results = [worker.receive(deadline) for _ in tests]
        return [
            isinstance(result, dict)
            and "output" in result
            and result["output"] in (test["output"], _value(test["output"]))
            for result, test in zip(results, tests, strict=True)
        ]

    def _prints(self, code: str, test: Mapping[str, Any], deadline: float) -> bool:
        given, printed = _file(self._config["scratch"]), _file(self._config["scratch"])
        os.write(given, str(test["input"]).encode())
        os.lseek(given, 0, os.SEEK_SET)

        def work(reading: int, writing: int) -> None:
            os.dup2(given, 0)
            os.dup2(printed, 1)
            sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
            try:
                _run(code)
                frames.send(writing, "done")
            except SystemExit as ended:
                if ended.code in (None, 0):
                    frames.send(writing, "done")
            finally:
                sys.stdout.flush()

        try:
            with _Worker(self, work) as worker:
                is_done = worker.receive(deadline) == "done"
                worker.wait(deadline)
            output = os.pread(printed, _MAX_OUTPUT_BYTES, 0).decode(errors="replace")
        finally:
            os.close(given)
            os.close(printed)
        return is_done and _lines(output) == _lines(str(test["output"]))


class _Worker:
    """A forked process that shuts itself in and works; ended with the block."""

    def __init__(self, keeper: _Keeper, work: Work) -> None:
        reading, self._writing = os.pipe()
        self._reading, writing = os.pipe()
        self._buffer = b""
        self._pid = os.fork()
        if self._pid == 0:
            with contextlib.suppress(BaseException):
                os.close(self._reading)
                os.close(self._writing)
                null = os.open(os.devnull, os.O_RDWR)
                for descriptor in (0, 1, 2):
                    os.dup2(null, descriptor)
                keeper.enclose()
                work(reading, writing)
            os._exit(0)
        os.close(reading)
        os.close(writing)
        self._is_ended = False

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._is_ended:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        os.close(self._reading)
        os.close(self._writing)

    def send(self, message: Any, deadline: float) -> None:
        """A message, unless the worker has ended or does not read it in time."""
        os.set_blocking(self._writing, False)
        look = select.poll()
        look.register(self._writing, select.POLLOUT)
        rest = memoryview(frames.packed(message))
        while rest and look.poll(max(0.0, deadline - time.monotonic()) * 1000):
            try:
                rest = rest[os.write(self._writing, rest) :]
            except BrokenPipeError:
                return

    def receive(self, deadline: float) -> Any:
        """The next message; None where none comes in time, or what comes is none."""
        size = frames.HEADER.size
        while True:
            if len(self._buffer) >= size:
                (length,) = frames.HEADER.unpack_from(self._buffer)
                if length > _MAX_OUTPUT_BYTES:
                    return None
                if len(self._buffer) >= size + length:
                    body = self._buffer[size : size + length]
                    self._buffer = self._buffer[size + length :]
                    try:
                        return json.loads(body)
                    except (ValueError, RecursionError):
                        return None
            part = self._part(deadline)
            if not part:
                return None
            self._buffer += part

    def wait(self, deadline: float) -> None:
        """Until it has ended and what it printed is in its file, or the deadline."""
        while not self._is_ended and self._part(deadline):
            pass

    def _part(self, deadline: float) -> bytes:
        look = select.poll()
        look.register(self._reading, select.POLLIN)
        if not look.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return b""
        return os.read(self._reading, 65536)


def _run(code: str) -> dict[str, Any]:
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, "completion.py", "exec"), scope)  # noqa: S102  # shut in by now
    return scope


def _file(folder: str) -> int:
    """A file without a name, which a worker can have open and no other process can find."""
    path = f"{folder}/{secrets.token_hex(8)}"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.unlink(path)  # noqa: PTH108
    return descriptor


def _arguments(given: Any) -> list[Any]:
    """The arguments of a call: a list, or text with one JSON value a line (LiveCodeBench)."""
    if isinstance(given, list):
        return given
    return [_value(line) for line in str(given).splitlines() if line.strip()]


def _value(text: Any) -> Any:
    try:
        return json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return text


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]

"""A user's file as a reward: its forms, its neighbours, its pace, and where it may lie."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tinker_mcp.errors import InvalidInputError, NotFoundError
from tinker_mcp.settings import Settings
from tinker_mcp.training.rewards.cell import Limits, Program
from tinker_mcp.training.rewards.contract import Completion, Scored
from tinker_mcp.training.rewards.jail import Held
from tinker_mcp.training.rewards.opening import opened
from tinker_mcp.training.rewards.pool import JailedReward
from tinker_mcp.training.rewards.probe import probe
from tinker_mcp.training.rewards.specs import spec_of

LESSER_KERNEL = Path(__file__).with_name("lesser_kernel.py")


async def score(folder: Path, source: str, *texts: str, **row: Any) -> list[Scored]:
    (folder / "reward.py").write_text(source)
    with opened(spec_of("reward.py"), Settings(roots=(folder,))) as reward:
        return list(await reward.score([Completion(text) for text in texts], [row] * len(texts)))


def jails() -> list[psutil.Process]:
    """Processes below this one that belong to a jail."""
    below = psutil.Process().children(recursive=True)
    return [process for process in below if "rewards.inside" in " ".join(process.cmdline())]


@pytest.mark.parametrize(
    "source",
    [
        "def reward(completion, row): return len(completion) + row['n']",
        "async def reward(completion, row): return len(completion) + row['n']",
        "import asyncio\nasync def reward(completion, row):\n    await asyncio.sleep(0)\n"
        "    return len(completion) + row['n']",
        "def reward_batch(completions, rows):\n"
        "    return [len(c) + r['n'] for c, r in zip(completions, rows)]",
        "async def reward_batch(completions, rows):\n"
        "    return [len(c) + r['n'] for c, r in zip(completions, rows)]",
        "import numpy as np\ndef reward(completion, row):\n"
        "    return np.float32(len(completion) + row['n'])",
        "import numpy as np\ndef reward_batch(completions, rows):\n"
        "    return np.array([len(c) + r['n'] for c, r in zip(completions, rows)])",
        "from dataclasses import dataclass\n@dataclass\nclass P:\n    n: int\n"
        "def reward(completion, row): return len(completion) + P(row['n']).n",
    ],
)
async def test_a_function_of_any_form_scores(source: str, tmp_path: Path) -> None:
    assert await score(tmp_path, source, "a", "bcd", n=2) == [Scored(3.0), Scored(5.0)]


async def test_a_batch_sees_all_completions_of_the_call(tmp_path: Path) -> None:
    source = """
def reward_batch(completions, rows):
    longest = max(map(len, completions))
    return [float(len(c) == longest) for c in completions]
"""
    results = await score(tmp_path, source, *("x" * n for n in range(100)))
    assert [result.value for result in results] == [0.0] * 99 + [1.0]


@pytest.mark.parametrize(
    ("body", "errors"),
    [
        ("[1.0, None, float('nan')]", [None, "NoneType, not a number", "nan"]),
        ("[1.0]", ["1 values for 3 samples"] * 3),
        ("1 / 0", ["ZeroDivisionError: division by zero (line 1)"] * 3),
        ("None", ["TypeError"] * 3),
    ],
)
async def test_a_batch_leaves_out_what_has_no_value(
    body: str, errors: list[str | None], tmp_path: Path
) -> None:
    results = await score(tmp_path, f"def reward_batch(c, r): return {body}", "a", "b", "c")
    for result, error in zip(results, errors, strict=True):
        assert (result.value is None) == (error is not None)
        assert error is None or error in str(result.error)


async def test_modules_and_data_beside_it_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "words.py").write_text("GOOD = 'red'")
    (tmp_path / "more.txt").write_text("blue")
    source = """
from pathlib import Path
import words
MORE = (Path(__file__).parent / "more.txt").read_text()
def reward(completion, row): return float(completion in (words.GOOD, MORE))
"""
    results = await score(tmp_path, source, "red", "blue", "green")
    assert [result.value for result in results] == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("def reward(c, r) return 1", r"SyntaxError: .* \(line 1\)"),
        ("import nothing_of_that_name", r"ModuleNotFoundError: .* \(line 1\)"),
        ("x = 1", "it defines neither reward"),
        ("raise SystemExit", "it raised SystemExit"),
    ],
)
async def test_a_file_that_cannot_be_used_says_why(source: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=told):
        await score(tmp_path, source, "x")


async def test_a_file_must_lie_inside_the_roots(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "reward.py").write_text("def reward(c, r): return 1")
    (inside / "link.py").symlink_to(tmp_path / "reward.py")
    for path in ("../reward.py", "link.py", str(tmp_path / "reward.py")):
        with (
            pytest.raises(InvalidInputError, match="outside the allowed folders"),
            opened(spec_of(path), Settings(roots=(inside,))),
        ):
            pass
    with pytest.raises(NotFoundError), opened(spec_of("no.py"), Settings(roots=(inside,))):
        pass


async def test_two_thousand_short_completions_take_less_than_a_second(tmp_path: Path) -> None:
    program = Program("file", "r", "def reward(c, r): return float(r['answer'] in c)")
    reward = JailedReward(program, Limits())
    try:
        completions = [Completion(f"It is {n}.") for n in range(2000)]
        rows = [{"prompt": f"What is {n}?", "answer": str(n)} for n in range(2000)]
        await reward.score(completions[:1], rows[:1])
        began = time.monotonic()
        results = await reward.score(completions, rows)
        assert time.monotonic() - began < 1.0
    finally:
        reward.close()
    assert all(result.value == 1.0 for result in results)


async def test_slow_rewards_run_side_by_side(tmp_path: Path) -> None:
    source = "import time\ndef reward(c, r):\n    time.sleep(0.05)\n    return float(c)"
    reward = JailedReward(Program("file", "r", source), Limits(), processes=4)
    try:
        began = time.monotonic()
        results = await reward.score([Completion(str(n)) for n in range(96)], [{}] * 96)
        assert time.monotonic() - began < 0.05 * 96 * 0.75
    finally:
        reward.close()
    assert [result.value for result in results] == [float(n) for n in range(96)]


async def test_calls_at_the_same_time_share_the_processes(tmp_path: Path) -> None:
    program = Program("file", "r", "import os\ndef reward(c, r): return float(c)")
    reward = JailedReward(program, Limits(), processes=2)
    try:
        calls = [
            reward.score([Completion(str(n + i)) for i in range(40)], [{}] * 40) for n in range(8)
        ]
        for n, results in enumerate(await asyncio.gather(*calls)):
            assert [result.value for result in results] == [float(n + i) for i in range(40)]
        assert len(reward._jails) <= 2
    finally:
        reward.close()


async def test_a_cancelled_call_ends_its_process_and_the_next_one_works(tmp_path: Path) -> None:
    source = "def reward(c, r):\n    while c == 'loop': pass\n    return 1"
    reward = JailedReward(Program("file", "r", source), Limits(wall_s=30))
    try:
        await reward.score([Completion("x")], [{}])
        call = asyncio.create_task(reward.score([Completion("loop")], [{}]))
        await asyncio.sleep(0.2)
        children = jails()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await reward.score([Completion("x")], [{}]) == [Scored(1.0)]
        _, alive = psutil.wait_procs(children, timeout=5)
        assert alive == []
    finally:
        reward.close()


async def test_closing_leaves_no_process_and_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def folders() -> list[Path]:
        return list(tmp_path.iterdir())

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    reward = JailedReward(Program("file", "r", "def reward(c, r): return 1"), Limits())
    await reward.score([Completion("x")], [{}])
    children = jails()
    assert folders() != []
    reward.close()
    _, alive = psutil.wait_procs(children, timeout=5)
    assert (alive, folders()) == ([], [])


def test_the_probe_finds_all_isolations_here() -> None:
    assert str(probe()) == "jail: network, files, memory, processes"


def test_only_the_user_can_let_code_run_without_walls() -> None:
    assert not Settings.from_environment({}).allow_unjailed
    assert Settings.from_environment({"TINKER_MCP_ALLOW_UNJAILED": "1"}).allow_unjailed
    with pytest.raises(InvalidInputError, match="TINKER_MCP_ALLOW_UNJAILED='maybe' is unclear"):
        Settings.from_environment({"TINKER_MCP_ALLOW_UNJAILED": "maybe"})


def _under(refused: str, code: str, tmp_path: Path) -> str:
    """What a program prints on a kernel that refuses some system calls."""
    script = tmp_path / "script.py"
    script.write_text(code)
    run = subprocess.run(
        [sys.executable, str(LESSER_KERNEL), refused, str(script)],
        capture_output=True, text=True, check=False, env=dict(os.environ),
    )  # fmt: skip
    return run.stdout + run.stderr


PROBES = "from tinker_mcp.training.rewards.probe import probe\nprint(probe())"


@pytest.mark.parametrize(
    ("refused", "told"),
    [
        # as in a container: Landlock and seccomp are enough
        ("unshare", "jail: network, files, memory, processes"),
        ("unshare,mount_setattr,mount", "jail: network, files, memory, processes"),
        ("landlock_restrict_self", "jail: network, memory, processes; missing: files"),
        ("seccomp", "jail: network, files, memory; missing: processes"),
        ("unshare,seccomp", "jail: files, memory; missing: network, processes"),
    ],
)
def test_a_lesser_kernel_is_told_as_it_is(refused: str, told: str, tmp_path: Path) -> None:
    assert _under(refused, PROBES, tmp_path).strip() == told


def test_attacks_are_contained_without_namespaces_too(tmp_path: Path) -> None:
    attacks = LESSER_KERNEL.with_name("test_rewards_hostile.py")
    chosen = "neither_starts or nothing_outside or forged or no_socket"
    options = ["-q", "-p", "no:cacheprovider", str(attacks), "-k", chosen]
    code = f"import pytest\nraise SystemExit(pytest.main({options!r}))"
    last = _under("unshare", code, tmp_path).strip().splitlines()[-1]
    assert "passed" in last
    assert "failed" not in last


@pytest.mark.parametrize(
    ("allowed", "told"),
    [
        ("", "This machine cannot isolate foreign code"),
        ("allow_unjailed=True", "[[Scored(value=1.0, error=None)]]"),
    ],
)
def test_without_walls_code_runs_only_where_the_user_says_so(
    allowed: str, told: str, tmp_path: Path
) -> None:
    code = f"""
from tinker_mcp.training.rewards.cell import Limits, Program
from tinker_mcp.training.rewards.jail import Jail, Sample
jail = Jail(Program("file", "r", "def reward(c, r): return 1"), Limits(), {allowed})
try:
    jail.open()
    print(jail.score([Sample(("x",), ({{}},))]))
finally:
    jail.close()
"""
    assert told in _under("unshare,seccomp", code, tmp_path)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_an_ordinary_user_gets_the_same_jail(tmp_path: Path) -> None:
    code = (
        "import os\nos.setgroups([])\nos.setgid(65534)\nos.setuid(65534)\n"
        "import tempfile\ntempfile.tempdir = '/tmp'\n"
        f"assert os.getuid() == 65534\n{PROBES}"
    )
    if not _others_can_run_python():
        pytest.skip("this Python lies in a folder that only root may enter")
    assert _under("bpf", code, tmp_path).strip() == str(
        Held(network=True, files=True, memory=True, processes=True)
    )


def _others_can_run_python() -> bool:
    places = [Path(sys.executable).resolve(), *Path(sys.executable).resolve().parents]
    return all(place.stat().st_mode & 0o001 for place in places)

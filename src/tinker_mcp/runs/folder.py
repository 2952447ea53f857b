"""The files of one run, in the cookbook's layout: `tinker_cookbook.stores` reads them.

```
<home>/runs/<run_id>/
    config.json         the spec, the data's hashes, versions, the price; never a key
    metrics.jsonl       one line a step and one an evaluation
    checkpoints.jsonl   what `checkpoint_utils.get_last_checkpoint` looks for
    logs.log            what the worker and its libraries said
    data/               the datums it trains on, and those that it is evaluated on
```

The store is what a resume goes by; these are written before it, so that whatever a kill leaves
too much here is dropped by `rewind` and comes again.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.runs.spec import RunSpec
from tinker_mcp.store.rows import CheckpointRow
from tinker_mcp.training.prices import Price

RUNS = "runs"
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_VERSIONS_OF = ("tinker-mcp", "tinker", "tinker-cookbook", "torch", "transformers")
_TAIL_BYTES = 8192  # more than a pipeline has on its way: a line is a few hundred bytes

Line = Mapping[str, Any]


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run."""

    path: Path

    @classmethod
    def of(cls, home: Path, run_id: str) -> RunFolder:
        """The folder of a run, which need not exist.

        Raises:
            InvalidInputError: `run_id` is no plain name, and could lead out of the runs' folder.
        """
        if not _RUN_ID.fullmatch(run_id):
            raise InvalidInputError(
                f"{run_id[:80]!r} is no run_id.", next_step="Call list_runs for those there are."
            )
        return cls(home / RUNS / run_id)

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "logs.log"

    @property
    def train_data(self) -> Path:
        return self.path / "data" / "train.safetensors"

    @property
    def held_out_data(self) -> Path:
        return self.path / "data" / "held_out.safetensors"

    def create(self, spec: RunSpec, run_id: str, price: Price | None = None) -> None:
        """Make the folder, for its owner alone, and `config.json`.

        Args:
            price: What `spec.usd_per_million` comes from, with source and date.
        """
        self.train_data.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path.chmod(0o700)  # mkdir gives parents the usual mode
        self.write_config(spec, run_id, price)

    def write_config(self, spec: RunSpec, run_id: str, price: Price | None = None) -> None:
        """Write `config.json`; a price that was there stays where none is given."""
        known = json.loads(self.config.read_bytes()) if self.config.exists() else {}
        config = {
            **_cookbook_config(spec),
            "run_id": run_id,
            "data_sha256": {
                "train": spec.train.sha256,
                "held_out": spec.held_out and spec.held_out.sha256,
            },
            "price": asdict(price) if price else known.get("price"),
            "versions": _versions(),
            "spec": spec.model_dump(mode="json"),
        }
        _write(self.config, json.dumps(config, indent=2, default=str).encode() + b"\n")

    def append_metrics(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write the numbers of a step, or of an evaluation there, over an earlier line of them."""

        def is_the_same(line: Line) -> bool:
            return line.get("step") == step and line.keys() - {"step"} == numbers.keys()

        if any(is_the_same(line) for line in _tail(self.metrics)):
            _filter(self.metrics, lambda line: not is_the_same(line))
        _append(self.metrics, {"step": step, **numbers})

    def append_checkpoint(self, row: CheckpointRow) -> None:
        """Write a checkpoint; `batch` is the number of steps done, where the cookbook resumes."""
        line = {
            "name": f"{self.path.name}-{row.step:06d}",
            "batch": row.step,
            "step": row.step,
            "final": row.is_final,
            "state_path": row.state_path,
            "sampler_path": row.sampler_path,
        }
        _append(self.checkpoints, line)

    def rewind(self, step: int) -> None:
        """Drop what lies after `step`, and lines that a kill has torn; each file at once."""
        for path in (self.metrics, self.checkpoints):
            if path.exists():
                _filter(path, lambda line: line.get("step", 0) <= step)


def _cookbook_config(spec: RunSpec) -> dict[str, Any]:
    """What the cookbook's `supervised.train` or `preference.train_dpo` would call it.

    Its registry tells the kind of training by `num_epochs` and `dpo_beta`.
    """
    units = spec.train.datums // 2 if spec.method == "dpo" else spec.train.datums
    config = {
        "model_name": spec.base_model,
        "load_checkpoint_path": spec.checkpoint,
        "renderer_name": spec.renderer,
        "max_length": spec.max_length,
        "train_on_what": spec.train_on_what,
        "batch_size": spec.batch_size,
        "learning_rate": spec.learning_rate,
        "lr_schedule": spec.lr_schedule,
        "num_epochs": spec.steps * spec.batch_size / max(units, 1),
        "max_steps": spec.steps,
        "lora_rank": spec.rank,
        "seed": spec.seed,
        "save_every": spec.save_every,
        "eval_every": spec.eval_every,
        "ttl_seconds": spec.ttl_s,
    }
    if spec.rl is not None:  # as rl.train calls it; without epochs, by which sft is told
        del config["num_epochs"]
        return config | {
            "groups_per_batch": spec.batch_size,
            "loss_fn": spec.rl.loss_fn,
            "loss_fn_config": spec.rl.loss_config,
            "max_tokens": spec.rl.max_tokens,
            "temperature": spec.rl.temperature,
            "num_substeps": spec.rl.substeps,
            "kl_penalty_coef": spec.rl.kl_coef,
        }
    if spec.distill is not None and spec.distill.mode == "on_policy":  # as train_on_policy has it
        del config["num_epochs"]
        return config | {
            "groups_per_batch": spec.batch_size,
            "group_size": spec.distill.group_size,
            "max_tokens": spec.distill.max_tokens,
            "temperature": spec.distill.temperature,
            "kl_penalty_coef": spec.distill.kl_coef,
            "kl_discount_factor": spec.distill.kl_discount,
        }
    return config | {"dpo_beta": spec.beta} if spec.method == "dpo" else config


def _versions() -> dict[str, str | None]:
    return {"python": platform.python_version(), **{name: _version(name) for name in _VERSIONS_OF}}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _append(path: Path, line: Line) -> None:
    """Add a line in one write, after what is whole: a kill tears the last line at most."""
    written = json.dumps(line).encode() + b"\n"
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        whole = _whole_bytes(path, size)
        if whole < size:  # a full disk, or a kill that nobody rewound
            file.truncate(whole)
        if file.write(written) < len(written):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _whole_bytes(path: Path, size: int) -> int:
    """Where the last whole line ends."""
    with path.open("rb") as file:
        file.seek(max(0, size - 1))
        if size == 0 or file.read(1) == b"\n":
            return size
        file.seek(0)
        return file.read(size).rfind(b"\n") + 1


def _tail(path: Path) -> Iterator[Line]:
    """Its last whole lines."""
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES)
            file.seek(start)
            end = file.read()
    except FileNotFoundError:
        return iter(())
    return _lines(end.partition(b"\n")[2] if start else end)


def _filter(path: Path, is_kept: Callable[[Line], bool]) -> None:
    kept = [line for line in _lines(path.read_bytes()) if is_kept(line)]
    _write(path, b"".join(json.dumps(line).encode() + b"\n" for line in kept))


def _lines(written: bytes) -> Iterator[Line]:
    for text in written.splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # torn
            continue
        if isinstance(line, dict):
            yield line


def _write(path: Path, content: bytes) -> None:
    """Replace a file: a reader sees the old one or the new one."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise

"""What a million tokens cost: a dated snapshot, and the user's own file over it.

The user's file, `prices.json` in the home, holds `{"<model>": {"train": 0.44, "prefill": ...,
"sample": ...}}`, of which only `train` is needed.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from tinker_mcp.errors import InvalidInputError

FILE_NAME = "prices.json"


@dataclass(frozen=True)
class Price:
    """USD per million tokens of one model, and who says so.

    Attributes:
        train: Of forward_backward, and of forward.
        source: An address or a file.
        date: When it was read there; of the user's own file, when that was written.
        derived: Which of the three were derived, and are not confirmed.
        train_at_most: `train`, or how high a derived one may be.
        cached_prefill: Of prompt tokens that were computed before.
    """

    train: float
    source: str
    date: str
    prefill: float | None = None
    sample: float | None = None
    derived: tuple[str, ...] = ()
    train_at_most: float = 0.0
    cached_prefill: float | None = None

    @property
    def usd_per_million(self) -> float:
        """What training costs."""
        return self.train


class _Numbers(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    train: float = Field(ge=0)
    prefill: float | None = Field(None, ge=0)
    sample: float | None = Field(None, ge=0)
    derived: tuple[str, ...] = ()


_Users = TypeAdapter(dict[str, _Numbers])


def own_file(home: Path) -> Path:
    """Where the user may say what a model costs."""
    return home / FILE_NAME


def price(model_name: str, home: Path) -> Price | None:
    """The user's price of a model, else the snapshot's; None where neither knows it.

    A variant such as `<model>:peft:262144` has a price of its own, not that of the model.

    Raises:
        InvalidInputError: The user's file cannot be read.
    """
    own = own_file(home)
    if own.exists():
        numbers = _own(own)
        if model_name in numbers:
            written = datetime.datetime.fromtimestamp(own.stat().st_mtime, datetime.UTC)
            return _price(numbers[model_name], str(own), written.date().isoformat(), _snapshot())
    known = _snapshot()
    if model_name not in known["models"]:
        return None
    found = _Numbers.model_validate(known["models"][model_name])
    return _price(found, known["source"], known["date"], known)


def _price(found: _Numbers, source: str, date: str, known: Mapping[str, Any]) -> Price:
    is_derived = "train" in found.derived
    return Price(
        train=found.train,
        source=source,
        date=date,
        prefill=found.prefill,
        sample=found.sample,
        derived=found.derived,
        train_at_most=found.train * (known["derived_at_most"] if is_derived else 1),
        cached_prefill=None
        if found.prefill is None
        else found.prefill * known["cached_prefill_share"],
    )


def _own(path: Path) -> dict[str, _Numbers]:
    try:
        return _Users.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        place = ".".join(map(str, first["loc"])) if first else ""
        what = f"{place}: {first['msg']}" if first else str(error)
        raise InvalidInputError(
            f"The prices in {str(path)!r} cannot be read: {what.lstrip(': ')}.",
            next_step='Write {"<model>": {"train": <USD per million tokens>}}, or remove the file.',
        ) from error


@cache
def _snapshot() -> dict[str, Any]:
    text = resources.files("tinker_mcp.training").joinpath(FILE_NAME).read_text("utf-8")
    known: dict[str, Any] = json.loads(text)
    return known

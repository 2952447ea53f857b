"""Check what a run needs: versions, backend, API key, models and prices; sample one token.

Without TINKER_API_KEY the backend is tinker-local, on this machine; the first start downloads a
model of 93 MB. With --dry-run nothing is sampled.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tinker

from tinker_mcp import scripting
from tinker_mcp.settings import Settings
from tinker_mcp.training import models, prices, sessions

PACKAGES = ("tinker-mcp", "tinker", "tinker-cookbook", "torch", "transformers")


def parsed() -> argparse.Namespace:
    return scripting.parser(__doc__).parse_args()


def described(offered: tinker.types.SupportedModel, is_local: bool) -> dict[str, Any]:
    """A model, its learning rate, and USD per million tokens where they are known."""
    settings = Settings.from_environment(os.environ)
    name = str(offered.model_name)
    price = None if is_local else prices.price(name, settings.home)
    known = price and {"prefill": price.prefill, "sample": price.sample, "train": price.train}
    rate = models.learning_rate(name)
    return {
        "name": name,
        "context_length": offered.max_context_length,
        "learning_rate": rate.value,
        "learning_rate_source": rate.source,
        "usd_per_million": {} if is_local else known,
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    settings = Settings.from_environment(os.environ)
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "state_folder": str(settings.home),
        "disk_free_gb": round(shutil.disk_usage(Path.home()).free / 1e9, 1),
    }
    scripting.tell("versions:", found["versions"])
    backend, offered = scripting.open_backend()
    # A ServiceClient proves nothing: these two requests need a key that is accepted.
    caller = sessions.rest_client(backend).whoami().result()
    is_local = backend.kind == "local"
    found |= {
        "backend": backend.label,
        "user": caller.user_urn,
        "models": [described(model, is_local) for model in offered],
    }
    scripting.tell("backend:", backend.label, "with", len(offered), "models")
    opened = scripting.open_model(args.base_model)
    prompt = opened.model.prompt([{"role": "user", "content": "Say hello."}])
    found |= opened.facts() | {"usd": opened.usd(prefill=prompt.length, sample=1)}
    if args.dry_run:
        return found | {"is_sampled": False}
    sampler = opened.service().create_sampling_client(base_model=args.base_model).result()
    params = tinker.SamplingParams(max_tokens=1, temperature=0.0)
    [sequence] = sampler.sample(prompt, 1, params).result().sequences
    scripting.tell("first token:", repr(opened.model.decode(sequence.tokens)))
    return found | {"is_sampled": len(sequence.tokens) == 1}


if __name__ == "__main__":
    scripting.main(run, parsed())

"""Turn a durable run's record into a stand-alone script that does the same training again.

The script holds the run's settings and the loop, to read and to change; its datums it loads from
the run's folder, and checks their hash. On the local backend in float32 it ends with the same
losses.
"""

from __future__ import annotations

import argparse
import json
import os
import pprint
from pathlib import Path
from typing import Any

from _backend import main, tell
from pydantic import ValidationError

from tinker_mcp.errors import InvalidInputError, NotFoundError
from tinker_mcp.runs.folder import RunFolder
from tinker_mcp.runs.spec import RunSpec
from tinker_mcp.settings import Settings

HEAD = '''"""The training of run @RUN_ID@, made by reproduce_run.py from @CONFIG@."""

import asyncio
import dataclasses
import hashlib
import json
import os
import sys
from pathlib import Path

import tinker
from tinker_cookbook.utils.lr_scheduling import compute_schedule_lr_multiplier

from tinker_mcp.runs import data
from tinker_mcp.settings import Settings
from tinker_mcp.training import sessions
from tinker_mcp.training.backend import BackendConnector
from tinker_mcp.training.datums import weight_sum
from tinker_mcp.training.loop import batch_of

RUN = @SPEC@
DATA = Path(@DATA@)
assert hashlib.sha256(DATA.read_bytes()).hexdigest() == RUN["sha256"], f"{DATA} has changed."

settings = dataclasses.replace(Settings.from_environment(os.environ), call_limit_s=900.0)
backend = asyncio.run(BackendConnector(settings).connect())
service = sessions.open_service(backend)
if RUN["checkpoint"]:
    client = service.create_training_client_from_state(RUN["checkpoint"]).result()
else:
    client = service.create_lora_training_client(
        RUN["base_model"], rank=RUN["rank"], seed=RUN["seed"]
    ).result()
datums = data.load(DATA)


def adam(step):
    share = compute_schedule_lr_multiplier(RUN["lr_schedule"], step, RUN["steps"])
    return tinker.AdamParams(learning_rate=RUN["learning_rate"] * share)

'''
SFT = """
def batch(step):
    return batch_of(datums, RUN["batch_size"], step, RUN["seed"])


def submit(step):
    return client.forward_backward(batch(step), "cross_entropy"), client.optim_step(adam(step))


def loss_of(output, step):
    return output.metrics["loss:sum"] / weight_sum(batch(step))  # nats a unit of weight

"""
DPO = """
import torch
from tinker_cookbook.preference.train_dpo import compute_dpo_loss


def weighted(datum, logprobs):
    return (logprobs * datum.loss_fn_inputs["weights"].to_torch()).sum()


outputs = client.forward(datums, "cross_entropy").result().loss_fn_outputs  # nothing learnt yet
references = {
    id(d): weighted(d, torch.tensor(found["logprobs"].data))
    for d, found in zip(datums, outputs, strict=True)
}
pairs = [datums[at : at + 2] for at in range(0, len(datums), 2)]


def dpo(batch, logprobs):
    sums = [weighted(d, found) for d, found in zip(batch, logprobs, strict=True)]
    frozen = [references[id(d)] for d in batch]
    return compute_dpo_loss(sums[::2], sums[1::2], frozen[::2], frozen[1::2], RUN["beta"])


def submit(step):
    chosen = batch_of(pairs, RUN["batch_size"], step, RUN["seed"])
    batch = [datum for pair in chosen for datum in pair]
    return client.forward_backward_custom(batch, dpo), client.optim_step(adam(step))


def loss_of(output, step):
    return output.metrics["dpo_loss"]

"""
LOOP = """
losses = []
requests = submit(0)
for step in range(RUN["steps"]):
    upcoming = submit(step + 1) if step + 1 < RUN["steps"] else None  # before this is awaited
    output, _ = (request.result() for request in requests)
    losses.append(loss_of(output, step))
    print(f"step {step + 1}/{RUN['steps']}  loss {losses[-1]:.4f}", file=sys.stderr)
    requests = upcoming or requests
state = client.save_state("reproduced", ttl_seconds=604_800)
sampler = client.save_weights_for_sampler("reproduced", ttl_seconds=604_800)
paths = {"state_path": state.result().path, "sampler_path": sampler.result().path}
print(json.dumps({"losses": losses, **paths}))
"""
METHODS = {"sft": SFT, "dpo": DPO}
SETTINGS = ("base_model", "checkpoint", "rank", "seed", "steps", "batch_size", "learning_rate")


def parsed() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("run", help="a run's id, or its folder")
    options.add_argument("--out", type=Path, help="default: reproduce_RUN.py here")
    options.add_argument("--dry-run", action="store_true", help="check all, write nothing")
    options.add_argument("--json", action="store_true", help="the result as one line of JSON")
    return options.parse_args()


def run(args: argparse.Namespace) -> dict[str, Any]:
    home = Settings.from_environment(os.environ).home
    is_folder = (Path(args.run) / "config.json").is_file()
    folder = RunFolder(Path(args.run).resolve()) if is_folder else RunFolder.of(home, args.run)
    if not folder.config.is_file():
        raise NotFoundError(f"No record {folder.config}.", next_step="Try `tinker-mcp runs --all`.")
    try:
        config = json.loads(folder.config.read_bytes())
        spec = RunSpec.model_validate(config["spec"])
    except (ValueError, KeyError, ValidationError) as error:
        what = f"{folder.config} is no run's record: {str(error)[:200]}."
        raise InvalidInputError(what, next_step="Give the id of another run.") from error
    if spec.method not in METHODS or not folder.train_data.is_file():
        what = f"Run {config['run_id']} ({spec.method}) has no data that a script could load."
        raise InvalidInputError(what, next_step="Give an sft or dpo run whose folder is whole.")
    out = args.out or Path(f"reproduce_{config['run_id']}.py")
    if out.exists():
        raise InvalidInputError(f"{out} exists.", next_step="Give another --out.")
    kept = {name: getattr(spec, name) for name in (*SETTINGS, "lr_schedule", "beta")}
    filled = {
        "@RUN_ID@": config["run_id"],
        "@CONFIG@": str(folder.config),
        "@SPEC@": pprint.pformat(kept | {"sha256": spec.train.sha256}, sort_dicts=False),
        "@DATA@": repr(str(folder.train_data)),
    }
    text = HEAD + METHODS[spec.method] + LOOP
    for mark, value in filled.items():
        text = text.replace(mark, value)
    compile(text, str(out), "exec")
    found = {"run_id": config["run_id"], "method": spec.method, "out": str(out.resolve())}
    tell("from", folder.config, "with", spec.train.tokens, "tokens of data")
    if not args.dry_run:
        out.write_text(text)
    trained = spec.steps * spec.batch_size * spec.train.tokens // spec.train.datums
    return found | {"base_model": spec.base_model, "trained_tokens_about": trained}


if __name__ == "__main__":
    main(run, parsed())

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
import string
from pathlib import Path
from typing import Any

from tinker_mcp import scripting
from tinker_mcp.errors import InvalidInputError
from tinker_mcp.runs.folder import RunFolder
from tinker_mcp.runs.spec import RunSpec
from tinker_mcp.settings import Settings

SCRIPT = '''"""The training of run $run_id, made by reproduce_run.py from $config."""

import hashlib
import json
from pathlib import Path

import tinker
from tinker_cookbook.utils.lr_scheduling import compute_schedule_lr_multiplier

from tinker_mcp import scripting
from tinker_mcp.runs import data
from tinker_mcp.training import dpo, sessions
from tinker_mcp.training.datums import weight_sum
from tinker_mcp.training.loop import batch_of

RUN = $spec
DATA = Path($data)
if hashlib.sha256(DATA.read_bytes()).hexdigest() != RUN["train"]["sha256"]:
    raise SystemExit(f"{DATA} has changed since the run.")

datums = data.load(DATA)
size = 2 if RUN["method"] == "dpo" else 1  # the sides of a pair, or a conversation
units = [datums[at : at + size] for at in range(0, len(datums), size)]
backend, _ = scripting.open_backend()
service = sessions.open_service(backend)
if RUN["checkpoint"]:
    opening = service.create_training_client_from_state(RUN["checkpoint"])
else:
    opening = service.create_lora_training_client(RUN["base_model"], RUN["rank"], RUN["seed"])
client = opening.result()
batches = [
    [datum for unit in batch_of(units, RUN["batch_size"], step, RUN["seed"]) for datum in unit]
    for step in range(RUN["steps"])
]
$before

def submit(step):
    batch = batches[step]
    share = compute_schedule_lr_multiplier(RUN["lr_schedule"], step, RUN["steps"])
    adam = tinker.AdamParams(learning_rate=RUN["learning_rate"] * share)
    return $request, client.optim_step(adam)


losses = []
for output in scripting.overlapped(submit, RUN["steps"]):
    batch = batches[len(losses)]
    losses.append($loss)
    scripting.tell(f"step {len(losses)}/{len(batches)}  loss {losses[-1]:.4f}")
print(json.dumps({"losses": losses, **scripting.saved(client, "reproduced")}))
'''
REFERENCES = """
found = client.forward(datums, "cross_entropy").result()  # nothing learnt yet: the reference
references = dict(zip(map(id, datums), dpo.references_of(found, datums), strict=True))
objective = dpo.DpoLoss(RUN["beta"], references)
"""
METHODS = {
    "sft": {
        "before": "",
        "request": 'client.forward_backward(batch, "cross_entropy")',
        "loss": 'output.metrics["loss:sum"] / weight_sum(batch)',
    },
    "dpo": {
        "before": REFERENCES,
        "request": "client.forward_backward_custom(batch, objective.function(batch))",
        "loss": 'output.metrics["dpo_loss"]',
    },
}


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
    try:
        config = json.loads(folder.config.read_bytes())
        spec = RunSpec.model_validate(config["spec"])
    except (OSError, ValueError, KeyError) as error:
        what = f"{folder.config} is no run's record: {str(error)[:200]}."
        raise InvalidInputError(what, next_step="Try `tinker-mcp runs --all`.") from error
    if spec.method not in METHODS or not folder.train_data.is_file():
        what = f"Run {config['run_id']} ({spec.method}) has no data that a script could load."
        raise InvalidInputError(what, next_step="Give an sft or dpo run whose folder is whole.")
    out = args.out or Path(f"reproduce_{config['run_id']}.py")
    if out.exists():
        raise InvalidInputError(f"{out} exists.", next_step="Give another --out.")
    text = string.Template(SCRIPT).substitute(
        run_id=config["run_id"],
        config=folder.config,
        spec=pprint.pformat(spec.model_dump(mode="json"), sort_dicts=False),
        data=repr(str(folder.train_data)),
        **METHODS[spec.method],
    )
    compile(text, str(out), "exec")
    scripting.tell("from", folder.config, "with", spec.train.tokens, "tokens of data")
    if not args.dry_run:
        out.write_text(text)
    trained = spec.steps * spec.batch_size * spec.train.tokens // spec.train.datums
    found = {"run_id": config["run_id"], "method": spec.method, "base_model": spec.base_model}
    return found | {"out": str(out.resolve()), "trained_tokens_about": trained}


if __name__ == "__main__":
    scripting.main(run, parsed())

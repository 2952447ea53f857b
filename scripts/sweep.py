"""Train every combination of models, data sets and learning rates; compare them on the same rows.

The runs go side by side, one step of each at a time, so none waits for another's requests. Losses
of models with different tokenizers do not compare: bits a byte do, and the table is sorted by
them.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import tinker
from tinker_cookbook.supervised.common import compute_bpb
from tinker_cookbook.supervised.data import conversation_to_datum

from tinker_mcp import scripting
from tinker_mcp.training.datasets import split
from tinker_mcp.training.loop import batch_of


@dataclasses.dataclass
class Run:
    """One combination; `losses` are nats a trained token, each conversation counted the same."""

    opened: scripting.Opened
    data: str
    learning_rate: float
    batches: list[list[tinker.Datum]]
    test: list[tinker.Datum]
    client: Any = None
    losses: list[float] = dataclasses.field(default_factory=list)

    def submit(self, step: int) -> tuple[Any, Any]:
        adam = tinker.AdamParams(learning_rate=self.learning_rate * (1 - step / len(self.batches)))
        loss = self.client.forward_backward(self.batches[step], "cross_entropy")
        return loss, self.client.optim_step(adam)

    def bits_a_byte(self, output: tinker.ForwardBackwardOutput) -> float:
        """How well the held-out replies are predicted, whatever the tokenizer."""
        inputs = [datum.loss_fn_inputs for datum in self.test]
        weights, targets = ([of[name] for of in inputs] for name in ("weights", "target_tokens"))
        logprobs = [found["logprobs"] for found in output.loss_fn_outputs]
        return compute_bpb(logprobs, weights, targets, self.opened.model.tokenizer)


def parsed() -> argparse.Namespace:
    options = scripting.parser(__doc__)
    options.add_argument("--model", action="append", help="again for more; default: --base-model")
    options.add_argument("--data", type=Path, action="append", help="again for more")
    options.add_argument("--learning-rates", type=float, nargs="+", default=[3e-4, 1e-3])
    options.add_argument("--held-out", type=Path, help="default: a sixteenth of the first --data")
    options.add_argument("--steps", type=int, default=6)
    options.add_argument("--batch-size", type=int, default=4, help="conversations a step")
    options.add_argument("--rank", type=int, default=32)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--name", default="sweep", help="of the checkpoints")
    options.add_argument("--wandb-project", help="sends each run there too, if wandb is installed")
    return options.parse_args()


def planned(args: argparse.Namespace) -> list[Run]:
    """All combinations, with everything checked that can be checked for free."""
    for rate in args.learning_rates:
        scripting.checked(args, "steps", "batch_size", "rank", rate=rate)
    files = args.data or [scripting.example_data()]
    sets = {str(path): [row.messages for row in scripting.examples(path)] for path in files}
    if args.held_out:
        held_out = [row.messages for row in scripting.examples(args.held_out)]
    else:
        _, held_out = split(sets[str(files[0])], 1 / 16, args.seed)
    runs = []
    for name, data in itertools.product(args.model or [args.base_model], sets):
        opened = scripting.open_model(name)
        train, test = (
            [conversation_to_datum(row, opened.model.renderer, 512) for row in rows]
            for rows in ([row for row in sets[data] if row not in held_out], held_out)
        )
        batches = [batch_of(train, args.batch_size, step, args.seed) for step in range(args.steps)]
        runs += [Run(opened, data, rate, batches, test) for rate in args.learning_rates]
    return runs


def run(args: argparse.Namespace) -> dict[str, Any]:
    wandb = scripting.wandb() if args.wandb_project else None
    runs = planned(args)
    usd = [one.opened.usd(sum(map(scripting.tokens, [*one.batches, one.test]))) for one in runs]
    plan = {"backend": runs[0].opened.backend.label, "runs": len(runs), "steps": args.steps}
    plan |= {"held_out": len(runs[0].test), "usd": None if None in usd else sum(map(float, usd))}
    scripting.tell("plan:", plan)
    if args.dry_run:
        return plan

    service = runs[0].opened.service()
    opening = [
        service.create_lora_training_client(one.opened.base_model, rank=args.rank, seed=args.seed)
        for one in runs
    ]
    for one, future in zip(runs, opening, strict=True):
        one.client = future.result()
    requests = [one.submit(0) for one in runs]
    for step in range(1, args.steps + 1):
        upcoming = [one.submit(step) for one in runs] if step < args.steps else []  # before waiting
        for one, (loss, optim) in zip(runs, requests, strict=True):
            one.losses.append(loss.result().metrics["loss:sum"] / args.batch_size)
            optim.result()
        scripting.tell(f"step {step}/{args.steps}  nll", *(f"{one.losses[-1]:.3f}" for one in runs))
        requests = upcoming
    testing = [one.client.forward(one.test, "cross_entropy") for one in runs]
    table = []
    for at, (one, future) in enumerate(zip(runs, testing, strict=True)):
        output = future.result()
        row = {"base_model": one.opened.base_model, "data": Path(one.data).name}
        row |= {"learning_rate": one.learning_rate, "bits_a_byte": one.bits_a_byte(output)}
        row |= {"held_out_nll": output.metrics["loss:sum"] / len(one.test), "losses": one.losses}
        table.append(row | scripting.saved(one.client, f"{args.name}-{at}"))
    table.sort(key=lambda row: row["bits_a_byte"])
    for row in table:
        scripting.tell("  ".join(f"{name}={row[name]}" for name in list(row)[:5]))
        if wandb:
            settings = {name: row[name] for name in ("base_model", "data", "learning_rate")}
            with wandb.init(project=args.wandb_project, config=settings) as logged:
                for step, loss in enumerate(row["losses"], start=1):
                    logged.log({"train_mean_nll": loss}, step=step)
                logged.summary.update({name: row[name] for name in ("held_out_nll", "bits_a_byte")})
    return plan | {"table": table}


if __name__ == "__main__":
    scripting.main(run, parsed())

"""Train every combination of models, data sets and learning rates; compare them on the same rows.

The runs go side by side, one step of each at a time, so none waits for another's requests. Losses
of models with different tokenizers do not compare: nats a byte do, and the table is sorted by
them.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import tinker
from _backend import CONVERSATIONS, checked, examples, main, open_model, parser, tell, tokens
from tinker_cookbook.renderers import TrainOnWhat
from tinker_cookbook.supervised.data import conversation_to_datum

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.training.datasets import split
from tinker_mcp.training.loop import batch_of

WHAT = TrainOnWhat.ALL_ASSISTANT_MESSAGES


def parsed() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--model", action="append", help="again for more; default: --base-model")
    options.add_argument("--data", type=Path, action="append", help="again for more")
    options.add_argument("--learning-rates", default="3e-4,1e-3", help="separated by commas")
    options.add_argument("--held-out", type=Path, help="default: a sixteenth of the first --data")
    options.add_argument("--steps", type=int, default=6)
    options.add_argument("--batch-size", type=int, default=4, help="conversations a step")
    options.add_argument("--max-length", type=int, default=512)
    options.add_argument("--rank", type=int, default=32)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--wandb-project", help="sends each run there too, if wandb is installed")
    return options.parse_args()


def run(args: argparse.Namespace) -> dict[str, Any]:
    try:
        rates = [float(rate) for rate in args.learning_rates.split(",")]
    except ValueError as error:
        raise InvalidInputError(f"--learning-rates: {error}.", next_step="Try 3e-4,1e-3.") from None
    for rate in rates:
        checked(args, "steps", "batch_size", "rank", rate=rate)
    names, files = args.model or [args.base_model], args.data or [CONVERSATIONS]
    sets = {str(path): [c.messages for c in examples(path)] for path in files}
    if args.held_out:
        held_out = [c.messages for c in examples(args.held_out)]
    else:
        sets[str(files[0])], held_out = split(sets[str(files[0])], 1 / 16, args.seed)
    sets = {name: [row for row in rows if row not in held_out] for name, rows in sets.items()}
    opened = {name: open_model(name) for name in names}

    def datums(name: str, rows: Any) -> list[tinker.Datum]:
        renderer = opened[name].model.renderer
        return [conversation_to_datum(row, renderer, args.max_length, WHAT, "none") for row in rows]

    tests = {name: datums(name, held_out) for name in names}
    trains = {(name, file): datums(name, sets[file]) for name in names for file in sets}
    combinations = list(itertools.product(names, sets, rates))

    def batch(name: str, file: str, step: int) -> list[tinker.Datum]:
        return batch_of(trains[name, file], args.batch_size, step, args.seed)

    usd: list[float | None] = []
    for name, file, _ in combinations:
        trained = sum(tokens(batch(name, file, step)) for step in range(args.steps))
        usd.append(opened[name].usd(train=trained + tokens(tests[name])))
    plan = {
        **{"backend": opened[names[0]].backend.label, "runs": len(combinations)},
        **{"held_out": len(held_out), "steps": args.steps},
        "usd": None if None in usd else sum(one or 0.0 for one in usd),
    }
    tell("plan:", plan)
    if args.dry_run:
        return plan

    service = opened[names[0]].service()
    opening = [
        service.create_lora_training_client(name, rank=args.rank, seed=args.seed)
        for name, _, _ in combinations
    ]
    clients = [future.result() for future in opening]

    def submit(step: int) -> list[tuple[Any, Any]]:
        """A step of each run."""
        requests = []
        for client, (name, file, rate) in zip(clients, combinations, strict=True):
            adam = tinker.AdamParams(learning_rate=rate * (1 - step / args.steps))
            loss = client.forward_backward(batch(name, file, step), "cross_entropy")
            requests.append((loss, client.optim_step(adam)))
        return requests

    losses: list[list[float]] = [[] for _ in combinations]
    requests = submit(0)
    for step in range(args.steps):
        upcoming = submit(step + 1) if step + 1 < args.steps else None  # before this is awaited
        for index, ((loss, optim), (name, file, _)) in enumerate(
            zip(requests, combinations, strict=True)
        ):
            losses[index].append(
                loss.result().metrics["loss:sum"] / weight(batch(name, file, step))
            )
            optim.result()
        tell(f"step {step + 1}/{args.steps}  nll", *(f"{of_run[-1]:.3f}" for of_run in losses))
        requests = upcoming or requests
    scoring = [
        client.forward(tests[name], "cross_entropy")
        for client, (name, _, _) in zip(clients, combinations, strict=True)
    ]
    saving = [
        client.save_weights_for_sampler(f"sweep-{index}", ttl_seconds=604_800)
        for index, client in enumerate(clients)
    ]
    replies = [str(m["content"]) for row in held_out for m in row if m["role"] == "assistant"]
    size = sum(len(reply.encode()) for reply in replies)
    table = []
    for index, (name, file, rate) in enumerate(combinations):
        total = scoring[index].result().metrics["loss:sum"]
        row = {"base_model": name, "data": Path(file).name, "learning_rate": rate}
        row |= {"held_out_nll": total / weight(tests[name]), "nats_a_byte": total / size}
        row |= {"losses": losses[index], "sampler_path": saving[index].result().path}
        table.append(row)
        log(args.wandb_project, row)
    table.sort(key=lambda row: row["nats_a_byte"])
    for row in table:
        tell("  ".join(f"{name}={row[name]}" for name in list(row)[:5]))
    return plan | {"table": table}


def weight(data: list[tinker.Datum]) -> float:
    return float(sum(datum.loss_fn_inputs["weights"].to_numpy().sum() for datum in data))


def log(project: str | None, row: dict[str, Any]) -> None:
    if project is None:
        return
    import wandb

    with wandb.init(project=project, config={k: v for k, v in row.items() if k != "losses"}) as run:
        for step, loss in enumerate(row["losses"]):
            run.log({"train_mean_nll": loss}, step=step)
        run.log({"test/nll": row["held_out_nll"], "test/nats_a_byte": row["nats_a_byte"]})


if __name__ == "__main__":
    main(run, parsed())

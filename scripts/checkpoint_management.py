"""Save, list, resume, keep, publish and delete checkpoints.

`demo` shows why there are two ways to go on: it trains, saves, and takes one step more from the
state with its optimizer, and one from its weights alone. A resume that forgets Adam's moments is
silent.
"""

from __future__ import annotations

import argparse
from typing import Any

import tinker
from tinker_cookbook.supervised.data import conversation_to_datum

from tinker_mcp import scripting
from tinker_mcp.errors import InvalidInputError
from tinker_mcp.training import sessions

ACTIONS = ("demo", "list", "set-ttl", "publish", "unpublish", "delete")


def parsed() -> argparse.Namespace:
    options = scripting.parser(__doc__)
    options.add_argument("action", nargs="?", choices=ACTIONS, default="demo")
    options.add_argument(
        "--path", help="tinker://RUN/weights/NAME; needed by all but demo and list"
    )
    options.add_argument("--ttl-s", type=int, help="of set-ttl: 3600 up; without it, for ever")
    options.add_argument("--steps", type=int, default=2, help="of demo")
    options.add_argument("--learning-rate", type=float, default=3e-4, help="of demo")
    options.add_argument("--seed", type=int, default=0, help="of demo")
    return options.parse_args()


def run(args: argparse.Namespace) -> dict[str, Any]:
    scripting.checked(args, "steps", rate=args.learning_rate)
    if args.action not in ("demo", "list") and not args.path:
        raise InvalidInputError(f"{args.action} needs --path.", next_step="See the action list.")
    if args.ttl_s is not None and args.ttl_s < 3600:
        raise InvalidInputError(f"--ttl-s {args.ttl_s} is below 3600.", next_step="Give more.")
    opened = scripting.open_model(args.base_model)
    if args.action == "demo":
        return demo(args, opened)
    rest = sessions.rest_client(opened.backend)
    changes = {
        "set-ttl": lambda: rest.set_checkpoint_ttl_from_tinker_path(args.path, args.ttl_s),
        "publish": lambda: rest.publish_checkpoint_from_tinker_path(args.path),
        "unpublish": lambda: rest.unpublish_checkpoint_from_tinker_path(args.path),
        "delete": lambda: rest.delete_checkpoint_from_tinker_path(args.path),
    }
    if args.action in changes and not args.dry_run:
        changes[args.action]().result()
    found = rest.list_user_checkpoints(limit=100).result().checkpoints
    for checkpoint in found:
        scripting.tell(checkpoint.tinker_path, checkpoint.size_bytes, checkpoint.expires_at)
    return {
        "backend": opened.backend.label,
        "action": args.action,
        "usd": 0.0,
        "checkpoints": [checkpoint.model_dump(mode="json") for checkpoint in found],
    }


def demo(args: argparse.Namespace, opened: Any) -> dict[str, Any]:
    rows = scripting.examples(scripting.example_data())[:4]
    batch = [conversation_to_datum(row.messages, opened.model.renderer, 256) for row in rows]
    billed = scripting.tokens(batch) * (args.steps + 5)
    plan = opened.plan(tokens=billed, usd=opened.usd(train=billed))
    if args.dry_run:
        return plan

    service = opened.service()

    def train(client: tinker.TrainingClient, steps: int) -> None:
        adam = tinker.AdamParams(learning_rate=args.learning_rate)
        requests = []
        for _ in range(steps):  # all submitted, then all awaited
            requests.append(client.forward_backward(batch, "cross_entropy"))
            requests.append(client.optim_step(adam))
        for request in requests:
            request.result()

    def loss(client: tinker.TrainingClient) -> float:
        output = client.forward(batch, "cross_entropy").result()
        return output.metrics["loss:sum"] / len(batch)  # each conversation's weights sum to 1

    client = service.create_lora_training_client(args.base_model, seed=args.seed).result()
    train(client, args.steps)
    saving = client.save_state("demo", ttl_seconds=3600)  # weights and optimizer
    sampler = client.save_weights_for_sampler("demo", ttl_seconds=3600).result().path
    state = saving.result().path
    scripting.tell("saved", state, "and", sampler)
    train(client, 1)
    resumed = service.create_training_client_from_state_with_optimizer(state).result()
    train(resumed, 1)
    restarted = service.create_training_client_from_state(state).result()  # Adam starts anew
    train(restarted, 1)
    prompt = opened.model.prompt([{"role": "user", "content": "Say hello."}])
    params = tinker.SamplingParams(max_tokens=8, temperature=0.0)
    sampling = service.create_sampling_client(model_path=sampler).result()
    [sequence] = sampling.sample(prompt, 1, params).result().sequences
    return plan | {
        "state_path": state,
        "sampler_path": sampler,
        "loss_gone_on": loss(client),
        "loss_resumed_with_optimizer": loss(resumed),  # the same
        "loss_resumed_from_weights": loss(restarted),  # another
        "sampled": opened.model.plain_text(sequence.tokens),
    }


if __name__ == "__main__":
    scripting.main(run, parsed())

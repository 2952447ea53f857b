"""What can be said of the arguments of an rl run alone."""

from __future__ import annotations

from tinker_mcp.errors import TinkerMcpError
from tinker_mcp.runs.planning.arguments import RunArguments
from tinker_mcp.runs.planning.findings import Findings
from tinker_mcp.training import losses


def agree(arguments: RunArguments, findings: Findings) -> None:
    """What can be said of the arguments alone."""
    asked = arguments.rl
    if asked is None:
        findings.refuse(
            "method=rl needs rl, its options",
            'Give rl={"reward": ...} or rl={"environment": ...}; search_docs("rl") has all names.',
        )
        return
    if (asked.reward is None) == (asked.environment is None):
        findings.refuse(
            "rl needs either reward or environment",
            'Give rl={"reward": "<path of a Python file>"}, a built-in such as '
            '{"reward": {"type": "number"}}, or {"environment": "package.module:Name"}.',
        )
    if asked.environment is not None:
        _agree_on_environment(arguments, findings)
    elif arguments.data is None:
        findings.refuse("data is missing", "Give a file of prompts, or rl.environment.")
    try:
        losses.complete_config(asked.loss_fn, asked.loss_config)
    except TinkerMcpError as error:
        findings.refuse(
            error.problem.rstrip(".").replace("loss_fn_config", "rl.loss_config"),
            error.next_step.replace("loss_fn_config", "rl.loss_config"),
        )


def _agree_on_environment(arguments: RunArguments, findings: Findings) -> None:
    for name in ("data", "eval_data", "eval_share", "epochs"):
        value = getattr(arguments, name)
        if value is not None and value != 0:
            findings.refuse(
                f"{name}={value!r} does not go with rl.environment, which brings its own prompts",
                f"Leave {name} out.",
            )
    if arguments.steps is None:
        findings.refuse("steps is missing", "Give steps: an environment has no end of its own.")

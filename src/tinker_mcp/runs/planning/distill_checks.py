"""What a distillation is asked to do, and whether that agrees."""

from __future__ import annotations

from tinker_mcp.runs.distill_options import Mode
from tinker_mcp.runs.planning.arguments import RunArguments
from tinker_mcp.runs.planning.findings import Findings

METHODS = ("distill", "prompt_distill")


def agree(arguments: RunArguments, findings: Findings) -> None:
    """What can be said of the arguments alone."""
    asked = arguments.distill
    if arguments.method not in METHODS:
        if asked is not None:
            findings.refuse(
                "distill is for method=distill and prompt_distill only", "Leave distill out."
            )
        return
    if arguments.data is None:
        findings.refuse("data is missing", "Give a file of prompts.")
    if asked is None:
        findings.refuse(
            f"method={arguments.method} needs distill, its options",
            'Give distill={"teacher": "<base model or sampler checkpoint>"}.'
            if arguments.method == "distill"
            else 'Give distill={"system_prompt": "..."}.',
        )
        return
    if arguments.method == "distill":
        if asked.teacher is None:
            findings.refuse(
                "distill.teacher is missing",
                "Give a base model (list_models has them), or sampler weights "
                "(list_checkpoints(kind=sampler)).",
            )
        if asked.system_prompt is not None:
            findings.refuse(
                "distill.system_prompt is for prompt_distill only",
                'Give method="prompt_distill", or leave it out.',
            )
        return
    if asked.system_prompt is None:
        findings.refuse(
            "distill.system_prompt is missing", "Give what the student is to do without being told."
        )
    if asked.mode == "on_policy":
        findings.refuse(
            "mode=on_policy does not go with prompt_distill, whose teacher answers itself",
            "Leave mode out.",
        )


def mode_of(arguments: RunArguments) -> Mode | None:
    """The mode, by default that of the method; None where there is no distillation."""
    if arguments.distill is None or arguments.method not in METHODS:
        return None
    default: Mode = "on_policy" if arguments.method == "distill" else "off_policy"
    return arguments.distill.mode or default


def is_on_policy(arguments: RunArguments) -> bool:
    """Whether the student samples."""
    return mode_of(arguments) == "on_policy"


def is_off_policy(arguments: RunArguments) -> bool:
    """Whether the teacher samples a set to learn."""
    return mode_of(arguments) == "off_policy"

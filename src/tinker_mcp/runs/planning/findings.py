"""What stands in the way of a run: collected, and told all at once."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from tinker_mcp.errors import InvalidInputError, TinkerMcpError
from tinker_mcp.runs.planning.arguments import Acceptance


@dataclass
class Findings:
    """Problems, each with its fix, and warnings.

    Attributes:
        accept: Checks whose problems are warnings only.
    """

    accept: Collection[Acceptance]
    problems: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def refuse(self, problem: str, fix: str) -> None:
        """A problem that cannot be accepted; it ends without a full stop, its fix with one."""
        if (problem, fix) not in self.problems:
            self.problems.append((problem, fix))

    def refuse_error(self, error: TinkerMcpError) -> None:
        """The same of an error that something else raised."""
        self.refuse(error.problem.rstrip("."), error.next_step)

    def ask(self, check: Acceptance, problem: str, fix: str) -> None:
        """A problem that the caller may accept."""
        if check in self.accept:
            self.warn(f"Accepted: {problem}.")
        else:
            self.refuse(problem, f'{fix.rstrip(".")}, or add accept=["{check}"].')

    def warn(self, sentence: str) -> None:
        """What forbids nothing."""
        self.warnings.append(sentence)

    def raise_if_any(self) -> None:
        """Tell all problems.

        Raises:
            InvalidInputError: There is one.
        """
        if self.problems:
            raise self.error()

    def error(self) -> InvalidInputError:
        """What tells all problems; there is one."""
        if len(self.problems) == 1:
            problem, fix = self.problems[0]
            return InvalidInputError(f"{problem}.", next_step=fix)
        told = [f"{i}. {problem}. {fix}" for i, (problem, fix) in enumerate(self.problems, 1)]
        return InvalidInputError(
            f"{len(told)} things stand in the way of this run, and nothing was started:\n"
            + "\n".join(told)
            + "\n",
            next_step="Mend them all, then call again.",
        )

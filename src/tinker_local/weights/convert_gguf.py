"""`python -m tinker_local.weights.convert_gguf FILE DIR`: a GGUF file -> a Hugging Face folder.

A process of its own: de-quantizing takes 1.2 GB for a moment, and transformers draws bars.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tinker_local.weights.gguf_tokenizer import read_tokenizer
from tinker_local.weights.tokenizer_files import write_tokenizer


def convert(gguf_file: Path, folder: Path) -> None:
    """Write config, bf16 safetensors and tokenizer into an existing folder."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.bfloat16, local_files_only=True
    )
    model.save_pretrained(folder)
    write_tokenizer(folder, read_tokenizer(gguf_file))


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))

"""The process that writes one export, checks it by loading it, and only then puts it in place.

`python -m tinker_mcp.training.export_worker` reads an ExportJob as one line of JSON, and answers
with one: the fields of Exported, or `problem` and `next_step`. It ends when its input does.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tinker_mcp import garbage
from tinker_mcp.training.exports import Exported, ExportFormat, ExportJob

if TYPE_CHECKING:
    import torch

TOLERANCE = 0.15
"""Nats a token, in the mean. A checkpoint is scored by its backend, in bfloat16 as a rule, and its
export in float32: for SmolLM2-135M that is 0.05 apart, and 0.6 at a single unlikely token."""

_TEXT = (
    "The quick brown fox jumps over the lazy dog, and 12 * 7 = 84. What is the capital of France? "
    "The capital of France is Paris. def add(a, b):\n    return a + b\n\n"
    "Thank you for your letter of 3 May; we are sorry that the parcel came late."
)
_END_S = 3.0
_HEADS = ("lm_head", "unembed_tokens")  # what PEFT and Tinker call the unembedding


_workshops: list[Path] = []  # what a signal must clear away


class ExportError(Exception):
    """A problem, and what to do about it."""

    def __init__(self, problem: str, next_step: str) -> None:
        super().__init__(problem)
        self.next_step = next_step


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: _leave())
    replies, sys.stdout = sys.stdout, sys.stderr  # libraries print
    job = ExportJob(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with, args=(sys.stdin,), daemon=True).start()
    try:
        answer = asdict(run(job))
        del answer["backend"]
    except ExportError as error:
        answer = {"problem": str(error), "next_step": error.next_step}
    except Exception as error:  # whatever a library makes of a model it does not know
        answer = {
            "problem": f"The export failed: {type(error).__name__}: {error}"[:900],
            "next_step": "Nothing was written. Call check_setup, or try the other format.",
        }
    print(json.dumps(answer), file=replies, flush=True)


def run(job: ExportJob) -> Exported:
    """Do the job; nothing of it stays where it fails."""
    output = Path(job.output_dir)
    with _workshop(output) as workshop:
        base, base_model, expected = _reference(job)
        built, remark = _built(job, base, workshop)
        differences = _differences(_loaded(job.format, base, built), base, expected)
        mean = statistics.fmean(differences)
        if not mean <= TOLERANCE:
            raise ExportError(
                f"The export was built, but its logprobs differ from the checkpoint's by "
                f"{mean:.3g} nats in the mean, so it is not the same model. Nothing was written.",
                "Try the other format.",
            )
        files = sorted(file.name for file in built.iterdir())
        size_bytes = sum(file.stat().st_size for file in built.iterdir())
        _put(built, output)
    return Exported(str(output), files, size_bytes, base_model, max(differences), remark)


def _reference(job: ExportJob) -> tuple[str, str, list[float]]:
    """The base model's folder or hub name, its Tinker name, and the checkpoint's logprobs."""
    with garbage.while_importing():
        import tinker

    with tinker.ServiceClient(user_metadata={"client": "tinker-mcp export"}) as service:
        client = service.create_training_client_from_state(job.state).result()
        about = client.get_info().model_data
        base_model = str(about.model_name)
        tokenizer = str(about.tokenizer_id or "")
        # The local backend names a folder, with the weights beside the tokenizer.
        base = tokenizer if (Path(tokenizer) / "config.json").is_file() else base_model
        if job.sampler is None:
            sampler = client.save_weights_and_get_sampling_client().result()
        else:
            sampler = service.create_sampling_client(model_path=job.sampler).result()
        prompt = tinker.ModelInput.from_ints(_tokens(base))
        logprobs = sampler.compute_logprobs(prompt).result()
    return base, base_model, [one for one in logprobs[1:] if one is not None]


def _built(job: ExportJob, base: str, workshop: Path) -> tuple[Path, str]:
    """The folder that was built, and a remark on it."""
    with garbage.while_importing():
        from tinker_cookbook import weights

    adapter, built = workshop / "adapter", workshop / "built"
    weights.download(
        tinker_path=job.state,
        output_dir=str(adapter),
        base_url=os.environ["TINKER_BASE_URL"],
    )
    if job.format == "adapter":
        weights.build_lora_adapter(
            base_model=base, adapter_path=str(adapter), output_path=str(built)
        )
        return built, ""
    untied = _untied(base, workshop / "base") if _trains_head(adapter) else None
    weights.build_hf_model(
        base_model=str(untied or base), adapter_path=str(adapter), output_path=str(built)
    )
    remark = "Its lm_head was trained and is now apart from the embedding it shared weights with. "
    return built, remark if untied else ""


def _trains_head(adapter: Path) -> bool:
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", "pt") as tensors:
        return any(head in name for name in tensors.keys() for head in _HEADS)  # noqa: SIM118


def _untied(base: str, folder: Path) -> Path | None:
    """A copy of a model whose head shares the embedding's weights, with a head of its own.

    An adapter of the head cannot be merged into weights that the embedding reads as well. None
    for a model that has a head of its own already. The large files are links.
    """
    from huggingface_hub import snapshot_download
    from safetensors import safe_open
    from safetensors.torch import save_file

    source = Path(base) if Path(base).is_dir() else Path(snapshot_download(base))
    shard_of: dict[str, str] = {}
    for shard in sorted(source.glob("*.safetensors")):
        with safe_open(shard, "pt") as tensors:
            shard_of.update(dict.fromkeys(tensors.keys(), shard.name))
    if any(name.endswith("lm_head.weight") for name in shard_of):
        return None
    [embedding] = [name for name in shard_of if name.endswith("embed_tokens.weight")]
    folder.mkdir()
    index = "model.safetensors.index.json"
    for file in source.iterdir():
        if file.is_file() and file.name not in ("config.json", index):
            (folder / file.name).symlink_to(file.resolve())
    with safe_open(source / shard_of[embedding], "pt") as tensors:
        save_file({"lm_head.weight": tensors.get_tensor(embedding)}, folder / "head.safetensors")
    shard_of["lm_head.weight"] = "head.safetensors"
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    return folder


def _loaded(export_format: ExportFormat, base: str, built: Path) -> torch.nn.Module:
    """The model as whoever uses the export will load it."""
    with garbage.while_importing():
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    whole = str(built) if export_format == "merged" else base
    reads_images = hasattr(AutoConfig.from_pretrained(whole), "vision_config")
    kind: Any = AutoModelForImageTextToText if reads_images else AutoModelForCausalLM
    model: Any = kind.from_pretrained(whole, dtype=torch.float32)
    if export_format == "merged":
        return model  # type: ignore[no-any-return]  # transformers' factories are untyped
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(built))


def _differences(model: torch.nn.Module, base: str, expected: list[float]) -> list[float]:
    """How far each token's logprob is from what is expected, in nats; NaN where not finite."""
    import torch

    tokens = torch.tensor([_tokens(base)])  # (1, T)
    with torch.no_grad():
        logprobs = model(tokens).logits.float().log_softmax(-1)  # (1, T, V)
    found = logprobs[0, :-1].gather(-1, tokens[0, 1:, None])[:, 0]  # (T-1,)
    differences: list[float] = (found - torch.tensor(expected)).abs().tolist()
    return differences


def _tokens(base: str) -> list[int]:
    from transformers import AutoTokenizer

    tokens: list[int] = AutoTokenizer.from_pretrained(base).encode(_TEXT)
    return tokens


@contextlib.contextmanager
def _workshop(output: Path) -> Iterator[Path]:
    """A folder on the file system of `output`, which is gone afterwards."""
    beside = next(folder for folder in output.parents if folder.is_dir())
    _sweep(beside, output.name)
    workshop = Path(tempfile.mkdtemp(dir=beside, prefix=f".{output.name}-{os.getpid()}-"))
    _workshops.append(workshop)
    try:
        yield workshop
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def _sweep(beside: Path, name: str) -> None:
    """Remove what workers left that were killed: folders named after a process that is gone."""
    for left in beside.iterdir():
        found = re.fullmatch(rf"\.{re.escape(name)}-(\d+)-[a-z0-9_]{{8}}", left.name)
        if found and left.is_dir() and not left.is_symlink() and not _is_running(int(found[1])):
            shutil.rmtree(left, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _put(built: Path, output: Path) -> None:
    """Have the folder appear whole or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.exists():
        output.rmdir()  # empty; if something has been put there meanwhile, this fails
    built.rename(output)


def _end_with(stream: TextIO) -> None:
    stream.read()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_END_S)  # the main thread hears a signal only between two calls into a library
    _leave()


def _leave() -> None:
    """End at once: a library may catch an exception, or hold its own threads."""
    for workshop in _workshops:
        shutil.rmtree(workshop, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    main()

"""The plain loop: what a good user of `transformers` and `peft` writes, in a process of its own.

One padded batch a group, logits of every position, `generate()` for sampling; glibc's and torch's
own settings. Reads one JSON request a line from stdin, answers each with one line on stdout, and
takes the time itself, so the pipe costs it nothing.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM

from tests.benchmarks.machine import peak_memory_bytes
from tests.benchmarks.sides import LEARNING_RATE, RANK

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]

Request = dict[str, Any]


class PlainLoop:
    """A LoRA model, its optimizer, and the operations that are measured.

    `has_autocast` trains under torch.autocast in bfloat16, as Trainer(bf16=True) does, which is
    faster than peft's default: that keeps the adapters of a bfloat16 model in float32 and
    multiplies them so (`--plain-training default` measures it). `generate()` runs without it.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, *, has_autocast: bool) -> None:
        self._has_autocast = has_autocast
        base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        config = LoraConfig(
            r=RANK, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM", lora_dropout=0.0
        )
        self._model: PeftModel = get_peft_model(base, config)
        self._model.train()
        trained = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)

    def forward_backward(self, request: Request) -> Request:
        """Add the gradient of all groups; answer seconds and the mean logprob that counts."""
        losses = {"cross_entropy": _cross_entropy, "importance_sampling": _importance_sampling}
        loss_fn = losses[request["loss_fn"]]
        began = time.perf_counter()
        chosen = []
        for group in request["groups"]:
            batch = _padded(group)
            mask = batch.pop("attention_mask")
            with torch.autocast("cpu", torch.bfloat16, enabled=self._has_autocast):
                logits = self._model(input_ids=batch["tokens"], attention_mask=mask).logits
            logprobs = -functional.cross_entropy(
                logits.float().flatten(0, 1), batch["targets"].flatten(), reduction="none"
            ).view_as(mask)  # (B, T)
            loss_fn(logprobs, batch).backward()  # type: ignore[no-untyped-call]
            chosen.append(logprobs.detach()[batch["counts"]])
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "mean_logprob": float(torch.cat(chosen).mean())}

    def optim_step(self, request: Request) -> Request:
        self._optimizer.step()
        self._optimizer.zero_grad()
        return {}

    def sample(self, request: Request) -> Request:
        """Draw sequences of exactly `new_tokens` tokens from one prompt; answer seconds."""
        prompt = torch.tensor([request["prompt"]])
        self._model.eval()
        began = time.perf_counter()
        model: Any = self._model  # generate has no annotation
        drawn = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=request["num_samples"],
            min_new_tokens=request["new_tokens"],
            max_new_tokens=request["new_tokens"],
            pad_token_id=0,
        )
        seconds = time.perf_counter() - began
        self._model.train()
        return {"seconds": seconds, "tokens": drawn[:, prompt.shape[1] :].numel()}

    def peak_memory(self, request: Request) -> Request:
        return {"bytes": peak_memory_bytes(os.getpid())}


def _padded(group: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack examples to (B, T), padded on the right with zeros."""
    longest = max(len(example["tokens"]) for example in group)

    def stack(rows: list[list[Any]], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=dtype)

    names = group[0]["inputs"]
    return {
        "attention_mask": stack([[1] * len(e["tokens"]) for e in group], torch.int64),
        "tokens": stack([e["tokens"] for e in group], torch.int64),
        "targets": stack([e["targets"] for e in group], torch.int64),
        "counts": stack([e["counts"] for e in group], torch.bool),
        **{name: stack([e["inputs"][name] for e in group], torch.float32) for name in names},
    }


def _cross_entropy(logprobs: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return -(batch["weights"] * logprobs).sum()


def _importance_sampling(logprobs: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    ratio = torch.exp(logprobs - batch["logprobs"])
    return -(ratio * batch["advantages"]).sum()


def main() -> None:
    """Serve requests until stdin ends; argv: model folder, number format, how to train."""
    folder, dtype, training = sys.argv[1:]
    # peft remarks that lm_head shares its weight with the embedding: so does ours.
    warnings.filterwarnings("ignore", module="peft")
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no reply
    loop = PlainLoop(Path(folder), getattr(torch, dtype), has_autocast=training == "autocast")
    operations: dict[str, Callable[[Request], Request]] = {
        "forward_backward": loop.forward_backward,
        "optim_step": loop.optim_step,
        "sample": loop.sample,
        "peak_memory": loop.peak_memory,
    }
    for line in sys.stdin:
        request = json.loads(line)
        replies.write(json.dumps(operations[request["do"]](request)) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()

"""Our side: the real tinker SDK against a fresh `tinker-local serve`, HTTP included."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tinker
from tinker import types

from tests.benchmarks.machine import peak_memory_bytes
from tests.benchmarks.sides import LEARNING_RATE, RANK, Setup, Trained
from tests.benchmarks.workloads import Batch, Example
from tests.servers import start_server

BOUND_S = 900.0
ADAM = types.AdamParams(learning_rate=LEARNING_RATE)


class Ours:
    """A server, one training client, and a sampling client on the adapter as it was last asked.

    Attributes:
        training_client: For what the other side has no counterpart of.
    """

    def __init__(self, setup: Setup) -> None:
        with contextlib.ExitStack() as opened:
            prefix = "tinker-local-benchmark-"
            room = opened.enter_context(tempfile.TemporaryDirectory(prefix=prefix))
            self._server = start_server(
                Path(room) / "state",
                *("--dtype", setup.dtype),
                model=setup.model_name,
                threads=setup.threads,
            )
            opened.callback(self._server.stop)
            self._service = opened.enter_context(
                tinker.ServiceClient(base_url=self._server.base_url, api_key=self._server.api_key)
            )
            self.training_client = self._service.create_lora_training_client(
                setup.model_name, rank=RANK, seed=0
            ).result(BOUND_S)
            self._opened = opened.pop_all()
        self._sampler: tinker.SamplingClient | None = None

    def forward_backward(self, batch: Batch) -> Trained:
        data = [datum(example) for example in batch.examples]
        began = time.perf_counter()
        output = self.training_client.forward_backward(data, batch.loss_fn).result(BOUND_S)
        seconds = time.perf_counter() - began
        chosen = [
            np.array(scores["logprobs"].data)[example.counts]
            for scores, example in zip(output.loss_fn_outputs, batch.examples, strict=True)
        ]
        return Trained(seconds, float(np.concatenate(chosen).mean()))

    def optim_step(self) -> None:
        self.training_client.optim_step(ADAM).result(BOUND_S)
        self._sampler = None

    def sample(self, prompt: Sequence[int], num_samples: int, new_tokens: int) -> float:
        sampler = self.sampler()
        began = time.perf_counter()
        draw(sampler, prompt, num_samples, new_tokens)
        return time.perf_counter() - began

    def sampler(self) -> tinker.SamplingClient:
        """A client on the adapter as it is since the last step."""
        if self._sampler is None:
            saved = self.training_client.save_weights_and_get_sampling_client()
            self._sampler = saved.result(BOUND_S)
        return self._sampler

    def samplers(self, count: int) -> list[tinker.SamplingClient]:
        """So many clients on one named checkpoint."""
        path = self.training_client.save_weights_for_sampler("clients").result(BOUND_S).path
        futures = [self._service.create_sampling_client(model_path=path) for _ in range(count)]
        return [future.result(BOUND_S) for future in futures]

    def peak_memory_bytes(self) -> int | None:
        return peak_memory_bytes(self._server.pid)

    def close(self) -> None:
        self._opened.close()


def draw(
    sampler: tinker.SamplingClient, prompt: Sequence[int], num_samples: int, new_tokens: int
) -> int:
    """Draw sequences that nothing stops; return how many tokens came."""
    params = types.SamplingParams(max_tokens=new_tokens, stop=[])
    model_input = types.ModelInput.from_ints(list(prompt))
    drawn = sampler.sample(model_input, num_samples, params).result(BOUND_S)
    tokens = sum(len(sequence.tokens) for sequence in drawn.sequences)
    assert tokens == num_samples * new_tokens
    return tokens


def datum(example: Example) -> types.Datum:
    """The SDK's form of an example."""
    inputs = {
        name: types.TensorData.from_numpy(np.array(values, dtype=np.float32))
        for name, values in example.inputs.items()
    }
    targets = types.TensorData.from_numpy(np.array(example.targets, dtype=np.int64))
    return types.Datum(
        model_input=types.ModelInput.from_ints(list(example.tokens)),
        loss_fn_inputs={"target_tokens": targets, **inputs},
    )

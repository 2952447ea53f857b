"""The server does without torch's compiler, which is there for whoever wants it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from servers import start_server

BOUND_S = 60.0

STAND_IN = """
from tinker_local import compiler_later
compiler_later.stand_in()
"""

TRAIN_AND_SAMPLE = """
import collections, pathlib, sys
import numpy as np
from tinker_local.engine import TorchEngine
from tinker_local.ops import *

engine = TorchEngine({"tiny": pathlib.Path(sys.argv[1])}, "float32")
engine.create_model("a", "tiny", LoraSpec(rank=2))
tokens = np.arange(40, 60)
datum = TrainingDatum(tokens[:-1], {"target_tokens": tokens[1:], "weights": np.ones(19)})
collections.deque(engine.forward_backward(ForwardBackward("a", [datum], "cross_entropy")), 0)
assert engine.optim_step("a", AdamParams())["grad_norm"] > 0
engine.start_sample("b", Sample(BaseWeights("tiny"), tokens, max_tokens=1))
while not engine.continue_samples():
    pass
assert "torch._dynamo.config" not in sys.modules
"""

COMPILE = """
import sys
import tinker_local.engine
import torch

doubled = torch.compile(lambda x: 2 * x, backend="eager", fullgraph=True)
assert doubled(torch.ones(2)).tolist() == [2.0, 2.0]
assert "torch._dynamo.config" in sys.modules
"""

IMPORT_A_SUBMODULE = """
import tinker_local.engine
import torch._dynamo.config

assert torch._dynamo.config.recompile_limit > 0
assert not torch._dynamo.is_compiling()
"""

MASK_BY_VMAP = """
import sys
import tinker_local.engine
import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask

mask = sdpa_mask(
    batch_size=1,
    q_length=3,
    kv_length=3,
    mask_function=causal_mask_function,
    allow_is_causal_skip=False,
    use_vmap=True,
    device="cpu",
)
assert torch.equal(mask[0, 0], torch.ones(3, 3).tril().bool())
assert "torch._dynamo.config" in sys.modules
"""


@pytest.mark.parametrize("program", [TRAIN_AND_SAMPLE, COMPILE, IMPORT_A_SUBMODULE, MASK_BY_VMAP])
def test_the_compiler_is_loaded_for_whoever_wants_it_and_nobody_else(
    program: str, tiny_folder: Path
) -> None:
    command = [sys.executable, "-c", STAND_IN + program, str(tiny_folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BOUND_S, check=False)
    assert done.returncode == 0, done.stderr


def test_a_server_starts_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # each import is a line on stderr
    server = start_server(tmp_path / "state")
    server.stop()
    imported = {line.rpartition("|")[2].strip() for line in server.log.read_text().splitlines()}
    assert "tinker_local.engine.torch_engine" in imported
    assert "transformers.masking_utils" in imported
    assert not {"torch._dynamo", "torch._dynamo.config", "sympy"} & imported

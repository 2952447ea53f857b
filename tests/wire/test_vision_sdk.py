"""Images through the real SDK: training, sampling and scores on the vision model."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import tinker
from PIL import Image
from tinker import types

from servers import LocalServer, start_server
from tinker_mcp.training import export_worker
from tinker_mcp.training.exports import ExportFormat, ExportJob

VISION = "tinker-local/tiny-vl"
BOUND_S = 60.0
START, END = 259, 260  # <|vision_start|>, <|vision_end|>
TOKENS = 6  # of 96 x 64 pixels


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    server = start_server(tmp_path_factory.mktemp("vision") / "state", model=VISION)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def service(server: LocalServer) -> Iterator[tinker.ServiceClient]:
    with tinker.ServiceClient(base_url=server.base_url, api_key=server.api_key) as client:
        yield client


@pytest.fixture(scope="module")
def training(service: tinker.ServiceClient) -> tinker.TrainingClient:
    return service.create_lora_training_client(VISION, rank=32, seed=0).result(BOUND_S)


def image(colour: str, expected_tokens: int | None = TOKENS) -> types.ImageChunk:
    buffer = io.BytesIO()
    Image.new("RGB", (96, 64), colour).save(buffer, "JPEG")
    return types.ImageChunk(data=buffer.getvalue(), format="jpeg", expected_tokens=expected_tokens)


def model_input(picture: types.ModelInputChunk, text: str) -> types.ModelInput:
    return types.ModelInput(
        chunks=[
            types.EncodedTextChunk(tokens=[START]),
            picture,
            types.EncodedTextChunk(tokens=[END, *text.encode()]),
        ]
    )


def datum(colour: str, expected_tokens: int | None = TOKENS) -> types.Datum:
    """A picture, and the name of its colour as what is trained."""
    answer = list(colour.encode())
    before = TOKENS + 1
    return types.Datum(
        model_input=model_input(image(colour, expected_tokens), colour[:-1]),
        loss_fn_inputs={
            "target_tokens": types.TensorData(data=[0] * before + answer, dtype="int64"),
            "weights": types.TensorData(data=[0.0] * before + [1.0] * len(answer), dtype="float32"),
        },
    )


def test_a_client_learns_to_name_two_colours(
    service: tinker.ServiceClient, training: tinker.TrainingClient
) -> None:
    batch = [datum("red"), datum("blue")]
    steps = [
        (
            training.forward_backward(batch, "cross_entropy"),
            training.optim_step(types.AdamParams(learning_rate=5e-3)),
        )
        for _ in range(30)
    ]
    losses = [output.result(BOUND_S).metrics["loss:sum"] for output, _ in steps]
    path = training.save_weights_for_sampler("colours").result(BOUND_S).path
    sampler = service.create_sampling_client(model_path=path).result(BOUND_S)

    said = [
        sampler.sample(
            model_input(image(colour), ""),
            1,
            types.SamplingParams(max_tokens=len(colour), temperature=0, stop=[]),
        ).result(BOUND_S)
        for colour in ("red", "blue")
    ]

    assert losses[-1] < losses[0] / 10
    assert [bytes(one.sequences[0].tokens) for one in said] == [b"red", b"blue"]


def test_a_prompts_scores_are_those_of_forward(
    service: tinker.ServiceClient, training: tinker.TrainingClient
) -> None:
    base = service.create_sampling_client(base_model=VISION).result(BOUND_S)
    fresh = service.create_lora_training_client(VISION, rank=4, seed=0).result(BOUND_S)

    scores = base.compute_logprobs(model_input(image("red"), "red")).result(BOUND_S)
    [output] = fresh.forward([datum("red")], "cross_entropy").result(BOUND_S).loss_fn_outputs

    assert scores[: TOKENS + 1] == [None] * (TOKENS + 1)  # the first token, and the image's
    expected = output["logprobs"].tolist()[-3:]
    assert scores[-3:] == pytest.approx(expected, abs=1e-4)


def test_the_number_of_tokens_may_be_left_to_the_server(
    training: tinker.TrainingClient,
) -> None:
    outputs = training.forward([datum("red"), datum("red", None)], "cross_entropy").result(BOUND_S)

    told, untold = (one["logprobs"].tolist() for one in outputs.loss_fn_outputs)
    assert told == untold


def test_another_number_of_tokens_is_the_users_error(training: tinker.TrainingClient) -> None:
    with pytest.raises(tinker.RequestFailedError, match=r"expected_tokens 7, .* makes 6"):
        training.forward([datum("red", 7)], "cross_entropy").result(BOUND_S)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the cookbook calls what 0.38 deprecates
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("export_format", ["adapter", "merged"])
def test_an_export_computes_what_the_checkpoint_does(
    server: LocalServer,
    training: tinker.TrainingClient,
    export_format: ExportFormat,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = training.save_state(export_format).result(BOUND_S).path
    for name in ("TINKER_BASE_URL", "TINKER_API_KEY"):
        monkeypatch.setenv(name, server.env[name])

    exported = export_worker.run(ExportJob(state, None, str(tmp_path / "out"), export_format))

    assert exported.base_model == VISION
    assert exported.max_difference < 1e-4


def test_an_image_elsewhere_is_not_fetched(service: tinker.ServiceClient) -> None:
    base = service.create_sampling_client(base_model=VISION).result(BOUND_S)
    pointer = types.ImageAssetPointerChunk(
        format="png", location="https://127.0.0.1/cat.png", expected_tokens=6
    )

    with pytest.raises(tinker.RequestFailedError, match=r"cat\.png'; tinker-local fetches none"):
        base.compute_logprobs(model_input(pointer, "?")).result(BOUND_S)

"""The vision model against transformers' own, against PEFT, and against its own sampler."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image as Pictures

from tinker_local.errors import LocalError, ModelFolderError
from tinker_local.ops import (
    AdamParams,
    BaseWeights,
    ForwardBackward,
    Image,
    LoraSpec,
    Sample,
    SavedWeights,
    TrainingDatum,
)
from tinker_local.weights import TINY_VL_MODEL, hf_home, quiet_progress, resolve_model
from tiny_data import END, run_slices, sample

if TYPE_CHECKING:
    from tinker_local.engine import TorchEngine

IMAGE_PAD = 261
BEFORE, BETWEEN, AFTER = [*b"Compare ", 259], [260, *b" with ", 259], [260, *b": both are red."]
N = len(BEFORE) + 6 + len(BETWEEN) + 1 + len(AFTER)  # 96 x 64 pixels are 6 tokens, 32 x 32 are one


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vision-cache")


@pytest.fixture(scope="module")
def folder(cache: Path) -> Path:
    return resolve_model(TINY_VL_MODEL, cache, progress=quiet_progress).folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> TorchEngine:
    from tinker_local.engine import TorchEngine

    return TorchEngine({TINY_VL_MODEL: folder}, "float32")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    """The model as transformers loads it."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True)


@pytest.fixture
def trained(engine: TorchEngine) -> str:
    """A training client after a step, so that neither factor of its adapter is zero."""
    engine.create_model("trained", TINY_VL_MODEL, LoraSpec(rank=4, seed=0))
    run_slices(engine.forward_backward(cross_entropy("trained")))
    engine.optim_step("trained", AdamParams(learning_rate=1e-2))
    return "trained"


def picture(colour: str, width: int, height: int) -> Pictures.Image:
    image = Pictures.new("RGB", (width, height), colour)
    image.paste("white", (0, 0, width // 2, height // 3))
    return image


def encoded(image: Pictures.Image, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


LARGE, SMALL = encoded(picture("red", 96, 64)), encoded(picture("blue", 32, 32))


def two_images() -> tuple[np.ndarray, list[Image]]:
    """Text of a prompt and a reply, with an image of 6 tokens and one of 1 in the prompt."""
    text = np.array([*BEFORE, *BETWEEN, *AFTER], dtype=np.int64)
    places = [len(BEFORE), len(BEFORE) + len(BETWEEN)]
    return text, [Image(places[0], LARGE, "png", 6), Image(places[1], SMALL, "png")]


def cross_entropy(model_id: str, *, forward_only: bool = False) -> ForwardBackward:
    """Every text token after the images trained with the weight 1."""
    text, images = two_images()
    targets = full_row()[1:]
    weights = np.zeros(N - 1, np.float32)
    weights[-len(AFTER) :] = 1.0
    datum = TrainingDatum(text[:-1], {"target_tokens": targets, "weights": weights}, images)
    return ForwardBackward(model_id, [datum], "cross_entropy", forward_only=forward_only)


def full_row() -> np.ndarray:
    pads = [IMAGE_PAD] * 6, [IMAGE_PAD]
    return np.array([*BEFORE, *pads[0], *BETWEEN, *pads[1], *AFTER], dtype=np.int64)


def plain_logprobs(model: Any, folder: Path) -> Any:
    """Log-probabilities of `full_row`'s tokens but the first, by transformers' whole forward."""
    import torch
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    processor: Any = AutoImageProcessor
    images = [picture("red", 96, 64), picture("blue", 32, 32)]
    seen = processor.from_pretrained(folder)(images=images, return_tensors="pt")
    row = torch.from_numpy(full_row()).unsqueeze(0)
    logits = model(
        input_ids=row,
        pixel_values=seen["pixel_values"],
        image_grid_thw=seen["image_grid_thw"],
        mm_token_type_ids=(row == IMAGE_PAD).int(),
    ).logits
    return logits[0, :-1].log_softmax(-1).gather(1, row[0, 1:, None]).squeeze(1)


def test_it_is_made_the_same_each_time(folder: Path, tmp_path: Path) -> None:
    other = resolve_model(TINY_VL_MODEL, tmp_path, progress=quiet_progress).folder

    assert {file.name: file.read_bytes() for file in other.iterdir()} == {
        file.name: file.read_bytes() for file in folder.iterdir()
    }


def test_transformers_loads_every_parameter(folder: Path) -> None:
    from transformers import AutoModelForImageTextToText

    loaded: Any = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)

    assert not any(loaded[1].values())


def test_its_name_leads_to_the_image_processor(cache: Path, folder: Path) -> None:
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    load: Any = AutoImageProcessor.from_pretrained
    found = load(TINY_VL_MODEL, cache_dir=hf_home(cache) / "hub", local_files_only=True)

    assert found.get_number_of_image_patches(64, 96, images_kwargs={}) // found.merge_size**2 == 6


def test_its_chat_template_is_what_the_renderer_writes(folder: Path) -> None:
    from tinker_cookbook.renderers import get_renderer
    from transformers import AutoTokenizer
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    processor: Any = AutoImageProcessor
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    renderer = get_renderer(
        "qwen3_vl_instruct", tokenizer, image_processor=processor.from_pretrained(folder)
    )
    content = [{"type": "image", "image": picture("red", 32, 32)}, {"type": "text", "text": "?"}]
    messages: list[Any] = [
        {"role": "system", "content": "Look."},
        {"role": "user", "content": content},
    ]

    rendered = renderer.build_generation_prompt(messages)

    tokens = [
        token
        for chunk in rendered.chunks
        for token in getattr(chunk, "tokens", [IMAGE_PAD] * chunk.length)
    ]
    template = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(tokens) == template


def test_a_folder_without_its_image_processor_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.name != "preprocessor_config.json":
            (tmp_path / file.name).symlink_to(file)

    with pytest.raises(ModelFolderError, match=r"preprocessor_config\.json is missing"):
        resolve_model(str(tmp_path), tmp_path / "cache", progress=quiet_progress)


def test_the_forward_pass_is_that_of_transformers(
    engine: TorchEngine, plain: Any, folder: Path
) -> None:
    engine.create_model("fresh", TINY_VL_MODEL, LoraSpec(rank=4, seed=0))

    output = run_slices(engine.forward_backward(cross_entropy("fresh", forward_only=True)))

    expected = plain_logprobs(plain, folder).detach().numpy()
    np.testing.assert_allclose(output.logprobs[0], expected, atol=1e-5)


def test_the_images_change_what_follows_and_nothing_before(engine: TorchEngine) -> None:
    engine.create_model("looking", TINY_VL_MODEL, LoraSpec(rank=4, seed=0))
    op = cross_entropy("looking", forward_only=True)
    text, images = two_images()
    other = [images[0], Image(images[1].at, encoded(picture("lime", 32, 32)), "png")]
    changed = TrainingDatum(text[:-1], op.data[0].loss_fn_inputs, other)

    output = run_slices(
        engine.forward_backward(
            ForwardBackward("looking", [op.data[0], changed], "cross_entropy", forward_only=True)
        )
    )

    first, second = output.logprobs
    place = N - len(AFTER) - 1  # of the second image; its own token predicts the next
    assert np.array_equal(first[:place], second[:place])
    assert not np.isclose(first[place:], second[place:]).any()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_gradients_are_those_of_peft_on_the_exported_adapter(
    engine: TorchEngine, plain: Any, folder: Path, trained: str, tmp_path: Path
) -> None:
    from peft import PeftModel
    from tinker_cookbook.weights import build_lora_adapter

    saved, built = tmp_path / "saved", tmp_path / "built"
    saved.mkdir()
    engine.save_state(trained, saved)
    build_lora_adapter(base_model=str(folder), adapter_path=str(saved), output_path=str(built))
    model: Any = PeftModel.from_pretrained(plain, str(built), is_trainable=True)

    output = run_slices(engine.forward_backward(cross_entropy(trained)))
    logprobs = plain_logprobs(model, folder)
    (-logprobs[-len(AFTER) :].sum()).backward()

    np.testing.assert_allclose(output.logprobs[0], logprobs.detach().numpy(), atol=1e-4)
    ours = {
        f"base_model.model.{path}.{side}": getattr(factors, side[-1].lower()).grad
        for path, factors in engine._trained[trained].adapter.factors.items()
        for side in ("lora_A", "lora_B")
    }
    theirs = {
        name.removesuffix(".default.weight"): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    model.unload()
    assert ours.keys() == theirs.keys()
    assert len(ours) == 2 * (2 * 7 + 1)  # of two layers and the head
    for name, gradient in ours.items():
        np.testing.assert_allclose(gradient, theirs[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_the_samplers_logprobs_are_those_of_the_training_forward(
    engine: TorchEngine, trained: str, tmp_path: Path
) -> None:
    engine.save_sampler(trained, tmp_path)
    text, images = two_images()
    op = Sample(
        SavedWeights(TINY_VL_MODEL, tmp_path),
        text,
        num_samples=3,
        max_tokens=12,
        stop_tokens=[END, *range(100, 115)],  # some of the three end before the others
        seed=4,
        images=images,
        prompt_logprobs=True,
    )

    output = sample(engine, op)

    lengths = [len(sequence.tokens) for sequence in output.sequences]
    assert len(set(lengths)) > 1
    assert output.prompt_tokens == N
    for sequence in output.sequences:
        row = np.concatenate([full_row(), sequence.tokens])
        whole = np.concatenate([text, sequence.tokens[:-1]])
        datum = TrainingDatum(whole, {"target_tokens": row[1:]}, images)
        forward = ForwardBackward(trained, [datum], "cross_entropy", forward_only=True)
        [logprobs] = run_slices(engine.forward_backward(forward)).logprobs
        np.testing.assert_allclose(sequence.logprobs, logprobs[N - 1 :], atol=1e-4)
        assert output.prompt_logprobs is not None
        is_text = full_row() != IMAGE_PAD
        is_text[0] = False
        np.testing.assert_allclose(
            output.prompt_logprobs[is_text], logprobs[: N - 1][is_text[1:]], atol=1e-4
        )
        assert np.isnan(output.prompt_logprobs[~is_text]).all()


def test_a_prompt_of_text_alone_is_read_too(engine: TorchEngine) -> None:
    prompt = np.array([*b"no image, and <|image_pad|> as text: ", IMAGE_PAD], dtype=np.int64)
    op = Sample(BaseWeights(TINY_VL_MODEL), prompt, max_tokens=5, temperature=0, stop_tokens=[])

    output = sample(engine, op)

    assert len(output.sequences[0].tokens) == 5
    assert output.prompt_tokens == len(prompt)


def test_a_stopped_request_leaves_the_others_alone(engine: TorchEngine) -> None:
    text, images = two_images()
    op = Sample(BaseWeights(TINY_VL_MODEL), text, max_tokens=4, stop_tokens=[], images=images)
    engine.start_sample("unwanted", op)
    engine.continue_samples()

    engine.stop_sample("unwanted")

    assert len(sample(engine, op, "wanted").sequences[0].tokens) == 4


def _with(image: Image, *more: Image) -> TrainingDatum:
    targets = np.zeros(40, np.int64)
    return TrainingDatum(np.array([*b"Look: ."]), {"target_tokens": targets}, [image, *more])


def _huge() -> bytes:
    """A PNG of 9,000 x 9,000 pixels in a few kilobytes."""
    return encoded(Pictures.new("1", (9000, 9000)))


REFUSED: dict[str, tuple[Callable[[], TrainingDatum], str]] = {
    "another number of tokens": (
        lambda: _with(Image(6, LARGE, "png", 5)),
        r"data\[0\], image 1 \(96 x 64 pixels\) has expected_tokens 5, but .* makes 6 tokens",
    ),
    "no image": (lambda: _with(Image(6, b"GIF89a", "png")), "cannot be read as PNG or JPEG"),
    "half an image": (lambda: _with(Image(6, LARGE[:150], "png")), r"image 1 cannot be read as"),
    "another format": (
        lambda: _with(Image(6, encoded(picture("red", 32, 32), "jpeg"), "png")),
        "sent as 'png', but its data is a JPEG",
    ),
    "too many pixels": (lambda: _with(Image(6, _huge(), "png")), "9000 x 9000 pixels"),
    "a line of pixels": (
        lambda: _with(Image(6, encoded(Pictures.new("RGB", (900, 2))), "png")),
        "900 x 2 pixels\\) cannot be scaled",
    ),
    "two without a token between": (
        lambda: _with(Image(6, SMALL, "png"), Image(6, SMALL, "png")),
        "image 2 follows the image before it",
    ),
    "targets of the text alone": (
        lambda: _with(Image(6, SMALL, "png")),
        r"target_tokens'\] has shape \[40\], but model_input has 8 positions",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_with_its_place(engine: TorchEngine, case: str) -> None:
    make, told = REFUSED[case]
    engine.create_model("refusing", TINY_VL_MODEL, LoraSpec(rank=4, seed=0))

    with pytest.raises(LocalError, match=told):
        engine.forward_backward(ForwardBackward("refusing", [make()], "cross_entropy"))


def test_the_loss_of_one_example_falls(engine: TorchEngine) -> None:
    engine.create_model("learning", TINY_VL_MODEL, LoraSpec(rank=4, seed=0))
    losses = []
    for _ in range(8):
        output = run_slices(engine.forward_backward(cross_entropy("learning")))
        engine.optim_step("learning", AdamParams(learning_rate=1e-2))
        losses.append(output.metrics["loss:sum"])

    assert all(map(math.isfinite, losses))
    assert losses[-1] < 0.7 * losses[0]

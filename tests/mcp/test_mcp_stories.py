"""Whole tasks through the tools, on the tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from agents import CONVERSATIONS, TINY, Agent, in_memory

from tinker_mcp.settings import Settings

GOOD = json.dumps(CONVERSATIONS[0])


async def test_the_whole_slice_makes_the_held_out_loss_fall(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        await whole_slice(agent)


async def whole_slice(agent: Agent) -> None:
    """Set up, build, measure, train, measure, sample, save, sample what was saved, go on."""
    assert (await agent.call("check_setup"))["problems"] == []
    models = await agent.call("list_models")
    assert [model["name"] for model in models["models"]] == [TINY]
    data = await agent.new_data(eval_share=0.25)
    assert (data["datums"], data["eval_datums"]) == (6, 2)
    client_id = await agent.new_client()
    loss_before = await agent.loss(client_id, data["eval_data_id"])
    text_before = await agent.text(client_id=client_id)
    trained = await agent.train(client_id, data["data_id"], steps=12)
    assert (trained["finished"], trained["steps_done"], trained["client_step"]) == (True, 12, 12)
    assert trained["last_loss"] < trained["first_loss"]
    assert await agent.loss(client_id, data["eval_data_id"]) < loss_before
    text_after = await agent.text(client_id=client_id)
    assert text_after != text_before
    saved = await agent.call("save_checkpoint", client_id=client_id, name="end")
    assert await agent.text(checkpoint=saved["sampler"]) == text_after
    listed = await agent.call("list_checkpoints")
    paths = [item["checkpoint"] for item in listed["checkpoints"]]
    assert {saved["state"], saved["sampler"]} <= set(paths)
    resumed = await agent.call("create_training_client", checkpoint=saved["state"])
    assert await agent.text(client_id=resumed["client_id"]) == text_after


async def test_a_sample_says_whose_weights_and_which_step(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        data_id = (await agent.new_data())["data_id"]
        client_id = await agent.new_client()
        asked: dict[str, Any] = {"prompt": "Say", "max_tokens": 2}
        said = [(await agent.call("sample", client_id=client_id, **asked))["weights"]]
        await agent.train(client_id, data_id, steps=3)
        said.append((await agent.call("sample", client_id=client_id, **asked))["weights"])
        said.append((await agent.call("sample", base_model=TINY, **asked))["weights"])
    assert said == [f"{client_id} at step 0", f"{client_id} at step 3", f"{TINY}, untrained"]


async def test_messages_are_rendered_and_answers_parsed(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        reply = await agent.call(
            "sample",
            base_model=TINY,
            messages=[{"role": "user", "content": "Hi"}],
            max_tokens=4,
            num_samples=2,
            seed=1,
        )
    assert reply["renderer"] == "qwen3_instruct"
    assert reply["prompt_tokens"] > len("Hi")
    assert len(reply["samples"]) == 2
    assert all(sample["mean_logprob"] < 0 for sample in reply["samples"])


async def test_forward_only_changes_nothing(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        data_id = (await agent.new_data())["data_id"]
        client_id = await agent.new_client()
        losses = [await agent.loss(client_id, data_id) for _ in range(2)]
        said = await agent.error("optim_step", client_id=client_id, learning_rate=1e-2)
        losses.append(await agent.loss(client_id, data_id))
    assert losses[0] == losses[1] == losses[2]
    assert "optim_step has no gradient to apply" in said


async def test_optim_in_the_call_equals_optim_step_after_it(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        data_id = (await agent.new_data())["data_id"]
        together, apart = await agent.new_client(), await agent.new_client()
        adam = {"learning_rate": 1e-2}
        both = await agent.call("forward_backward", client_id=together, data_id=data_id, optim=adam)
        await agent.call("forward_backward", client_id=apart, data_id=data_id)
        stepped = await agent.call("optim_step", client_id=apart, **adam)
        losses = [await agent.loss(client_id, data_id) for client_id in (together, apart)]
    assert losses[0] == losses[1] != both["loss"]
    assert both["grad_norm"] == stepped["grad_norm"]
    assert both["step"] == stepped["step"] == 1


async def test_offset_and_limit_choose_a_portion(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        data_id = (await agent.new_data())["data_id"]
        client_id = await agent.new_client()
        on: dict[str, Any] = {"client_id": client_id, "data_id": data_id, "forward_only": True}
        whole = await agent.call("forward_backward", **on)
        parts = [
            await agent.call("forward_backward", offset=offset, limit=4, **on) for offset in (0, 4)
        ]
        said = await agent.error("forward_backward", offset=8, **on)
    assert sum(part["loss_sum"] for part in parts) == pytest.approx(whole["loss_sum"], rel=1e-5)
    assert "offset 8 and limit None leave none of the 8 datums" in said


async def test_what_is_not_finite_is_told_in_valid_json(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        data_id = (await agent.new_data())["data_id"]
        client_id = await agent.new_client()
        on: dict[str, Any] = {"client_id": client_id, "data_id": data_id}
        reckless = {"learning_rate": 10, "weight_decay": 1e30}  # a step is a factor of -1e31
        await agent.call("forward_backward", **on, optim=reckless)
        scored = await agent.call("forward_backward", **on, forward_only=True)
        said = await agent.error("train", **on, steps=2, batch_size=2, learning_rate=10)
        unusable = await agent.error("sample", client_id=client_id, prompt="Hi")
    assert "these weights have diverged" in unusable
    assert "diverged" in scored["next_step"]
    assert (scored["is_finite"], scored["loss"], scored["loss_sum"]) == (False, None, None)
    assert "the weights have diverged" in said
    assert "Lower the learning rate" in said
    for text in agent.texts[:-2]:
        json.loads(text, parse_constant=_refuse_constant)


async def test_conversations_longer_than_the_context_are_cut_to_it(settings: Settings) -> None:
    long = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a" * 5000}]
    async with in_memory(settings) as agent:
        built = await agent.new_data(conversations=[long], max_length=99_999)
    assert (built["truncated"], built["tokens"]["longest"]) == (1, 4096)


async def test_tool_calls_as_openai_writes_them_are_trained(settings: Settings) -> None:
    function = {"name": "look_up", "arguments": '{"what": "weather"}'}
    talk = [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": function}],
        },
        {"role": "tool", "content": "Rain", "tool_call_id": "1"},
        {"role": "assistant", "content": "It rains."},
    ]
    async with in_memory(settings) as agent:
        built = await agent.new_data(conversations=[talk])
    assert "look_up" in built["example"].split("⟦")[1]


def _refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


async def test_bad_rows_are_refused_with_their_lines_or_left_out(
    settings: Settings, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    swapped = {"messages": CONVERSATIONS[0]["messages"][::-1]}
    empty = {"messages": [CONVERSATIONS[0]["messages"][0], {"role": "assistant", "content": ""}]}
    path.write_text("\n".join([GOOD, "{", json.dumps(swapped), json.dumps(empty), GOOD, GOOD]))
    async with in_memory(settings) as agent:
        said = await agent.error("build_datums", base_model=TINY, path=str(path))
        data = await agent.call(
            "build_datums", base_model=TINY, path=str(path), skip_invalid=True, eval_share=0.34
        )
    assert [f"- line {number}: " in said for number in range(1, 7)] == [
        *(False, True, True, True),
        *(False, False),
    ]
    assert "3 of 6 conversations cannot be used" in said
    assert (data["datums"], data["eval_datums"], data["left_out_count"]) == (2, 1, 3)
    assert data["data_id"] == "data-1"  # the refused call left no handle


async def test_rows_refused_while_rendering_leave_no_handle(settings: Settings) -> None:
    long = [CONVERSATIONS[0], CONVERSATIONS[1]]
    async with in_memory(settings) as agent:
        asked = {"base_model": TINY, "conversations": long, "max_length": 10, "eval_share": 0.5}
        said = await agent.error("build_datums", **asked)
        data = await agent.new_data()
    assert "2 of 2 conversations cannot be used" in said
    assert data["data_id"] == "data-1"


async def test_unknown_handles_and_models_name_what_there_is(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        data_id = (await agent.new_data())["data_id"]
        client_id = await agent.new_client()
        errors = {
            "client": await agent.error("optim_step", client_id="client-9", learning_rate=1),
            "sampled client": await agent.error("sample", client_id="client-9", prompt="Hi"),
            "data": await agent.error("forward_backward", client_id=client_id, data_id="data-9"),
            "model": await agent.error("create_training_client", base_model="nope"),
            "built model": await agent.error(
                "build_datums", base_model="nope", conversations=CONVERSATIONS
            ),
            "sampled model": await agent.error("sample", base_model="nope", prompt="Hi"),
            "checkpoint": await agent.error(
                "create_training_client", checkpoint="tinker://nope/weights/x"
            ),
            "file": await agent.error("build_datums", base_model=TINY, path="/no/such.jsonl"),
            "renderer": await agent.error(
                "build_datums", base_model=TINY, conversations=CONVERSATIONS, renderer="nope"
            ),
            "both": await agent.error("create_training_client"),
            "source": await agent.error("sample", client_id="a", base_model="b", prompt="Hi"),
            "asked": await agent.error("sample", base_model=TINY),
        }
        trained = await agent.train(client_id, data_id)  # nothing is lost, the server goes on
    assert "'client-9'; open: client-1." in errors["client"]
    assert "'client-9'; open: client-1." in errors["sampled client"]
    assert "'data-9'; there is: data-1." in errors["data"]
    assert all("'nope'" in errors[name] for name in ("model", "built model", "sampled model"))
    assert "nope" in errors["checkpoint"]
    assert "'/no/such.jsonl'" in errors["file"]
    assert "'nope'" in errors["renderer"]
    assert "Give exactly one" in errors["both"]
    assert "client_id and base_model" in errors["source"]
    assert "messages or prompt" in errors["asked"]
    assert not any(said.startswith("internal") for said in errors.values())
    assert trained["steps_done"] == 3


async def test_datums_of_another_model_are_refused(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        await agent.new_data()
        said = await agent.error(
            "create_training_client", base_model=TINY, checkpoint="tinker://x/weights/y"
        )
    assert "either base_model or checkpoint" in said


async def test_a_name_that_was_saved_before_is_refused_by_name(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        client_id = await agent.new_client()
        first = await agent.call("save_checkpoint", client_id=client_id, name="same")
        again = await agent.client.call_tool(
            "save_checkpoint", {"client_id": client_id, "name": "same"}
        )
    assert first["finished"]
    assert "same" in getattr(again.content[0], "text", "")

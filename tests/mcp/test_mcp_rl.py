"""An rl run as an agent has it: prompts and a built-in reward in, transcripts out."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from agents import TINY, in_memory

from tinker_mcp.settings import Settings


async def test_an_agent_starts_an_rl_run_and_reads_what_was_sampled(
    settings: Settings, tmp_path: Path
) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(8)))
    async with in_memory(settings) as agent:
        began = await agent.start_run(
            method="rl",
            base_model=TINY,
            data=str(data),
            steps=2,
            batch_size=2,
            rank=4,
            rl={"reward": {"type": "length", "target": 6}, "group_size": 4, "max_tokens": 8},
        )
        async with asyncio.timeout(120):
            while True:
                waited = await agent.call("wait_for_run", run_id=began["run_id"], timeout_s=10)
                if waited["finished"]:
                    break
        assert waited["state"] == "completed", waited
        found = await agent.call("get_run", run_id=began["run_id"], transcripts=3)
        assert found["series"][0]["metric"] == "env/all/reward/total"
        assert [line["step"] for line in found["transcripts"]] == [2, 2, 2]
        assert "Say " in found["transcripts"][0]["turns"][0]["prompt"]

"""Exchange the guards of an engine that serves: ``python reload_job.py JOB.json RESULT.json``."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from spider_sense.errors import SpiderSenseError
from spider_sense.serving.canary_seams import read_canaries
from spider_sense.serving.reload_seams import reload_guard


async def main(job: dict[str, Any]) -> dict[str, Any]:
    """Return what came of requests before, during and after reloads, and what the reloads said."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**job["engine"]))
    try:
        refused: list[str] = []
        result: dict[str, Any] = {"started": await read_canaries(engine), "refused": refused}
        result["before"] = await _ask(engine, "before", job["prompts"])
        # One request runs when a reload is asked for that does not wait for it, and another that does. More come while
        # that one waits.
        running = asyncio.create_task(_ask(engine, "running", job["prompts"][:1], 120))
        await asyncio.sleep(0.5)
        try:
            await reload_guard(engine, Path(job["good"]), wait_seconds=0.05)
        except SpiderSenseError as error:
            result["impatient"] = str(error), await engine.is_paused()
        reload = asyncio.create_task(reload_guard(engine, Path(job["good"])))
        while not (reload.done() or await engine.is_paused()):
            await asyncio.sleep(0.02)
        waiting = asyncio.create_task(_ask(engine, "waiting", job["prompts"]))
        result["reload_waited"] = not (running.done() or reload.done())
        result["running"], result["reloaded"] = await running, await reload
        result["waiting"] = await waiting
        for folder in job["bad"]:
            try:
                await reload_guard(engine, Path(folder))
            except SpiderSenseError as error:
                refused.append(str(error))
        result["after"] = await _ask(engine, "after", job["prompts"])
        return result
    finally:
        engine.shutdown()


async def _ask(engine: Any, name: str, prompts: list[list[int]], new: int = 6) -> list[dict[str, Any]]:
    return list(await asyncio.gather(*(_one(engine, f"{name}-{n}", ids, new) for n, ids in enumerate(prompts))))


async def _one(engine: Any, name: str, prompt: list[int], new: int) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = SamplingParams(
        temperature=0.0, max_tokens=new, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
    )
    async for last in engine.generate({"prompt_token_ids": prompt}, sampling, name):
        said = (last.kv_transfer_params or {}).get("spider_sense")
        return {"prompt": prompt, "tokens": list(last.outputs[0].token_ids), "said": said}
    raise RuntimeError(f"{name} ended without an answer")


if __name__ == "__main__":
    found = asyncio.run(main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")

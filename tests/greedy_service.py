"""Greedy answers of a served model, all prompts at once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from fiveply import service
from fiveply.serve.driver import Driver, Settings
from fiveply.serve.generation import Generation
from fiveply.serve.messages import Sampling


def greedy(served: service.Served, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """`count` tokens after each, prompts in chunks."""

    async def work(driver: Driver) -> list[list[int]]:
        async def tokens(generation: Generation) -> list[int]:
            return [token async for piece in generation.pieces() for token in piece.tokens]

        return await asyncio.gather(*(tokens(driver.submit(list(prompt), count, Sampling())) for prompt in prompts))

    return service.run(served, Settings(step_tokens=33), work)

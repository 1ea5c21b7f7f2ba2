"""`POST /generate`: the call of the method's own server, for programs written for that.

Source: https://github.com/TemporaryLoRA/Block-Attention (server/block_generate_server.py), which answers
`{"ret": 0, "generated": ..., "message": ""}`. Errors have the HTTP status and the form they have everywhere here.
"""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from blockrag.server.connection import GONE, ClientGoneError, while_connected
from blockrag.server.prompts import seed_prompt
from blockrag.server.schemas import SeedRequest
from blockrag.server.serving import serving_of

__all__ = ["router"]

router = APIRouter()


@router.post("/generate")
async def generate(request: Request, body: SeedRequest) -> Response:
    """Answer blocks given as strings."""
    serving = serving_of(request)
    options = body.options(serving.settings.max_new_tokens)
    work = serving.complete(partial(seed_prompt, serving.model, body), options, None)
    try:
        generation = await while_connected(request.receive, work)
    except ClientGoneError:
        return Response(status_code=GONE)
    usage = generation.usage.as_openai()
    return JSONResponse({"ret": 0, "generated": generation.text, "message": "", "usage": usage})

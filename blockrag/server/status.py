"""What the server says of itself: `/v1/models`, `/health`, `/metrics`."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from blockrag.errors import StoreError
from blockrag.server.serving import Serving, serving_of

__all__ = ["router"]

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, object]:
    """The one model there is."""
    return {"object": "list", "data": [_model(serving_of(request))]}


@router.get("/v1/models/{name:path}")
async def show_model(request: Request, name: str) -> dict[str, object]:
    """The model, if that is its name."""
    serving = serving_of(request)
    serving.check_model(name)
    return _model(serving)


@router.get("/health")
async def health(request: Request) -> Response:
    """200 while requests can be answered, 503 while the server stops or its store cannot be used."""
    serving = serving_of(request)
    status = "shutting_down" if serving.gate.closed else "ok"
    try:
        await asyncio.to_thread(serving.model.store.stats)
    except StoreError:
        status = "store_unavailable"
    ready = status == "ok"
    state = {"status": status, "ready": ready, "running": serving.gate.running, "waiting": serving.gate.waiting}
    return JSONResponse(state, 200 if ready else 503)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    text = await asyncio.to_thread(serving_of(request).metrics.text)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


def _model(serving: Serving) -> dict[str, object]:
    model = serving.model
    return {
        "id": serving.settings.model_name,
        "object": "model",
        "created": 0,
        "owned_by": "blockrag",
        "max_model_len": model.context_window,
        "attention": model.attention,
        "block_fine_tuned": model.facts.block_fine_tuned,
    }

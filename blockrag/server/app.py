"""The application, put together: routes, and around them what counts, guards and limits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI

from blockrag import __version__
from blockrag.server.access import Access
from blockrag.server.blocks import router as blocks
from blockrag.server.chat import router as chat
from blockrag.server.errors import install
from blockrag.server.limits import BodyLimits
from blockrag.server.metrics import RequestMetrics
from blockrag.server.seed import router as seed
from blockrag.server.serving import Serving
from blockrag.server.status import router as status

if TYPE_CHECKING:
    from blockrag.index import PassageIndex
    from blockrag.model.block_model import BlockModel
    from blockrag.server.settings import ServerSettings

__all__ = ["create_app"]


def create_app(model: BlockModel, settings: ServerSettings, *, index: PassageIndex | None = None) -> FastAPI:
    """An application that serves a model; add routes of your own, or mount it in another one.

    Args:
        model: The model, whose store keeps the blocks. It stays open when the application ends.
        settings: Limits, and the key.
        index: Passages that requests may have searched (`{"blockrag": {"retrieve": {"top_k": 5}}}`).
    """
    # The documentation pages of FastAPI load scripts from elsewhere; the description itself is at /openapi.json.
    app = FastAPI(title="blockrag", version=__version__, docs_url=None, redoc_url=None)
    serving = Serving(model, settings, index)
    app.state.serving = serving
    install(app)
    for router in (chat, blocks, seed, status):
        app.include_router(router)
    # The last one added stands outermost.
    app.add_middleware(BodyLimits, max_bytes=settings.max_body_bytes, timeout_s=settings.timeout_s)
    app.add_middleware(Access, api_key=settings.api_key)
    app.add_middleware(RequestMetrics, metrics=serving.metrics)
    return app

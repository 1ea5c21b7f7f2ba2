"""One model behind HTTP: the OpenAI API with passages in it, the store's blocks, and the seed's own call.

    settings.py    limits, and which address may be served without a key
    schemas.py     what requests hold
    errors.py      every error as HTTP status and OpenAI's error object
    access.py      who may call: the API key, or browsers of this machine only
    limits.py      how large a request may be, and how long it may take to arrive
    gate.py        who may use the model now, who waits, who is sent away
    serving.py     answers from the model's worker thread, within a time limit, until the client leaves
    connection.py  noticing that the client left; event streams
    prompts.py     requests to blocks
    chat.py        /v1/chat/completions
    blocks.py      /v1/blocks
    seed.py        /generate
    status.py      /v1/models, /health, /metrics
    metrics.py     what is counted and timed
    app.py         the application, put together
    run.py         listening, and stopping without breaking off answers

Needs the extra `blockrag[server]`. Only this package imports FastAPI, uvicorn, pydantic and the Prometheus client.
"""

from __future__ import annotations

from blockrag.server.app import create_app
from blockrag.server.run import listen, serve
from blockrag.server.settings import ServerSettings, check_exposure

__all__ = ["ServerSettings", "check_exposure", "create_app", "listen", "serve"]

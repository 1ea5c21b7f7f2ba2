"""`/v1/blocks`: computing passages' blocks ahead of time, and looking after those that are stored."""

from __future__ import annotations

import asyncio
import heapq
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from blockrag.codec import read_header
from blockrag.errors import DamagedBlockError
from blockrag.fingerprint import check_key
from blockrag.server.connection import GONE, ClientGoneError, while_connected
from blockrag.server.errors import ApiError
from blockrag.server.prompts import passages_of
from blockrag.server.schemas import BlocksRequest
from blockrag.server.serving import Serving, serving_of

if TYPE_CHECKING:
    from blockrag.prompt import Block
    from blockrag.stores import BlockStore

__all__ = ["router"]

router = APIRouter()


@router.post("/v1/blocks")
async def prebuild(request: Request, body: BlocksRequest) -> Response:
    """Compute and store the blocks of documents, and of the prefix that stands before them in every prompt."""
    serving = serving_of(request)
    made: dict[str, dict[str, object]] = {}

    def note(block: Block, was_stored: bool, nbytes: int) -> None:
        key = serving.model.block_key(block.token_ids)
        made[key] = {
            "object": "block",
            "key": key,
            "kind": block.kind,
            "document": block.source or None,
            "tokens": len(block),
            "status": "reused" if was_stored else "new",
            "bytes_new": nbytes,
        }

    try:
        work = serving.materialize(partial(_blocks, serving, body), note)
        report = await while_connected(request.receive, work)
    except ClientGoneError:
        return Response(status_code=GONE)
    return JSONResponse(
        {
            "object": "list",
            "data": list(made.values()),
            "blocks_new": report.blocks_new,
            "blocks_reused": report.blocks_reused,
            "bytes_new": report.bytes_new,
        }
    )


@router.get("/v1/blocks")
async def list_blocks(
    request: Request, after: str = "", limit: Annotated[int, Query(ge=1, le=1000)] = 100
) -> dict[str, object]:
    """A page of the stored keys in order, those behind `after`; and the store's counters.

    A server with a namespace lists nothing: a key does not say whose it is.
    """
    model = serving_of(request).model
    if model.namespace:
        message = (
            "this server has a namespace in a store that others use too, so that keys cannot be listed; ask for one"
        )
        raise ApiError(403, message, code="namespaced")
    return await asyncio.to_thread(_page, model.store, after, limit)


@router.get("/v1/blocks/{key}")
async def show_block(request: Request, key: str) -> dict[str, object]:
    """What a stored block says of itself, or in what it is damaged."""
    return await asyncio.to_thread(_facts, serving_of(request), check_key(key))


@router.delete("/v1/blocks/{key}")
async def delete_block(request: Request, key: str) -> dict[str, object]:
    """Remove a block, also from what finished prompts left in memory; a prompt that needs it computes it again."""
    model = serving_of(request).model
    if not await asyncio.to_thread(model.store.delete_many, [check_key(key)]):
        raise _missing(key)
    model.forget_kept()
    return {"object": "block", "key": key, "deleted": True}


def _blocks(serving: Serving, body: BlocksRequest) -> list[Block]:
    template, tokenizer = serving.model.template, serving.model.tokenizer
    prefix = template.prefix_block(tokenizer)
    return [*([prefix] if prefix else []), *template.passage_blocks(tokenizer, passages_of(body.documents))]


def _page(store: BlockStore, after: str, limit: int) -> dict[str, object]:
    stored = store.keys()
    keys = heapq.nsmallest(limit + 1, (key for key in stored if key > after))
    stats = store.stats()
    page = keys[:limit]
    return {
        "object": "list",
        "data": [{"object": "block", "key": key} for key in page],
        "has_more": len(keys) > limit,
        "last_key": page[-1] if page else None,
        "store": {"blocks": stats.blocks, "bytes": stats.bytes, "max_bytes": stats.max_bytes},
    }


def _facts(serving: Serving, key: str) -> dict[str, object]:
    data = serving.model.store.get(key)
    if data is None:
        raise _missing(key)
    facts: dict[str, Any] = {"object": "block", "key": key, "bytes": len(data)}
    try:
        header = read_header(data)
    except DamagedBlockError as error:
        # A prompt that needs it computes it again and replaces this copy.
        return {**facts, "damaged": error.reason}
    return {
        **facts,
        "damaged": None,
        "tokens": header.num_tokens,
        "precision": header.precision,
        "format_version": header.version,
        "fingerprint": header.fingerprint,
        "usable": serving.model.profile is not None and header.fingerprint == serving.model.fingerprint.digest,
    }


def _missing(key: str) -> ApiError:
    return ApiError(404, f"there is no block {key} in the store; it may have been evicted", code="not_found")

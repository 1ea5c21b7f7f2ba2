"""Every error as HTTP status and OpenAI's error object: `{"error": {"message", "type", "param", "code"}}`.

    400  invalid_json, invalid_value, unsupported_parameter, unknown_parameter, context_length_exceeded
    401  invalid_api_key          403  foreign_origin, namespaced
    404  model_not_found, not_found
    408  request_timeout          413  request_too_large    405 and others  invalid_request
    500  internal_error, model_failed                       504  timeout
    503  queue_full, shutting_down, store_unavailable, blocks_missing

Source: https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import Response

from blockrag.errors import (
    BlockRAGError,
    MissingBlockError,
    NotFiniteError,
    PassageIndexError,
    PromptTooLongError,
    StoreError,
)

if TYPE_CHECKING:
    from starlette.requests import Request

__all__ = ["ApiError", "api_error", "error_response", "install"]


class ApiError(HTTPException):
    """An error that a client sees.

    Args:
        status: HTTP status.
        message: One sentence with the offending value and the next step.
        code: What programs go by.
        param: The request field it is about.
        headers: Further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers=dict(headers or {}))
        self.body: dict[str, object] = {
            "error": {
                "message": message,
                "type": "server_error" if status >= 500 else "invalid_request_error",
                "param": param,
                "code": code,
            }
        }


def api_error(error: BlockRAGError) -> ApiError:
    """What a client sees of one of blockrag's errors."""
    if isinstance(error, PromptTooLongError):
        return ApiError(400, str(error), code="context_length_exceeded", param="messages")
    if isinstance(error, NotFiniteError):
        return ApiError(500, str(error), code="model_failed")
    if isinstance(error, MissingBlockError):
        return ApiError(503, str(error), code="blocks_missing")
    if isinstance(error, (StoreError, PassageIndexError)):
        return ApiError(503, str(error), code="store_unavailable")
    return ApiError(400, str(error), code="invalid_value")


def error_response(error: ApiError) -> Response:
    """The response; JSON in ASCII, since messages quote what clients sent, which may not be encodable."""
    return Response(json.dumps(error.body), error.status_code, error.headers, media_type="application/json")


def install(app: FastAPI) -> None:
    """Answer every error of an application in this form; each handler gets the type it is installed for."""
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(StarletteHTTPException, _refused)
    app.add_exception_handler(BlockRAGError, _blockrag)
    app.add_exception_handler(Exception, _defect)


async def _invalid(request: Request, error: Exception) -> Response:
    # Of the ways in which a value matches no alternative, the one that looked deepest says most.
    problem = max(cast("RequestValidationError", error).errors(), key=lambda found: len(found["loc"]))
    return error_response(_of_problem(problem))


def _of_problem(problem: Mapping[str, Any]) -> ApiError:
    if problem["type"] == "json_invalid":
        message = f"the body is no JSON ({problem['ctx']['error']} at character {problem['loc'][-1]}); send one object"
        return ApiError(400, message, code="invalid_json")
    place = _place(problem["loc"])
    if not place:
        return ApiError(400, "the body must be a JSON object, sent as application/json", code="invalid_json")
    missing = problem["type"] == "missing"
    given = "" if missing else f", got {reprlib.repr(problem['input'])}"
    return ApiError(400, f"{place}: {problem['msg']}{given}", code="invalid_value", param=place)


def _place(loc: Sequence[str | int]) -> str:
    """A field as clients write it: `messages[0].content`, without the "body" (or "query") it is in."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in loc[1:])
    return text.removeprefix(".")


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, ApiError):
        return error_response(error)
    found = cast("StarletteHTTPException", error)
    if isinstance(found.__cause__, (ValueError, RecursionError)):
        # What FastAPI says of bodies that it cannot read: no UTF-8, nested too deeply, a number of thousands of digits.
        return error_response(
            ApiError(400, f"the body is no JSON ({found.__cause__}); send one object", code="invalid_json")
        )
    message = f"{request.method} {request.url.path}: {found.detail}"
    code = "not_found" if found.status_code == 404 else "invalid_request"
    return error_response(ApiError(found.status_code, message, code=code, headers=found.headers))


async def _blockrag(request: Request, error: Exception) -> Response:
    return error_response(api_error(cast("BlockRAGError", error)))


async def _defect(request: Request, error: Exception) -> Response:
    # The server prints the traceback; clients need not see what is inside. It closes the connection, and must say so:
    # the client's next request would get no answer.
    message = "an internal error; the server's log has its traceback"
    return error_response(ApiError(500, message, code="internal_error", headers={"Connection": "close"}))

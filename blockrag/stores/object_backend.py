"""obstore's side of an object store: which URLs and options it takes, its clients, and what its errors mean.

Two clients per store: one whose requests end with the deadline, for reading, and one that waits for large uploads.
Credentials are obstore's own business: it takes them from the environment or the machine's role.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Final

from obstore import store as backends
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

from blockrag.errors import InputError, StoreError, StoreFullError
from blockrag.stores.remote import WRITE_TIMEOUT_S, Explained
from blockrag.stores.urls import StoreUrl

__all__ = ["FAULTS", "ObjectOptions", "check_object_url", "connect", "explain"]

FAULTS: Final = (BaseError, OSError, NotImplementedError)
"""What obstore raises."""

_CONNECT_TIMEOUT_S: Final = 5.0
_OS_ERROR: Final = re.compile(r"\(os error (\d+)\)")
_FULL_ERRNOS: Final = {"27", "28", "122"}  # EFBIG, ENOSPC, EDQUOT
_FULL_WORDS: Final = re.compile(r"507 Insufficient|QuotaExceeded|StorageFull|EntityTooLarge")
# Where a cloud's machines ask for their role: what is asked when the environment has no credentials.
_ROLES: Final = re.compile(r"//(169\.254\.\d+\.\d+|metadata)\b")
_ENVIRONMENT: Final = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS in the environment",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY in the environment",
}


@dataclass(frozen=True, slots=True)
class ObjectOptions:
    """What a bucket's URL may say beside its name, see `ObjectStore`."""

    endpoint: str | None
    region: str | None
    allow_http: bool


def check_object_url(url: StoreUrl, options: ObjectOptions) -> None:
    """Check a URL without parameters, and its options.

    Raises:
        InputError: It names no place, holds credentials, or has options of another scheme.
    """
    base, scheme, place = url.text, url.scheme, url.place
    container = place.partition("/")[0]
    if scheme in ("file", "memory"):
        if container or (place != "/" if scheme == "memory" else not place.strip("/")):
            raise InputError(f"store {base!r}: write file:///absolute/path, or memory:///")
    elif scheme not in _ENVIRONMENT or not container:
        raise InputError(f"store {base!r} names no bucket; write s3://bucket/prefix")
    elif "@" in place:
        raise InputError(f"store {base!r}: no credentials in a URL; set {_ENVIRONMENT[scheme]}")
    if options.region and scheme != "s3":
        raise InputError(f"store {base!r}: region is for s3:// only")
    if (options.endpoint or options.allow_http) and scheme not in ("s3", "az"):
        raise InputError(f"store {base!r}: endpoint and allow_http are for s3:// and az:// only")
    if options.endpoint:
        _check_endpoint(base, scheme, options.endpoint, allow_http=options.allow_http)


def connect(base: str, scheme: str, options: ObjectOptions, deadline_s: float) -> tuple[Any, Any]:
    """The client that reads, within the deadline, and the one that writes.

    Raises:
        InputError: obstore does not take the URL, or misses something in the environment.
    """
    if scheme == "memory":
        return (memory := backends.MemoryStore()), memory
    client = partial(_client, base, options)
    try:
        return client(timeout_s=deadline_s), client(timeout_s=max(deadline_s, WRITE_TIMEOUT_S))
    except BaseError as error:
        raise InputError(f"cannot use the store {base!r}: {_first_line(error)}; set it in the environment") from error


def explain(error: Exception, *, store: str, scheme: str) -> Explained:
    """What an error of obstore means.

    Args:
        error: One of `FAULTS`.
        store: The store's URL.
        scheme: Its scheme.
    """
    first = _first_line(error)
    what = f"the store {store} failed: {first}"
    code = _OS_ERROR.search(str(error))
    if (code is not None and code[1] in _FULL_ERRNOS) or _FULL_WORDS.search(first):
        return Explained(StoreFullError(f"{what}; free space there"), unanswered=False)
    if isinstance(error, FileNotFoundError):
        return Explained(StoreError(f"{what}; create the bucket, or correct its name"), unanswered=False)
    if isinstance(error, (PermissionDeniedError, UnauthenticatedError, PermissionError)):
        hint = f"set {_ENVIRONMENT[scheme]}, with the rights it needs" if scheme in _ENVIRONMENT else "see its rights"
        return Explained(StoreError(f"{what}; {hint}"), unanswered=False)
    if scheme in _ENVIRONMENT and _ROLES.search(first):
        return Explained(StoreError(f"{what}; this machine has no role: set {_ENVIRONMENT[scheme]}"), unanswered=True)
    return Explained(StoreError(f"{what}; check that it can be reached"), unanswered=True)


def _client(base: str, options: ObjectOptions, *, timeout_s: float) -> Any:
    timeout = timedelta(seconds=timeout_s)
    config = {"endpoint": options.endpoint, "region": options.region}
    # Each scheme has its own type of configuration.
    from_url: Any = backends.from_url
    return from_url(
        base,
        config={name: value for name, value in config.items() if value},
        client_options={
            "allow_http": options.allow_http,
            "timeout": timeout,
            "connect_timeout": min(timeout, timedelta(seconds=_CONNECT_TIMEOUT_S)),
        },
        # Soon enough for the deadline to see a second attempt.
        retry_config={
            "max_retries": 2,
            "retry_timeout": timeout,
            "backoff": {"init_backoff": timedelta(milliseconds=50), "max_backoff": timedelta(seconds=1), "base": 2},
        },
    )


def _check_endpoint(base: str, scheme: str, endpoint: str, *, allow_http: bool) -> None:
    if "@" in endpoint:
        raise InputError(f"store {base!r}: no credentials in the endpoint; set {_ENVIRONMENT[scheme]}")
    if not endpoint.startswith(("https://", "http://")):
        raise InputError(f"store {base!r}: endpoint {endpoint!r:.100} is no URL; write https://host:port")
    if endpoint.startswith("http://") and not allow_http:
        raise InputError(f"store {base!r}: {endpoint} is not encrypted; use https://, or add allow_http=true")


def _first_line(error: Exception) -> str:
    """The message without obstore's debugging output, and without what URLs carry after a question mark."""
    return re.sub(r"\?[^\s\"]*", "?...", str(error).partition("\n")[0])[:300]

"""Where encoded blocks are kept: one protocol, several stores, and `open_store` to get one from a URL.

    memory://                               this process's memory
    memory://?max_bytes=2GB                 with a byte budget, least recently used out first
    disk:///var/cache/blocks?max_bytes=1TB  a local directory (absolute path), shared by processes of one machine
    disk://blocks                           a local directory (relative path; `~` works too)
    s3://bucket/prefix?region=eu-west-1     a bucket, also of a server that speaks S3 (?endpoint=https://host:port)
    gs://bucket/prefix                      Google Cloud Storage
    az://container/prefix                   Azure
    file:///shared/blocks                   a directory laid out like a bucket, on a file system that machines share
    memory:///                              the same in memory, for tests
    redis://host:6379/0                     Redis or Valkey; rediss:// with TLS, redis+unix:///path/of/socket
    tiered:memory://|disk:///x|s3://b/p     stores behind each other, the fastest first (a | in a path is %7C)

Paths are percent-decoded (`%3F` is a question mark). Sizes are bytes or take K/KB, M/MB, G/GB, T/TB (powers of 1000)
or KiB, MiB, GiB, TiB (powers of 1024). What lies behind a network takes `deadline=SECONDS`, see
`blockrag.stores.remote`. No URL holds a password. A store is opened by the module that knows it, imported when it is
asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import unquote

from blockrag.errors import InputError, MissingDependencyError, StoreError
from blockrag.stores.memory import MemoryStore
from blockrag.stores.protocol import BlockStore, StoreStats
from blockrag.stores.urls import StoreUrl, parse_bytes, parse_store_url, without_secrets

if TYPE_CHECKING:
    from blockrag.stores.disk import DiskStore
    from blockrag.stores.object_store import ObjectStore
    from blockrag.stores.redis_store import RedisStore
    from blockrag.stores.tiered import TieredStore

__all__ = [
    "BlockStore",
    "DiskStore",
    "MemoryStore",
    "ObjectStore",
    "RedisStore",
    "StoreStats",
    "TieredStore",
    "open_store",
    "parse_bytes",
    "read_store_url",
]

_TIERED: Final = "tiered:"
_TIERED_FORM: Final = "tiered:memory://?max_bytes=2GB|disk:///path|s3://bucket/prefix"
_LAZY: Final = {
    "DiskStore": "disk",
    "ObjectStore": "object_store",
    "RedisStore": "redis_store",
    "TieredStore": "tiered",
}


def open_store(url: str) -> BlockStore:
    """Open the block store a URL names, creating it if it is not there.

    Args:
        url: See the module's docstring for the forms.

    Raises:
        InputError: An unknown scheme, parameter or size; the message says what is allowed.
        StoreError: The directory, bucket or server cannot be used.
        MissingDependencyError: The library for this kind of store is not installed.
    """
    if url.startswith(_TIERED):
        return _open_tiers(url)
    (parts,) = read_store_url(url)
    known = _SCHEMES[parts.scheme]
    return known.open(parts, known.form)


def read_store_url(url: str) -> list[StoreUrl]:
    """What a URL says, without opening anything: of one store, or of each tier, the fastest first.

    Raises:
        InputError: An unknown scheme or parameter; the message says what is allowed.
    """
    tiers = _tiers(url) if url.startswith(_TIERED) else [url]
    return [_read_plain(tier) for tier in tiers]


def _read_plain(url: str) -> StoreUrl:
    scheme, separator, _ = url.partition("://")
    if not separator or scheme not in _SCHEMES:
        forms = [known.form for known in _SCHEMES.values()]
        raise InputError(f"cannot open store {without_secrets(url)!r}; use one of: {', '.join([*forms, _TIERED_FORM])}")
    known = _SCHEMES[scheme]
    return parse_store_url(url, known.parameters, refused=known.refused)


def _tiers(url: str) -> list[str]:
    urls = url.removeprefix(_TIERED).split("|")
    if any(tier.startswith(_TIERED) or not tier for tier in urls):
        raise InputError(f"store {without_secrets(url)!r}: write plain stores with | between them, e.g. {_TIERED_FORM}")
    return urls


def _open_tiers(url: str) -> TieredStore:
    from blockrag.stores.tiered import TieredStore

    tiers: list[BlockStore] = []
    try:
        for tier in _tiers(url):
            tiers.append(open_store(tier))
    except BaseException:
        for opened in tiers:
            with suppress(StoreError):
                opened.close()
        raise
    return TieredStore(tiers)


def _open_memory(url: StoreUrl, form: str) -> BlockStore:
    if url.place == "/":
        if "max_bytes" in url.parameters:
            raise InputError(f"store {url.text!r}: max_bytes is not possible here; {_BUCKET_BUDGET['max_bytes']}")
        return _open_objects(url, form)
    if url.place:
        raise InputError(f"store {url.text!r}: a memory store has no path, got {url.place!r}; use {form}")
    if "deadline" in url.parameters:
        raise InputError(f"store {url.text!r}: memory needs no deadline; only max_bytes may be given")
    return MemoryStore(url.size("max_bytes"))


def _open_disk(url: StoreUrl, form: str) -> BlockStore:
    if not url.place:
        raise InputError(f"store {url.text!r} names no directory; use {form}")
    from blockrag.stores.disk import DiskStore

    return DiskStore(unquote(url.place), max_bytes=url.size("max_bytes"))


def _open_objects(url: StoreUrl, form: str) -> BlockStore:
    try:
        from blockrag.stores.object_store import ObjectStore
    except ModuleNotFoundError as error:
        raise _missing(error, url, "object") from error
    return ObjectStore(
        f"{url.scheme}://{url.place}",
        endpoint=url.parameters.get("endpoint"),
        region=url.parameters.get("region"),
        allow_http=url.flag("allow_http"),
        **_deadline(url),
    )


def _open_redis(url: StoreUrl, form: str) -> BlockStore:
    try:
        from blockrag.stores.redis_store import RedisStore
    except ModuleNotFoundError as error:
        raise _missing(error, url, "redis") from error
    return RedisStore(f"{url.scheme}://{url.place}", **_deadline(url))


def _deadline(url: StoreUrl) -> dict[str, float]:
    deadline = url.number("deadline")
    return {} if deadline is None else {"deadline_s": deadline}


def _missing(error: ModuleNotFoundError, url: StoreUrl, extra: str) -> ImportError:
    if error.name not in ("obstore", "redis"):
        return error
    return MissingDependencyError(f"store {url.text!r} needs {error.name}; run: pip install 'blockrag[{extra}]'")


class _Scheme(NamedTuple):
    """What `open_store` knows of one scheme.

    Args:
        form: An example of its URLs.
        open: Opens one.
        parameters: Those it may have.
        refused: Those that do not work, and what does instead.
    """

    form: str
    open: Callable[[StoreUrl, str], BlockStore]
    parameters: frozenset[str]
    refused: Mapping[str, str] = {}


_BUCKET_BUDGET: Final = {
    "max_bytes": "nothing is evicted from a bucket: give it a lifecycle rule that lets objects under blocks/ expire"
}
_REDIS_BUDGET: Final = {
    "max_bytes": "the server has its own: set its maxmemory, and maxmemory-policy allkeys-lru",
    "password": "set BLOCKRAG_REDIS_PASSWORD in the environment",
}
_REDIS: Final = ("redis://host:6379/0", _open_redis, frozenset({"deadline"}), _REDIS_BUDGET)
_SCHEMES: Final = {
    "memory": _Scheme("memory://?max_bytes=2GB", _open_memory, frozenset({"max_bytes", "deadline"})),
    "disk": _Scheme("disk:///path?max_bytes=200GB", _open_disk, frozenset({"max_bytes"})),
    "s3": _Scheme(
        "s3://bucket/prefix?deadline=2",
        _open_objects,
        frozenset({"deadline", "endpoint", "region", "allow_http"}),
        _BUCKET_BUDGET,
    ),
    "gs": _Scheme("gs://bucket/prefix", _open_objects, frozenset({"deadline"}), _BUCKET_BUDGET),
    "az": _Scheme(
        "az://container/prefix", _open_objects, frozenset({"deadline", "endpoint", "allow_http"}), _BUCKET_BUDGET
    ),
    "file": _Scheme("file:///shared/path", _open_objects, frozenset({"deadline"}), _BUCKET_BUDGET),
    "redis": _Scheme(*_REDIS),
    "rediss": _Scheme(*_REDIS)._replace(form="rediss://host:6379/0"),
    "redis+unix": _Scheme(*_REDIS)._replace(form="redis+unix:///path/of/socket"),
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"blockrag.stores.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

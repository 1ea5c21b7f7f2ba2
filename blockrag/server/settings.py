"""What a server is told once: limits, its key, and which addresses it may be reached at without one."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass, field

from blockrag.errors import InputError

__all__ = ["ServerSettings", "check_exposure", "is_loopback"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Limits of one server.

    Args:
        model_name: What clients call the model.
        api_key: What clients must send as `Authorization: Bearer KEY`; None lets everybody on this machine in.
        max_concurrent: Requests whose steps take turns on the model, each with a cache of its own in memory.
        max_queue: Requests that may wait for their turn; one more is answered with 503.
        max_body_bytes: Longest request body.
        timeout_s: Longest a request may take, waiting included; a body may take as long to arrive.
        shutdown_s: How long answers may still take once the server was told to stop; finite.
        max_new_tokens: Most tokens of an answer, where the request does not say.

    Raises:
        InputError: A limit is out of range, or the key cannot be sent in a header.
    """

    model_name: str
    api_key: str | None = field(default=None, repr=False)
    max_concurrent: int = 4
    max_queue: int = 64
    max_body_bytes: int = 8 << 20
    timeout_s: float = 300.0
    shutdown_s: float = 30.0
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        checks = {
            "model_name": bool(self.model_name),
            "max_concurrent": self.max_concurrent >= 1,
            "max_queue": self.max_queue >= 0,
            "max_body_bytes": self.max_body_bytes >= 1,
            "timeout_s": self.timeout_s > 0,
            "shutdown_s": 0 <= self.shutdown_s < math.inf,
            "max_new_tokens": self.max_new_tokens >= 1,
        }
        for name, valid in checks.items():
            if not valid:
                raise InputError(f"{name}={getattr(self, name)!r} is out of range; see ServerSettings")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise InputError("the API key must be printable ASCII and not empty, for it is sent in a header")
        if self.api_key is not None and self.api_key != self.api_key.strip():
            raise InputError("the API key begins or ends with a space, which headers drop; pass it without")


def is_loopback(host: str) -> bool:
    """Whether an address or name (without port) can only be this machine."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(host: str, api_key: str | None) -> None:
    """Refuse to be reachable from elsewhere without a key.

    Raises:
        InputError: The host is not a loopback address, and there is no key.
    """
    if api_key is None and not is_loopback(host):
        raise InputError(
            f"host {host!r} can be reached from other machines; set an API key (BLOCKRAG_API_KEY or --api-key), or "
            "listen on 127.0.0.1"
        )

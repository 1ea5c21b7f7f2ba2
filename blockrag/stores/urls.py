"""Store URLs: taking one apart, with errors that name what is allowed and never show a secret.

    scheme://place?name=value&...

Nothing here opens anything.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, urlencode

from blockrag.errors import InputError

__all__ = ["StoreUrl", "parse_bytes", "parse_store_url", "with_parameters", "without_secrets"]

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:([kmgt])(i?)b?|b)?\s*", re.IGNORECASE)
# A password may hold any character; a bar ends the URL of one tier.
_USER = re.compile(r"(://)[^|]*@")


@dataclass(frozen=True, slots=True)
class StoreUrl:
    """The parts of a store's URL.

    Args:
        text: The URL as it may be shown.
        scheme: Before `://`.
        place: Between `://` and the question mark, percent-encoded.
        parameters: What follows it.
    """

    text: str
    scheme: str
    place: str
    parameters: dict[str, str]

    def number(self, name: str) -> float | None:
        """A parameter as a number.

        Raises:
            InputError: It is none.
        """
        text = self.parameters.get(name)
        if text is None:
            return None
        try:
            return float(text)
        except ValueError:
            raise InputError(f"store {self.text!r}: {name}={text!r} is not a number") from None

    def flag(self, name: str) -> bool:
        """A parameter that is `true` or `false`; false where it is not given.

        Raises:
            InputError: It is neither.
        """
        text = self.parameters.get(name, "false").lower()
        if text not in ("true", "false"):
            raise InputError(f"store {self.text!r}: {name}={text!r}; write true or false")
        return text == "true"

    def size(self, name: str) -> int | None:
        """A parameter as bytes, see `parse_bytes`."""
        text = self.parameters.get(name)
        return None if text is None else parse_bytes(text)


def parse_store_url(url: str, allowed: Collection[str], *, refused: Mapping[str, str] | None = None) -> StoreUrl:
    """Take a URL apart.

    Args:
        url: The URL.
        allowed: The parameters it may have, each once.
        refused: Parameters that somebody may well try, and what to do instead.

    Raises:
        InputError: An unknown or repeated parameter, or user and password in the URL.
    """
    text = without_secrets(url)
    scheme, _, rest = url.partition("://")
    place, _, query = rest.partition("?")
    pairs = parse_qsl(query, keep_blank_values=True)
    for name, _ in pairs:
        if refused and name in refused:
            raise InputError(f"store {text!r}: {name} is not possible here; {refused[name]}")
    if any(name not in allowed for name, _ in pairs) or len({name for name, _ in pairs}) < len(pairs):
        hint = f"only {', '.join(sorted(allowed))} may be given, each once" if allowed else "it takes none"
        raise InputError(f"store {text!r}: unknown or repeated parameters; {hint}")
    return StoreUrl(text, scheme, place, dict(pairs))


def without_secrets(url: str) -> str:
    """The URL without what stands before an @ in it, for errors and logs; paths of directories may have one."""
    return url if url.startswith(("disk:", "file:")) else _USER.sub(r"\1***@", url)


def with_parameters(base: str, parameters: Mapping[str, object]) -> str:
    """A URL with those parameters that are neither None nor False, as `parse_store_url` reads them."""
    given = {
        name: "true" if value is True else f"{value:g}" if isinstance(value, float) else value
        for name, value in parameters.items()
        if value is not None and value is not False
    }
    return base + (f"?{urlencode(given, quote_via=quote, safe='/:')}" if given else "")


def parse_bytes(text: str) -> int:
    """Bytes of a size such as "512", "64KiB", "1.5GB" or "2T"; letter case does not matter.

    Raises:
        InputError: Anything else, or less than one byte.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise InputError(
            f"cannot read the size {text!r}; write bytes or a number with KB, MB, GB, TB, KiB, MiB, GiB, TiB"
        )
    number, unit, binary = match.groups()
    exponent = " kmgt".index(unit.lower()) if unit else 0
    size = (
        int(float(number) * (1024 if binary else 1000) ** exponent)
        if "." in number
        else (int(number) * (1024 if binary else 1000) ** exponent)
    )
    if size < 1:
        raise InputError(f"the size {text!r} is less than one byte; leave max_bytes out for no limit")
    return size

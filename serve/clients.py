"""Who asks: API keys, and the adapters that a client has chosen by POST /lora-adapters."""

import hashlib
import hmac
import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

from serve.engine import Scales

MOST_DEFAULTS = 10_000  # clients whose choice is remembered; the one that was idle longest is forgotten


def hashed(key: str) -> str:
    """What serve.yaml keeps of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def new_key() -> str:
    return "dmoe-" + secrets.token_urlsafe(24)


def client_of(authorization: str, keys: Mapping[str, str]) -> str | None:
    """The client's name, or None for a wrong key. Without keys, whoever sends the same bearer token is one client."""
    scheme, _, key = authorization.partition(" ")
    token = hashed(key.strip()) if scheme.lower() == "bearer" else ""
    if not keys:
        return f"anonymous-{token[:16]}"
    return next((name for name, known in keys.items() if hmac.compare_digest(known, token)), None)


@dataclass
class Defaults:
    """Adapter digest -> scale, for each client, until it has been idle for `seconds`."""

    seconds: float
    _kept: "OrderedDict[str, tuple[float, dict[str, float]]]" = field(default_factory=OrderedDict)

    def get(self, client: str) -> dict[str, float] | None:
        """What this client has chosen; asking counts as being busy."""
        until, chosen = self._kept.pop(client, (0.0, {}))
        if until < time.monotonic():
            return None
        self.set(client, chosen)
        return chosen

    def set(self, client: str, chosen: dict[str, float]) -> None:
        self._kept.pop(client, None)
        self._kept[client] = (time.monotonic() + self.seconds, chosen)
        if len(self._kept) > MOST_DEFAULTS:
            self._kept.popitem(last=False)


def scales_for(chosen: Mapping[str, float], digests: list[str]) -> Scales:
    """A client's choice as one scale for each adapter; what is no longer loaded is off."""
    return tuple(chosen.get(digest, 0.0) for digest in digests)

"""Where requests come in: each is named, and those of a throttled principal may have to wait."""

from collections.abc import Collection
from contextvars import ContextVar

from spider_sense.errors import ConfigError
from spider_sense.policy import Policy
from spider_sense.serving.asgi import App, Message, Receive, Send, path_of, reply
from spider_sense.serving.principals import Principals
from spider_sense.serving.settings import ServingSettings
from spider_sense.serving.throttle import Throttle

__all__ = ["PRINCIPAL", "READING", "THROTTLE", "Door", "principals_of"]

PRINCIPAL: ContextVar[str | None] = ContextVar("spider_sense_principal", default=None)
"""Who sends the request that is being answered; None where nothing tells principals apart, or outside of HTTP."""
THROTTLE = "spider_sense_throttle"
"""Attribute of the application's state that holds its ``Throttle``, or None."""
READING = ("GET", "HEAD", "OPTIONS")
"""Methods that ask no model for anything."""


class Door:
    """ASGI middleware. It stands behind vLLM's own that checks API keys.

    Args:
        app: what answers.
        principals: tells who sends a request.
        past: paths that ask no model for anything, so that clients who are slowed do not stand in their way.
    """

    def __init__(self, app: App, principals: Principals, past: Collection[str] = ()) -> None:
        self._app, self._principals, self._past = app, principals, past

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on under its principal's name, or turn it away with the status 429."""
        if scope["type"] not in ("http", "websocket") or path_of(scope) in self._past:
            await self._app(scope, receive, send)
            return
        principal = self._principals.principal(scope["headers"])
        throttle: Throttle | None = getattr(scope["app"].state, THROTTLE)
        if throttle is not None and scope.get("method") not in READING and (wait := await throttle.wait(principal)):
            await _refuse(scope, send, wait)
            return
        token = PRINCIPAL.set(principal)
        try:
            await self._app(scope, receive, send)
        finally:
            PRINCIPAL.reset(token)


def principals_of(settings: ServingSettings, policy: Policy, keys: list[str]) -> Principals | None:
    """Return how a server tells principals apart, None if it does not.

    Args:
        settings: what the server was told.
        policy: in force.
        keys: its API keys.

    Raises:
        ConfigError: if it does not, and has to, or nobody can be who is to be exempt.
    """
    if settings.principal_header or keys:
        principals = Principals(settings.principal_header, keys)
        principals.check_known(settings.exempt_principals)
        return principals
    needs = ["the policy's action 'throttle'"] if "throttle" in policy.actions else []
    needs += ["exempt_principals"] if settings.exempt_principals else []
    needs += ["extraction"] if settings.extraction else []
    if needs:
        raise ConfigError(
            f"{' and '.join(needs)} need to know who sends a request; give the server API keys (--api-key), or set "
            "principal_header to a header that your proxy sets"
        )
    return None


async def _refuse(scope: Message, send: Send, wait: int) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1013, "reason": f"too many requests, retry in {wait} s"})
        return
    message = f"Too many requests. Try again in {wait} seconds."
    error = {"message": message, "type": "requests", "param": None, "code": "rate_limit_exceeded"}
    await reply(send, 429, {"error": error}, {"retry-after": str(wait)})

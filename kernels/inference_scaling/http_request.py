"""One request over HTTP that may be tried several times.

A timeout, a connection or a reply that breaks off, and the statuses 408, 429 and 5xx pass; the request is sent again
after a wait that is uniform on [0, b 2^k) for the k-th retry, and no shorter than what Retry-After asks for. Any other
refusal is final: it would be refused again.
"""

import asyncio
import json
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

__all__ = ["RequestError", "post"]

LONGEST_WAIT = 60.0
PASSING = (408, 409, 425, 429)


class RequestError(Exception):
    """A request that failed for good.

    Attributes:
        status: of the reply; None where there was none.
        is_final: whether it would fail again; else it was given up after the last attempt.
    """

    def __init__(self, message: str, status: int | None = None, is_final: bool = True):
        super().__init__(message)
        self.status, self.is_final = status, is_final


async def post(
    client: Any,
    url: str,
    body: dict[str, Any],
    *,
    semaphore: asyncio.Semaphore,
    timeout: float,
    max_retries: int,
    backoff: float,
    jitter: Callable[[], float],
) -> dict[str, Any]:
    """The JSON that a server answers.

    Args:
        client: an httpx.AsyncClient.
        url: where to.
        body: sent as JSON.
        semaphore: bounds the requests under way; waits between attempts hold no place.
        timeout: seconds of one attempt.
        max_retries: further attempts.
        backoff: b, in seconds.
        jitter: uniform numbers on [0, 1).

    Raises:
        RequestError: the last attempt failed, or a refusal is final.
    """
    reason, wait, status, is_final = "", 0.0, None, False
    for attempt in range(max_retries + 1):
        if attempt:
            longest = min(backoff * 2.0 ** (attempt - 1), LONGEST_WAIT)
            await asyncio.sleep(max(longest * jitter(), wait))
        async with semaphore:
            reply, reason, status, wait = await _attempt(client, url, body, timeout)
        if reply is not None:
            return reply
        if status is not None and status < 500 and status not in PASSING and status != 200:
            is_final = True
            break
    if not is_final and max_retries:
        reason += f", after {max_retries + 1} attempts"
    raise RequestError(f"{url}: {reason}{_cure(status, reason)}", status, is_final)


async def _attempt(
    client: Any, url: str, body: dict[str, Any], timeout: float
) -> tuple[dict[str, Any] | None, str, int | None, float]:
    """The reply, or None and why there is none, its status, and for how long the server wants to be left alone."""
    import httpx

    try:
        async with asyncio.timeout(timeout):
            response = await client.post(url, json=body)
    except TimeoutError:
        return None, f"no reply within {timeout:g} s", None, 0.0
    except httpx.ConnectError as error:
        return None, f"no server there ({error})", None, 0.0
    except httpx.TransportError as error:
        return None, f"the connection broke ({type(error).__name__}: {error})", None, 0.0
    if response.status_code != 200:
        wait = _retry_after(response.headers.get("retry-after"))
        return None, f"status {response.status_code}, {_message(response.text)}", response.status_code, wait
    try:
        reply = response.json()
        if not isinstance(reply, dict) or "choices" not in reply:
            raise ValueError("no choices in it")
        return reply, "", 200, 0.0
    except ValueError as error:
        return None, f"a reply that cannot be read ({error}): {response.text[:80]!r}", 200, 0.0


def _retry_after(value: str | None) -> float:
    """Seconds, from a number of them or a date."""
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except ValueError:
            return 0.0
        seconds = (date - datetime.now(date.tzinfo or UTC)).total_seconds()
    return min(max(seconds, 0.0), LONGEST_WAIT)


def _message(text: str) -> str:
    """What a server says of its refusal."""
    try:
        error = json.loads(text)
        error = error.get("error", error)
        return str(error.get("message", error) if isinstance(error, dict) else error)[:200]
    except (ValueError, AttributeError):
        return repr(text[:200])


def _cure(status: int | None, reason: str) -> str:
    if status in (401, 403):
        return "; pass the server's api_key"
    if status == 404:
        return "; base_url ends in /v1 for most servers, and model is the name under which the server knows it"
    if reason.startswith("no server"):
        return "; start it, or correct base_url"
    return ""

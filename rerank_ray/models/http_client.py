"""Posts JSON to one server: a bound on what is in flight, a pace, patient retries, and a budget."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from random import Random
from typing import Any

import httpx2
from pydantic import SecretStr

from rerank_ray.errors import ConfigError, UnavailableError
from rerank_ray.models.protocol import Failure
from rerank_ray.settings.models import OpenAIHTTPSettings

_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504, 529})
# Every other call would fare alike: the job stops instead of turning each row into an error.
_HOPELESS = frozenset({401, 402, 404})
_NO_CREDIT = "insufficient_quota"
# Hopeless before the first answer. Later it is about one call: gateways and moderation refuse texts with it too.
_FORBIDDEN = 403
_QUOTED_CHARACTERS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A JSON body for one of the API's paths."""

    path: str
    body: dict


@dataclass(frozen=True, slots=True, kw_only=True)
class _Again:
    """Why an attempt failed that may succeed later: `after` is the server's wish, in seconds; `gone` means that nobody
    answered at all."""

    reason: str
    after: float | None = None
    gone: bool = False


class Pace:
    """When the next request may leave: evenly spaced, and not before a server that asked for a pause allows it."""

    def __init__(self, queries_per_second: float | None) -> None:
        self._gap = 0.0 if queries_per_second is None else 1.0 / queries_per_second
        self._next = 0.0

    def reserve(self, now: float) -> float:
        """Take the next slot; returns the seconds until then."""
        slot = max(now, self._next)
        self._next = slot + self._gap
        return slot - now

    def hold(self, until: float) -> None:
        """Give out no slot before `until`."""
        self._next = max(self._next, until)


class HTTPClient:
    """Sends requests to one server and returns their JSON objects, or why there is none.

    One event loop and its connections live as long as the client.
    """

    def __init__(self, settings: OpenAIHTTPSettings) -> None:
        self.settings = settings
        self.requests = 0
        self.tokens = 0
        # A server that never answered is a wrong address more often than one that is away for a moment.
        self._reached = False
        self._answered = False
        # Whether an answer has said how many tokens it took.
        self._counts = False
        self._key = _api_key(settings.api_key_env)
        self._pace = Pace(settings.queries_per_second)
        self._slots = asyncio.Semaphore(settings.concurrency)
        # Spreads retries of many replicas; no score depends on it.
        self._random = Random(os.urandom(8))
        self._runner = asyncio.Runner()
        # The semaphore bounds what is in flight: waiting for a connection would count as the server's time.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=settings.concurrency)
        # The timeout is one for the whole exchange (`_attempt`); httpx's own are for each of its steps.
        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key.get_secret_value()}"}
        self._http = httpx2.AsyncClient(limits=limits, timeout=None, headers=headers)

    def post(
        self, requests: Sequence[Request], take: Callable[[int, dict | Failure], object] = lambda *_: None
    ) -> list[dict | Failure]:
        """Send all requests, at most `concurrency` at once; answers in their order.

        Args:
            take: called with each request's number and its answer, as they come.

        Raises:
            UnavailableError: the server can't be reached, or refuses the key, the model or the path.
            ConfigError: there is a budget of tokens, and the server does not count them.
        """

        async def post_one(number: int) -> dict | Failure:
            answer = await self._post(requests[number])
            take(number, answer)
            return answer

        async def post_all() -> list[dict | Failure]:
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(post_one(number)) for number in range(len(requests))]
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None
            return [t.result() for t in tasks]

        return self._runner.run(post_all())

    async def _post(self, request: Request) -> dict | Failure:
        tries = self.settings.max_tries
        for attempt in range(1, tries + 1):
            async with self._slots:
                if spent := self._spent():
                    return Failure(reason=spent)
                self.requests += 1
                await asyncio.sleep(self._pace.reserve(time.monotonic()))
                outcome = await self._attempt(request)
            if not isinstance(outcome, _Again):
                return outcome
            if outcome.gone and not self._reached:
                break
            wait = self._backoff(attempt) if outcome.after is None else outcome.after
            if wait > self.settings.max_wait_s:
                return Failure(reason=f"{outcome.reason}; it asks to wait {wait:.0f} s, longer than max_wait_s")
            if outcome.after is not None:
                self._pace.hold(time.monotonic() + outcome.after)
            if attempt < tries:
                await asyncio.sleep(wait)
        if outcome.gone:
            raise UnavailableError(f"{self.settings.url}: {outcome.reason}")
        return Failure(reason=f"{outcome.reason} (attempt {tries} of {tries})")

    def _spent(self) -> str | None:
        for name, used in (("max_requests", self.requests), ("max_total_tokens", self.tokens)):
            limit = getattr(self.settings, name)
            if limit is not None and used >= limit:
                return f"budget spent: {name} is {limit:,}"
        return None

    def _backoff(self, attempt: int) -> float:
        wait = self.settings.backoff_s * 2 ** (attempt - 1) * self._random.uniform(0.5, 1.5)
        return min(wait, self.settings.max_wait_s)

    async def _attempt(self, request: Request) -> dict | Failure | _Again:
        url = f"{self.settings.url.rstrip('/')}/{request.path}"
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                response = await self._http.post(url, json=request.body)
        except TimeoutError:
            return _Again(reason=f"no answer within timeout_s ({self.settings.timeout_s:g} s)")
        except httpx2.ConnectError as error:
            return _Again(reason=f"can't connect: {self._quoted(str(error))}", gone=True)
        except httpx2.RequestError as error:
            return _Again(reason=f"connection lost: {self._quoted(f'{type(error).__name__}: {error}')}")
        self._reached = True
        content = _content(response)
        status = _status(response, content)
        if status == 200:
            return self._counted(response, content)
        reason = f"HTTP {response.status_code}: {self._quoted(_message(response, content))}"
        forbidden = status == _FORBIDDEN and not self._answered
        if status in _HOPELESS or forbidden or _says_no_credit(content):
            raise UnavailableError(f"{url}: {reason}")
        if status in _RETRIED:
            return _Again(reason=reason, after=_retry_after(response.headers.get("Retry-After")))
        return Failure(reason=reason)

    def _counted(self, response: httpx2.Response, reply: Any) -> dict | Failure | _Again:
        if not isinstance(reply, dict):
            return _Again(reason=f"the answer is no JSON object: {self._quoted(response.text)}")
        self._answered = True
        usage = reply.get("usage")
        if isinstance(usage, dict):
            self._counts = True
            self.tokens += sum(usage.get(name) or 0 for name in ("prompt_tokens", "completion_tokens"))
        elif self.settings.max_total_tokens is not None:
            reason = "max_total_tokens: this server's answers do not say how many tokens they took"
            if not self._counts:
                raise ConfigError(f"{reason}; remove it")
            return Failure(reason=f"{reason}, or this one does not")
        return reply

    def _quoted(self, text: str) -> str:
        """A server's words on one line, cut, and without the key: some servers repeat it."""
        if self._key is not None:
            text = text.replace(self._key.get_secret_value(), "[API key]")
        line = " ".join(text.split())
        return line if len(line) <= _QUOTED_CHARACTERS else line[: _QUOTED_CHARACTERS - 1] + "…"


def _api_key(variable: str | None) -> SecretStr | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(f"api_key_env: the environment variable {variable} is not set where the model is called")
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"api_key_env: the environment variable {variable} holds what no HTTP header can carry")
    return SecretStr(key)


def _content(response: httpx2.Response) -> Any:
    """The response's JSON; None where it is none."""
    try:
        return response.json()
    except (ValueError, RecursionError):
        return None


def _says_no_credit(content: Any) -> bool:
    """Whether an error is OpenAI's for an account without credit, which comes as a 429."""
    error = content.get("error") if isinstance(content, dict) else None
    return isinstance(error, dict) and _NO_CREDIT in (error.get("type"), error.get("code"))


def _status(response: httpx2.Response, content: Any) -> int:
    """The response's status; where a gateway sends an error as an answer (OpenRouter), the error's own, or 500."""
    answered = response.status_code == 200 and isinstance(content, dict)
    if not answered or content.get("choices") or not content.get("error"):
        return response.status_code
    error = content["error"]
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) else 500


def _message(response: httpx2.Response, content: Any) -> str:
    """What an error response says: `{"error": {"message": …}}`, `{"detail": …}`, or its text."""
    if content is None:
        return response.text
    if isinstance(content, dict):
        content = content.get("error") or content.get("detail") or content.get("message") or content
    if isinstance(content, dict):
        content = content.get("message") or content
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def _retry_after(header: str | None) -> float | None:
    """Seconds to wait, from a number of seconds or an HTTP date; None when there is no usable header."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        at = parsedate_to_datetime(header)
    except ValueError:
        return None
    return max(0.0, (at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)).total_seconds())

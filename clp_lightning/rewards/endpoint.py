"""A remote language model behind an OpenAI-compatible endpoint, and a cache of its answers."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

from ..described import Described
from ..sources import cache_folder

__all__ = ["Endpoint", "NoAnswer"]

T = TypeVar("T")
_PROBE_SECONDS = 10.0
_LEAST_SECRET = 8  # characters


class NoAnswer(Exception):
    """A question that got no usable answer; says why, and never holds the key."""


class Endpoint(Described):
    """A language model that answers single questions over HTTP.

    The key is read from the environment whenever it is needed, and kept nowhere. Answers that
    could be read are kept on disk, one file each, under a hash of all that decides them: the
    address, the model, the question and the sampling settings. Several processes may share them.

    Args:
        model: The model's name at the endpoint.
        base_url: Where the endpoint is, up to and with ``/v1``.
        api_key_env: Environment variable that holds the key. For a server that needs none, set it
            to anything.
        temperature: Of the judge's sampling; None sends none, for models that refuse it.
        max_tokens: Limit of an answer; None sends none.
        body: Further fields of every request, as the endpoint knows them, such as
            ``{"reasoning_effort": "low"}``.
        timeout: Seconds of silence after which an attempt is given up.
        max_retries: Further attempts after a timeout, a lost connection or the statuses 408, 409,
            429 and 5xx, with growing pauses or as the server asks.
        concurrency: Requests at once, in each process; those of several calls together.
        cache: Folder of the answers; ``judge`` in the library's cache folder if None.

    Raises:
        ValueError: an argument is out of its range, or holds what belongs into the environment.
    """

    def __init__(
        self,
        model: str,
        base_url: str = "https://api.openai.com/v1",
        api_key_env: str = "OPENAI_API_KEY",
        temperature: float | None = 0.0,
        max_tokens: int | None = 512,
        body: dict[str, Any] | None = None,
        timeout: float = 60.0,
        max_retries: int = 5,
        concurrency: int = 8,
        cache: str | None = None,
    ) -> None:
        url = urlsplit(base_url)
        # Never shown: what is wrong here may be a key.
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError("base_url must start with http:// or https:// and name a host.")
        if url.username or url.password or url.query:
            raise ValueError(
                "base_url holds a user, a password or a query. Secrets come from the environment "
                "only: see api_key_env."
            )
        if not re.fullmatch(r"[A-Za-z_]\w*", api_key_env, re.ASCII):
            raise ValueError(
                "api_key_env is the name of an environment variable, such as OPENAI_API_KEY, not "
                "the key."
            )
        if reserved := {"model", "messages", "stream", "n"} & set(body or {}):
            raise ValueError(f"body cannot set {', '.join(sorted(reserved))}.")
        if not timeout > 0 or max_retries < 0 or concurrency < 1:
            raise ValueError(
                "An endpoint needs timeout > 0, max_retries >= 0 and concurrency >= 1; got "
                f"{timeout}, {max_retries}, {concurrency}."
            )
        self.model, self.base_url, self.api_key_env = model, base_url.rstrip("/"), api_key_env
        sampling = {"temperature": temperature, "max_tokens": max_tokens}
        self.body = {k: v for k, v in sampling.items() if v is not None} | (body or {})
        self.timeout, self.max_retries, self.concurrency = timeout, max_retries, concurrency
        self.cache = None if cache is None else Path(cache).expanduser()

    def __str__(self) -> str:
        return f"'{self.model}' at {self.base_url}"

    def check(self) -> None:
        """Refuse now what would fail at the first question.

        The server is looked for unless there are cached answers, which may be all that is needed.

        Raises:
            ModuleNotFoundError: the client is not installed.
            ValueError: there is no key, or the server refuses it.
            ConnectionError: nobody answers at ``base_url``.
        """
        _openai()
        self._key()
        if next(self._folder().glob("*.json"), None) is None:
            failure = self._probe()
            if failure is not None:  # raised where no frame holds the key, as in ask()
                raise failure

    async def ask(self, questions: Sequence[str], read: Callable[[str], T]) -> list[T | NoAnswer]:
        """Put every question, equal ones once; those that were answered before are not asked.

        Args:
            questions: N user messages.
            read: Makes what is wanted of an answer's text; raises ValueError where it cannot.

        Returns:
            For every question what ``read`` made of its answer, or why there is none.

        Raises:
            ModuleNotFoundError: the client is not installed.
            ValueError: there is no key; or the server refuses it, or does not know the model.
        """
        found: dict[str, T | NoAnswer] = {}
        for question in dict.fromkeys(questions):
            text = self._cached(question)
            with suppress(ValueError):  # kept when it was read in another way: asked again
                if text is not None:
                    found[question] = read(text)
        missing = [question for question in dict.fromkeys(questions) if question not in found]
        if missing:
            answers, failure = await self._ask_server(missing, read)
            if failure is not None:
                raise failure
            found.update(zip(missing, answers, strict=True))
        return [found[question] for question in questions]

    async def _ask_server(
        self, questions: list[str], read: Callable[[str], T]
    ) -> tuple[list[T | NoAnswer], Exception | None]:
        """The answers, and what makes all others pointless."""
        key = self._key()
        slots = _slots(self)
        fatal: list[Exception] = []

        async def answer(client: Any, question: str) -> T | NoAnswer:
            async with slots:
                if fatal:
                    return NoAnswer("was not asked")
                try:
                    text = await self._send(client, question, key)
                except NoAnswer as error:
                    return error
                except _failures() as error:
                    if (failure := self._fatal(error, key)) is not None:
                        fatal.append(failure)
                    return NoAnswer(f"{self} {self._why(error, key)}")
            try:
                value = read(text)
            except ValueError as error:
                return NoAnswer(f"{self} answered {_short(text)}, in which {error}")
            try:
                self._keep(question, text)
            except OSError as error:  # a full disk would have everything asked again and again
                fatal.append(error)
            return value

        # A client of this call only: it belongs to its event loop, and it knows the key.
        async with _openai().AsyncOpenAI(
            api_key=key,
            base_url=self.base_url,
            timeout=self.timeout,
            max_retries=self.max_retries,
        ) as client:
            answers = await asyncio.gather(*(answer(client, q) for q in questions))
        return answers, fatal[0] if fatal else None

    async def _send(self, client: Any, question: str, key: str) -> str:
        """The text of the answer, without the key."""
        reply = await client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": question}],
            extra_body=self.body,
        )
        try:
            choice = reply.choices[0]
            text, ended = choice.message.content, getattr(choice, "finish_reason", None)
        except (AttributeError, IndexError, TypeError):
            shown = _short(_without(key, str(reply)))
            raise NoAnswer(f"{self} sent what is no chat completion: {shown}") from None
        if ended == "length":
            raise NoAnswer(f"{self} was cut off at its limit of tokens: raise max_tokens")
        if not isinstance(text, str):
            raise NoAnswer(f"{self} sent no text (finish_reason: {ended})")
        return _without(key, text)

    def _probe(self) -> Exception | None:
        """What is wrong with the server, without asking a question."""
        key = self._key()
        with _openai().OpenAI(
            api_key=key,
            base_url=self.base_url,
            timeout=min(self.timeout, _PROBE_SECONDS),
            max_retries=1,
        ) as client:
            try:
                client.models.list()
            except _openai().NotFoundError:
                return None  # not every server lists its models, but this one is there
            except _openai().APIConnectionError as error:
                return ConnectionError(
                    f"{self} gave no answer ({_cause(error, key)}): start the server, or correct "
                    "base_url."
                )
            except _failures() as error:
                return self._fatal(error, key)
        return None

    def _key(self) -> str:
        key = os.environ.get(self.api_key_env, "").strip()
        if re.fullmatch(r"[!-~]+", key):
            return key
        missing, key = not key, ""  # some tools print the variables of a frame that raises
        if missing:
            raise ValueError(
                f"{self} needs a key: set the environment variable {self.api_key_env} (to "
                "anything, for a server that needs none)."
            )
        raise ValueError(
            f"The key in {self.api_key_env} holds blanks or characters beyond ASCII, which no "
            "header can: set it again."
        )

    def _fatal(self, error: Exception, key: str) -> ValueError | None:
        """What no other question would fare better with."""
        if isinstance(error, _openai().AuthenticationError):
            return ValueError(
                f"{self.base_url} refuses the key (status {error.status_code}): correct "
                f"the environment variable {self.api_key_env}. {self._said(error, key)}"
            )
        if isinstance(error, _openai().NotFoundError):
            return ValueError(
                f"{self.base_url} knows no model '{self.model}' or no chat completions (status "
                f"404): correct model or base_url. {self._said(error, key)}"
            )
        return None

    def _why(self, error: Exception, key: str) -> str:
        openai = _openai()
        if isinstance(error, openai.APIConnectionError):
            tried = f"timeout {self.timeout:g} s, max_retries {self.max_retries}"
            return f"gave no answer ({_cause(error, key)}; {tried})"
        if isinstance(error, openai.APIStatusError):
            return f"answered with status {error.status_code}. {self._said(error, key)}"
        return f"sent what cannot be read ({type(error).__name__}: {_without(key, str(error))})"

    def _said(self, error: Any, key: str) -> str:
        return f"It says: {_short(_without(key, error.message))}"

    def _folder(self) -> Path:
        """Where the answers of this endpoint are."""
        root = cache_folder() / "judge" if self.cache is None else self.cache
        return root / _hash([self.base_url, self.model])[:16]

    def _file(self, question: str) -> Path:
        decides = [self.base_url, self.model, question, self.body]
        return self._folder() / f"{_hash(decides)}.json"

    def _cached(self, question: str) -> str | None:
        try:
            text = json.loads(self._file(question).read_text(encoding="utf-8"))["answer"]
        except (OSError, ValueError, KeyError, TypeError):
            return None  # not there, or damaged: asked again and replaced
        return text if isinstance(text, str) else None

    def _keep(self, question: str, text: str) -> None:
        path = self._file(question)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not at all, and never in the way of another process that writes the same.
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, suffix=".partial", encoding="utf-8", delete=False
        ) as file:
            json.dump({"model": self.model, "answer": text}, file)
        os.replace(file.name, path)


# Event loop and semaphore of an endpoint; not its attributes, because it may be copied.
_SLOTS: WeakKeyDictionary[Endpoint, tuple[Any, asyncio.Semaphore]] = WeakKeyDictionary()


def _slots(endpoint: Endpoint) -> asyncio.Semaphore:
    """Of all calls in the running event loop."""
    running = asyncio.get_running_loop()
    if endpoint not in _SLOTS or _SLOTS[endpoint][0] is not running:
        _SLOTS[endpoint] = running, asyncio.Semaphore(endpoint.concurrency)
    return _SLOTS[endpoint][1]


def _openai() -> Any:
    try:
        import openai
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'A remote judge needs openai: pip install "clp_lightning[judge]"'
        ) from error
    return openai


def _failures() -> tuple[type[Exception], ...]:
    """What a request can end in: the client's own errors, and what it trips over in an answer."""
    odd_answer = (ValueError, TypeError, AttributeError, LookupError, RuntimeError)
    return _openai().OpenAIError, OSError, *odd_answer


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _cause(error: Exception, key: str) -> str:
    cause = error.__cause__ or error
    return _without(key, f"{type(cause).__name__} {cause}".strip())


def _without(key: str, text: str) -> str:
    # A shorter one is no secret ("EMPTY", for a server that needs none) but part of any text.
    if len(key) < _LEAST_SECRET:
        return text
    for written in (key, repr(key)[1:-1]):
        text = text.replace(written, "[key]")
    return text


def _short(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 200 else shown[:200] + "…"

"""Calling what others wrote, whatever it raises: here, in a thread, or as a coroutine.

The one place of the package that takes every exception; it keeps it for who asks the future.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import ExitStack
from contextvars import copy_context
from typing import Any, TypeVar

import torch

__all__ = ["attempt", "attempt_awaitable", "failed", "in_thread"]

T = TypeVar("T")
_DEVICES = ("cpu", "cuda")  # which autocast knows


def attempt(call: Callable[[], T]) -> Future[T]:
    """What ``call()`` comes to, now.

    Raises:
        KeyboardInterrupt: the user's. An exit is not for a reward to decide: it is kept.
    """
    future: Future[T] = Future()
    _settle(future, call)
    if isinstance(error := future.exception(), KeyboardInterrupt):
        raise error
    return future


def failed(error: Exception) -> Future[Any]:
    """A call that came to ``error``."""
    future: Future[Any] = Future()
    future.set_exception(error)
    return future


def in_thread(call: Callable[[], T]) -> Future[T]:
    """``call()`` in a thread of its own, with the caller's device, gradient mode and autocast.

    A daemon: one that hangs must not keep the process alive, as those of a pool would.
    """
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # one that is late settles all the same, heard by nobody
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    with_gradient = torch.is_grad_enabled()
    casts = {t: torch.get_autocast_dtype(t) for t in _DEVICES if torch.is_autocast_enabled(t)}

    def in_context() -> T:
        if device is not None:
            torch.cuda.set_device(device)
        with torch.set_grad_enabled(with_gradient), ExitStack() as scopes:
            for kind, dtype in casts.items():
                scopes.enter_context(torch.autocast(kind, dtype))
            return call()

    run = copy_context().run
    threading.Thread(
        target=run, args=(_settle, future, in_context), name="reward", daemon=True
    ).start()
    return future


async def attempt_awaitable(future: Future[T], awaitable: Awaitable[T]) -> None:
    """Makes ``future`` what ``awaitable`` comes to; an exit would end the event loop for all."""
    try:
        result = await awaitable
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)


def _settle(future: Future[T], call: Callable[[], T]) -> None:
    try:
        result = call()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)

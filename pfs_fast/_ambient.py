"""What a public call runs under, whatever its caller has set: PyTorch's own settings, random numbers of its own, no other thread's call.

Every context manager here is a decorator, too.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch

from .errors import BusyError

# -- settings ----------------------------------------------------------------------------------------------------------

_AUTOCAST = {
    "cpu": torch.bfloat16,
    "cuda": torch.float16,
    "mps": torch.float16,
    "xpu": torch.float16,
}
"""Devices with autocast, and the dtype that PyTorch takes where none is named."""


class _Settings(NamedTuple):
    """What changes results from outside of a call. PyTorch keeps it for each thread, but for the default dtype."""

    inference: bool = False
    grad: bool = True
    autocast: tuple[tuple[bool, torch.dtype], ...] = tuple((False, d) for d in _AUTOCAST.values())
    cache: bool = True
    nesting: int = 0  # regions of autocast; leaving the outermost empties the cache of cast weights
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32

    @classmethod
    def now(cls) -> _Settings:
        nesting = torch.autocast_increment_nesting() - 1
        torch.autocast_decrement_nesting()
        return cls(
            torch.is_inference_mode_enabled(),
            torch.is_grad_enabled(),
            tuple((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _AUTOCAST),
            torch.is_autocast_cache_enabled(),
            nesting,
            torch.get_default_device(),
            torch.get_default_dtype(),
        )


_OWN = _Settings()


class _Thread(threading.local):
    caller: _Settings | None = None  # as the innermost `own_settings` found them


_thread = _Thread()
_dtype_lock = threading.Lock()
_users = 0  # threads inside `own_settings`
_found = _OWN.dtype  # the default dtype before the first of them came


@contextmanager
def own_settings() -> Iterator[None]:
    """Inside: no autocast, gradients, no inference mode, default device CPU, default dtype float32.

    A region of autocast that a model opens inside works as ever. The default dtype is one for all threads: the caller's is back
    once no thread is inside.
    """
    global _users, _found
    before = _thread.caller
    outermost = before is None
    with _dtype_lock:
        found = _Settings.now()
        if outermost:
            _found = _found if _users else found.dtype
            _users += 1
            found = found._replace(dtype=_found)
        _thread.caller = found
    try:
        with _applied(_OWN):
            yield
    finally:
        with _dtype_lock:
            _thread.caller = before
            _users -= outermost
            if not (outermost and _users):
                torch.set_default_dtype(found.dtype)


@contextmanager
def callers_settings() -> Iterator[None]:
    """Inside `own_settings`: those of the caller again, for his loader, whose code is his own and may need them."""
    if _thread.caller is None or (_thread.caller == _OWN and torch.is_grad_enabled()):
        yield
        return
    try:
        with _applied(_thread.caller):
            yield
    finally:
        torch.set_default_dtype(_OWN.dtype)


@contextmanager
def _applied(new: _Settings) -> Iterator[None]:
    """Puts everything back but the default dtype."""
    old = _Settings.now()
    if new == old:
        yield
        return
    torch.set_default_dtype(new.dtype)
    with ExitStack() as stack:
        stack.callback(_set_autocast, old)
        _set_autocast(new)
        stack.enter_context(torch.inference_mode(new.inference))
        stack.enter_context(torch.set_grad_enabled(new.grad))
        if new.device != old.device:
            stack.enter_context(new.device)
        yield


def _set_autocast(settings: _Settings) -> None:
    for device, (enabled, dtype) in zip(_AUTOCAST, settings.autocast, strict=True):
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)
    torch.set_autocast_cache_enabled(settings.cache)
    # Within a region of the caller's, one of a training step would not be the outermost, and would leave cast weights to the next.
    torch.clear_autocast_cache()
    nesting = torch.autocast_increment_nesting()
    while nesting > settings.nesting:
        nesting = torch.autocast_decrement_nesting()
    while nesting < settings.nesting:
        nesting = torch.autocast_increment_nesting()


# -- random numbers ----------------------------------------------------------------------------------------------------


@contextmanager
def random_numbers(seed: int | None, devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """`reseed`, and the states of before at the end, also after an error. None: the caller's random numbers go on."""
    if seed is None:
        yield
        return
    devices = list(devices)
    with torch.random.fork_rng(_cuda_indices(devices), device_type="cuda"):
        reseed(seed, devices)
        yield


def reseed(seed: int, devices: Iterable[torch.device] = ()) -> None:
    """Seeds the generators of the CPU and of the CUDA devices among ``devices``; ``torch.manual_seed`` would seed those of all devices."""
    torch.random.default_generator.manual_seed(seed)
    for index in _cuda_indices(devices):
        torch.cuda.default_generators[index].manual_seed(seed)


def _cuda_indices(devices: Iterable[torch.device]) -> set[int]:
    return {
        torch.cuda.current_device() if device.index is None else device.index
        for device in devices
        if device.type == "cuda"
    }


# -- threads -----------------------------------------------------------------------------------------------------------


class _Run(NamedTuple):
    """A search or a training in progress."""

    function: str
    thread: int
    name: str


_turn = threading.RLock()
_run: _Run | None = None


@contextmanager
def alone(function: str) -> Iterator[None]:
    """`own_settings` for a call that seeds the process's random generators for as long as it takes.

    The same thread may enter again.

    Args:
        function: Name of the public function, for messages.

    Raises:
        BusyError: Another thread is inside.
    """
    global _run
    with turn(function):
        thread = threading.current_thread()
        before, _run = _run, _Run(function, threading.get_ident(), thread.name)
    try:
        with own_settings():
            yield
    finally:
        _run = before


@contextmanager
def turn(function: str | None = None) -> Iterator[None]:
    """For short work on what all threads share, such as torch.fx's patches of ``nn.Module``: waits until no other thread does any.

    Args:
        function: Name of a public function that draws from the random generators, and so may not run beside `alone`. None: it
            may.

    Raises:
        BusyError: Another thread is inside `alone`.
    """
    with _turn:
        if function is not None and _run is not None and _run.thread != threading.get_ident():
            raise BusyError(
                f"{function}: thread must be the only one of the process while a search or a training runs, got {_run.function} "
                f"in thread '{_run.name}'; call one after the other, or in processes of their own"
            )
        yield


def _forget_threads() -> None:
    """A forked process has none of its parent's threads but the one that forked it."""
    global _turn, _run, _dtype_lock, _users
    inside = _thread.caller is not None
    if _users and not inside:
        torch.set_default_dtype(_found)
    _turn, _run, _dtype_lock, _users = threading.RLock(), None, threading.Lock(), int(inside)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)

"""A value for each thread."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class PerThread(Generic[T]):
    """One value for each thread, gone when its thread ends; a copy starts with none.

    Dynamo cannot tell threads apart, so a compiled function gets the value that was set last, by any thread. Threads that share a
    compiled model have to take turns: see `ksag.model.compiled.one_at_a_time`.

    Args:
        make: what makes a thread's first value.

    >>> value = PerThread(lambda: 0)
    >>> value.set(3)
    >>> value.get()
    3
    """

    def __init__(self, make: Callable[[], T]):
        self._make, self._last_set = make, make()
        self._local = threading.local()

    # is_compiling would be true in every thread while one of them compiles
    def get(self) -> T:
        if torch.compiler.is_dynamo_compiling():
            return self._last_set
        if not hasattr(self._local, "value"):
            self._local.value = self._last_set = self._make()
        return self._local.value  # type: ignore[no-any-return]

    def set(self, value: T) -> None:
        self._last_set = value
        if not torch.compiler.is_dynamo_compiling():
            self._local.value = value


class Fixed(Generic[T]):
    """One value for all threads.

    >>> Fixed(3).get()
    3
    """

    def __init__(self, value: T):
        self._value = value

    def get(self) -> T:
        return self._value

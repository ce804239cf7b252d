"""A value for each thread."""

import threading
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class PerThread(Generic[T]):
    """One value for each thread, gone when its thread ends; a copy starts anew.

    Dynamo cannot tell threads apart, so that a compiled function gets what was set last, by whichever thread. Threads that share a
    compiled model have to take turns: see `ksag.model.compiled.turn`.

    >>> value = PerThread(0)
    >>> value.set(3)
    >>> value.get()
    3
    """

    def __init__(self, default: T):
        self.default = self._last_set = default
        self._local = threading.local()

    # is_compiling would be true in every thread while one of them compiles
    def get(self) -> T:
        return self._last_set if torch.compiler.is_dynamo_compiling() else getattr(self._local, "value", self.default)

    def set(self, value: T) -> None:
        self._last_set = value
        if not torch.compiler.is_dynamo_compiling():
            self._local.value = value

    def __reduce__(self) -> tuple[Any, ...]:
        return PerThread, (self.default,)

"""What one call of a sampling run leaves for the next one."""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ksag.model.threads import PerThread

RISE = 1.5
"""A run begins where sigma rises by more than this. Within a run it falls, or rises by at most √2: Heun's churn."""


class Kept(NamedTuple):
    limit: Tensor
    """(b,) where sigma is above it, a run begins: RISE times the noise level of the call that left the value."""
    value: Tensor
    """(b, c, h, w)"""


class Run:
    """A tensor that lasts from one call of a sampling run to the next, for each thread and each sample.

    A sample begins a run where its sigma is more than 1.5 times that of the last call, which is decided on the device; all of them
    do at another shape, dtype or device, and after `reset()`. No gradient flows from one call to the next.

    >>> run = Run()
    >>> run.keep(torch.tensor([2.0, 2.0]), torch.ones(2, 1, 1, 1))
    >>> run.last(torch.tensor([1.0, 9.0]), torch.zeros(2, 1, 1, 1)).flatten()
    tensor([1., 0.])
    """

    def __init__(self) -> None:
        self._kept: PerThread[Kept | None] = PerThread(None)

    def last(self, sigma: Tensor, like: Tensor, with_sigma: bool = False) -> Tensor:
        """What the last call of the run kept, shaped as `like`; zeros for each sample that begins a run at `sigma`, (b,).

        `with_sigma` scales it by this sigma over that of the last call: a difference of denoised latents then stays the same
        difference of noise predictions.
        """
        kept = self._kept.get()
        if kept is None or (kept.value.shape, kept.value.dtype, kept.value.device) != (like.shape, like.dtype, like.device):
            return torch.zeros_like(like)
        begins, value = sigma > kept.limit, kept.value
        if with_sigma:
            ratio = RISE * sigma / kept.limit.clamp(min=torch.finfo(sigma.dtype).tiny)  # sigma may be 0
            value = value * ratio[:, None, None, None].to(value.dtype)
        return torch.where(begins[:, None, None, None], 0, value)

    def keep(self, sigma: Tensor, value: Tensor) -> None:
        """Leaves `value`, (b, c, h, w), of a call at `sigma`, (b,), for the next call."""
        self._kept.set(Kept(RISE * sigma.detach(), value.detach()))

    def reset(self) -> None:
        """Begins a run at this thread's next call."""
        self._kept.set(None)


class Call(NamedTuple):
    number: int
    """0 for a run's first."""
    sigmas: list[float]
    form: tuple
    """The latent's shape, dtype and device."""


class Calls:
    """Counts the calls of a run, for each thread. A run begins, for the whole batch, where it does for one sample of it in `Run`.

    >>> calls = Calls()
    >>> [calls.number(torch.tensor([sigma]), torch.zeros(1, 4, 8, 8)) for sigma in (9.0, 3.0, 4.0, 9.0)]
    [0, 1, 2, 0]
    """

    def __init__(self) -> None:
        self._last: PerThread[Call | None] = PerThread(None)

    def number(self, sigma: Tensor, x: Tensor) -> int:
        """How many calls of the run came before this one, of `x` (b, c, h, w) at `sigma` (b,). Reads sigma from its device."""
        last, sigmas, form = self._last.get(), sigma.tolist(), (x.shape, x.dtype, x.device)
        number = 0
        if last is not None and last.form == form:
            rises = any(s > RISE * before for s, before in zip(sigmas, last.sigmas, strict=True))
            number = 0 if rises else last.number + 1
        self._last.set(Call(number, sigmas, form))
        return number

    def reset(self) -> None:
        """Begins a run at this thread's next call."""
        self._last.set(None)


@contextlib.contextmanager
def ended_by_errors(reset: Callable[[], None]) -> Iterator[None]:
    """Calls `reset` where the block is left by an error, Ctrl-C included: what one call left half done is nothing to go on from."""
    try:
        yield
    except BaseException:
        reset()
        raise

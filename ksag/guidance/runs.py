"""What one call of a sampling run keeps for the next one, for each sample.

A sample begins a run if its sigma is more than 1.5 times its last one; all samples do at another shape, dtype or device.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

RISE = 1.5
"""A run begins where sigma rises by more than this. Within a run it falls, or rises by at most √2: Heun's churn."""


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """(b,) → (b, 1, ...), to be multiplied with `like`, (b, c, *spatial).

    >>> per_sample(torch.ones(2), torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 1, 1, 1])
    """
    return values.reshape(-1, *[1] * (like.ndim - 1))


def only(inside: bool | Tensor, t: Tensor) -> Tensor:
    """t (b, c, *spatial) for the samples that are inside, (b,), and zeros for the others."""
    return torch.where(per_sample(inside, t), t, 0) if isinstance(inside, Tensor) else t


class Kept(NamedTuple):
    limit: Tensor
    """(b,) above this sigma, a run begins: RISE times the noise level of the call that kept the value."""
    value: Tensor
    """(b, c, *spatial)"""


class Memory:
    """A tensor that lasts from one call of a run to the next.

    Which samples begin a run is decided on the device. A sample whose tensor is not finite begins one too. No gradient flows from
    one call to the next.

    >>> memory = Memory()
    >>> memory.keep(torch.tensor([2.0, 2.0]), torch.ones(2, 1, 1, 1))
    >>> memory.last(torch.tensor([1.0, 9.0]), torch.zeros(2, 1, 1, 1)).flatten()
    tensor([1., 0.])
    """

    def __init__(self) -> None:
        self._kept: Kept | None = None

    def last(self, sigma: Tensor, like: Tensor, with_sigma: bool = False) -> Tensor:
        """The tensor that the last call kept, shaped as `like`; zeros for each sample that begins a run at `sigma`, (b,).

        `with_sigma` scales it by this sigma over the last one: a difference of denoised latents then stays the same
        difference of noise predictions.
        """
        kept = self._kept
        if kept is None or (kept.value.shape, kept.value.dtype, kept.value.device) != (like.shape, like.dtype, like.device):
            return torch.zeros_like(like)
        finite = (kept.value.flatten(1) * 0).sum(dim=1) == 0  # as isfinite().all(dim=1), in half as many kernels
        goes_on, value = (sigma <= kept.limit) & finite, kept.value
        if with_sigma:
            ratio = RISE * sigma / kept.limit.clamp(min=torch.finfo(kept.limit.dtype).tiny)  # sigma may be 0
            value = value * per_sample(ratio, value).to(value.dtype)
        return torch.where(per_sample(goes_on, value), value, 0)

    def keep(self, sigma: Tensor, value: Tensor) -> None:
        """Keeps `value`, (b, c, *spatial), of a call at `sigma`, (b,), for the next call."""
        self._kept = Kept(RISE * sigma.detach(), value.detach().clone())  # the model may write to it again

    def clear(self) -> None:
        self._kept = None


class Counter:
    """Counts the calls of a run, for each sample.

    >>> counter = Counter()
    >>> [counter.count([sigma], [True], ()) for sigma in (9.0, 3.0, 4.0, 9.0)]
    [[0], [1], [2], [0]]
    """

    def __init__(self) -> None:
        self._last: tuple[tuple[Any, ...], list[float], list[int | None]] | None = None

    def count(self, sigmas: Sequence[float], inside: Sequence[bool], form: tuple[Any, ...]) -> list[int | None]:
        """How many calls of its run came before this one, for each sample; None for a sample outside the sigma_range.

        Args:
            sigmas: the noise level of each sample.
            inside: whether the direction acts on each sample.
            form: the latent's shape, dtype and device.
        """
        before: list[int | None] = [None] * len(sigmas)
        if self._last is not None and self._last[0] == form:
            before = [n if s <= RISE * last else None for s, last, n in zip(sigmas, self._last[1], self._last[2], strict=True)]
        now = [(0 if n is None else n + 1) if within else None for n, within in zip(before, inside, strict=True)]
        self._last = form, list(sigmas), now
        return now

    def clear(self) -> None:
        self._last = None


class Track:
    """What one direction keeps in one run."""

    def __init__(self, form: tuple[Any, ...] = ()) -> None:
        self.form = form
        """The settings that a kept tensor depends on: another `every`, say, begins again."""
        self.direction, self.own, self.counter = Memory(), Memory(), Counter()

    def clear(self) -> None:
        self.direction.clear()
        self.own.clear()
        self.counter.clear()


class RunState:
    """What all directions and the `cfg_rule` of a wrapper keep in one run."""

    def __init__(self, directions: Sequence[Any]) -> None:
        self.tracks = [Track(direction.form) for direction in directions]
        self._rules: tuple[Any, Any] = (None, None)
        self._rule_settings: list[Any] = []
        self._sigma: float | None = None

    def rule(self, rule: Any) -> Any:
        """The run's own copy of a `cfg_rule` that keeps something between calls, which is one with a `reset` method."""
        if not hasattr(rule, "reset"):
            return rule
        settings = list(getattr(rule, "__dict__", {}).values())
        if self._rules[0] is not rule or list(map(id, settings)) != list(map(id, self._rule_settings)):
            self._rules, self._rule_settings = (rule, copy.deepcopy(rule)), settings
            self._rules[1].reset()
        return self._rules[1]

    def begins(self, sigma: Tensor) -> bool:
        """Whether `sigma`, (b,), starts a run, as far as can be seen without waiting for a GPU."""
        if torch.compiler.is_dynamo_compiling() or sigma.device.type != "cpu" or type(sigma) is not Tensor:
            return False
        before, self._sigma = self._sigma, float(sigma.detach().max())
        return before is None or not self._sigma <= RISE * before

    def clear(self) -> None:
        for track in self.tracks:
            track.clear()
        if self._rules[1] is not None:
            self._rules[1].reset()
        self._sigma = None


@contextlib.contextmanager
def ended_by_errors(clear: Callable[[], None]) -> Iterator[None]:
    """Calls `clear` if the block is left by an error, Ctrl-C included: a call that is half done cannot be continued."""
    try:
        yield
    except BaseException:
        clear()
        raise

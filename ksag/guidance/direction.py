"""The common part of all directions. Each has its own file in this folder.

A direction compares the model's prediction with a degraded prediction of the same model. A new one is a class with one or two
methods: `ask` says which further predictions it needs in the shared batch, and `direction` turns predictions into a tensor.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from ksag.attention.visit import Formula
from ksag.guidance.runs import Memory, only
from ksag.model import parameters
from ksag.model.conditioning import Conditioning
from ksag.model.module_edit import Replace

Layers = str | nn.Module | Sequence[str | nn.Module]
"""Attention layers, as `attention=` names them: one, or a list of them."""


class Ask(NamedTuple):
    """A prediction that a direction asks for in the shared batch."""

    x: Tensor
    """(b, c, *spatial) noisy latent."""
    cond: Conditioning
    """Its conditioning: usually `call.cond` or `call.uncond`."""
    attention: Formula | None = None
    """Replaces the output of the direction's attention layers for these rows: `ksag.guidance.pag.identity`, say. With CUDA
    graphs, pass the same function, or an equal object, at each call."""
    output: Replace | None = None
    """Replaces the output of the direction's `modules` for these rows: (args, kwargs, output) → the new output."""


class Call:
    """One guided call, as one direction sees it."""

    def __init__(
        self,
        x: Tensor,
        sigma: Tensor,
        cond: Conditioning,
        uncond: Conditioning,
        denoise: Callable[[Tensor], Tensor],
        memory: Memory,
        inside: bool | Tensor,
        options: Mapping[str, Any],
    ):
        self.x, self.sigma = x, sigma
        """Noisy latent, (b, c, *spatial), and noise levels, (b,)."""
        self.cond, self.uncond = cond, uncond
        """The conditionings of g and of u; the same if the call has no uncond."""
        self.options = options
        """The direction's settings, or those that this call gave in their place."""
        self.denoise = denoise
        """Asks the model once more, under `uncond`: noisy latent → denoised latent. It may overwrite u, g, the answers and what an
        earlier `denoise` returned."""
        self.u = self.g = x
        """The predictions for uncond and cond, (b, c, *spatial), once they are there."""
        self.saliency: Any = None
        """(b, *grid): how much attention each token of the direction's layer received while u was computed; the mean is 1. None
        unless the direction has `reads_attention = True`."""
        self.inside = inside
        """Whether the direction acts, or on which samples, (b,)."""
        self._memory = memory
        self._last: Tensor | None = None
        self.parts: dict[str, Tensor] = {}

    def last(self, like: Tensor) -> Tensor:
        """The tensor that this direction passed to `remember` at the run's last call; zeros for samples that begin a run. Call it
        before `remember`."""
        if self._last is None or (self._last.shape, self._last.dtype) != (like.shape, like.dtype):
            self._last = self._memory.last(self.sigma, like)
        return self._last

    def remember(self, value: Tensor) -> None:
        """Keeps a tensor (b, c, *spatial) for the run's next call."""
        self._memory.keep(self.sigma, only(self.inside, value))

    def keep(self, **parts: Tensor) -> None:
        """Names tensors that `guided.trace()` shows."""
        self.parts.update(parts)


class Setting:
    """An attribute that is checked when it is assigned."""

    def __init__(self, check: Callable[[Any], Any]):
        self.check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self.kept_as = f"_{name}"

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else getattr(instance, self.kept_as)

    def __set__(self, instance: Any, value: Any) -> None:
        setattr(instance, self.kept_as, self.check(value))


class Direction:
    """One way to guide.

    Args:
        scale: strength, or a tensor with one for each sample, (b,); 0 leaves the direction out, at no cost.
        attention: the self-attention layers that it reads or changes, as `ksag.list_attention` names them.
        modules: further modules whose output it changes, by path.
        sigma_range: (lowest, highest) sigma at which it acts on a sample. Reads sigma from the device once a call if set.
        every: compute the direction every n-th call of a run and reuse it, as a difference of noise predictions. Reads
            sigma from the device once a call if more than 1.

    Raises:
        ValueError: a setting out of its range.
    """

    name: ClassVar[str] = "direction"
    """How traces and messages call it."""
    keywords: ClassVar[Mapping[str, str]] = {}
    """Keywords of a call, or of a sampler's extra_args → the settings that they replace for that call."""
    shown: ClassVar[tuple[str, ...]] = ("scale", "attention", "sigma_range", "every")
    """The settings that its repr has."""
    reads_attention: ClassVar[bool] = False
    """Whether it uses `call.saliency`."""
    scale = Setting(parameters.scale)
    sigma_range = Setting(parameters.sigma_range)
    every = Setting(parameters.every)

    def __init__(
        self,
        scale: float | Tensor = 1.0,
        attention: Layers = (),
        *,
        modules: Sequence[str] = (),
        sigma_range: tuple[float, float] = (0.0, math.inf),
        every: int = 1,
    ):
        self.scale, self.sigma_range, self.every = scale, sigma_range, every
        self._attention, self.modules = attention, tuple(modules)
        if self.reads_attention and len(self.layers) != 1:
            raise ValueError(f"{self.name} reads the attention of one layer, got attention={attention!r}: name one.")

    @property
    def attention(self) -> Layers:
        """The layers, which cannot be changed later: a wrapper sets its hooks on them when it is made."""
        return self._attention

    @property
    def layers(self) -> tuple[str | nn.Module, ...]:
        layers = self._attention
        return tuple(layers) if isinstance(layers, Sequence) and not isinstance(layers, str) else (layers,)

    @property
    def lag(self) -> int:
        """How many calls of a run it looks ahead: 1 if `look` has to run one call before `ask`."""
        return 0

    @property
    def form(self) -> tuple[Any, ...]:
        """The settings that its kept tensors depend on."""
        return self.every, self.lag

    def check_latent(self, x: Tensor) -> str | None:
        """Raises a ValueError for a latent that it cannot guide; returns a warning if it would change nothing."""
        return None

    def ask(self, call: Call) -> Sequence[Ask]:
        """The predictions that it needs in the shared batch. `call.u` and `call.g` are not there yet."""
        return ()

    def look(self, call: Call) -> None:
        """Runs one call before `ask`, if `lag` is 1; a tensor that it passes to `call.remember` is available at the next call."""

    def direction(self, call: Call, answers: Sequence[Tensor]) -> Tensor:
        """(b, c, *spatial): away from the degraded prediction, given the predictions that `ask` asked for."""
        raise NotImplementedError

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.shown)
        return f"{self.name}({settings})"

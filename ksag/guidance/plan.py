"""What one direction does in one call of a run: whether it acts, computes, or reuses what it computed before."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ksag.attention.tap import AttentionTap
from ksag.guidance.direction import Ask, Call, Direction
from ksag.guidance.runs import Track, only, per_sample
from ksag.guidance.trace import Trace, TraceStep, on_cpu
from ksag.model import checks
from ksag.model.module_edit import ModuleTap
from ksag.model.passes import Found, Part

Taps = tuple[list[AttentionTap], list[ModuleTap]]
"""A direction's hooks: on its attention layers, and on its modules."""


class Plan:
    """One acting direction in one call."""

    def __init__(self, direction: Direction, track: Track, taps: Taps, call: Call, strength: float | Tensor):
        self.direction, self.track, self.taps, self.call, self.strength = direction, track, taps, call, strength
        self.due: bool | Tensor = True
        """Whether it computes its direction, or for which samples, (b,)."""
        self.looks = False
        """Whether it looks ahead to the next call."""
        if track.form != direction.form:
            track.clear()
            track.form = direction.form
        if direction.every > 1:
            self._count()

    def _count(self) -> None:
        every, lag, x, sigma = self.direction.every, self.direction.lag, self.call.x, self.call.sigma
        inside = self.call.inside.tolist() if isinstance(self.call.inside, Tensor) else [True] * len(x)
        numbers = self.track.counter.count(sigma.tolist(), inside, (x.shape, x.dtype, x.device))
        due = [n is not None and (n - lag) % every == 0 for n in numbers]
        self.looks = lag > 0 and any(n is not None and n % every == 0 for n in numbers)
        self.due = any(due) if all(due) or not any(due) else torch.tensor(due, device=x.device)

    @property
    def computes(self) -> bool:
        return self.due is not False

    @property
    def reads(self) -> tuple[AttentionTap, ...]:
        """The tap whose saliency it needs at this call, if any."""
        return (self.taps[0][0],) if self.direction.reads_attention and (self.computes or self.looks) else ()

    def ask(self) -> list[Part]:
        """The predictions that it needs in the shared batch."""
        return [self._part(ask) for ask in self.direction.ask(self.call)] if self.computes else []

    def _part(self, ask: Ask) -> Part:
        attention, modules = self.taps
        for name, formula, where in ("attention", ask.attention, attention), ("modules", ask.output, modules):
            if formula is not None and not where:
                raise ValueError(f"{self.direction.name} has nothing to change in the model: give it {name}= when it is made.")
        edits: list[tuple[Any, Any]] = [(tap, ask.attention) for tap in attention if ask.attention is not None]
        edits += [(tap, ask.output) for tap in modules if ask.output is not None]
        return Part(ask.x, ask.cond, tuple(edits))

    def compute(self, u: Tensor, g: Tensor, saliency: Found, answers: Sequence[Tensor], traces: Sequence[Trace]) -> Tensor:
        """The direction, (b, c, *spatial), from the predictions: computed now, or by an earlier call."""
        direction = self._compute(u, g, saliency, answers)
        if self.computes:
            for steps in traces:
                steps.append(self._step(direction))
        return direction

    def _compute(self, u: Tensor, g: Tensor, saliency: Found, answers: Sequence[Tensor]) -> Tensor:
        self.call.u, self.call.g = u, g
        self.call.saliency = saliency.get(self.reads[0]) if self.reads else None
        value = None
        if self.computes:
            value = checks.direction(self.direction.direction(self.call, answers), u, self.direction.name)
        elif self.looks:
            self.direction.look(self.call)
        if value is not None and self.direction.every == 1:
            return only(self.call.inside, value)
        kept = self.track.direction.last(self.call.sigma, u, with_sigma=True)
        if value is None:
            value = kept
        elif isinstance(self.due, Tensor):
            value = torch.where(per_sample(self.due, value), value, kept)
        value = only(self.call.inside, value)
        self.track.direction.keep(self.call.sigma, value)
        return value

    def _step(self, direction: Tensor) -> TraceStep:
        """What a trace keeps of it."""
        call = self.call
        parts = {name: on_cpu(part) for name, part in call.parts.items()}
        return TraceStep(self.direction.name, on_cpu(call.sigma), on_cpu(call.u), on_cpu(call.g), on_cpu(direction), parts)


def make_plan(direction: Direction, track: Track, taps: Taps, call: Callable[..., Call], given: Mapping[str, Any]) -> Plan | None:
    """What a direction does in a call, or None if its scale is 0 or no sample is inside its `sigma_range`, which ends its run.

    Args:
        direction: its settings.
        track: what it kept so far.
        taps: its hooks.
        call: makes its `Call`, from what is missing.
        given: settings of this call, which replace the direction's, by keyword.
    """
    options = {name: getattr(direction, name) for name in ("scale", *direction.keywords.values())}
    for word, name in direction.keywords.items():
        if word in given:
            check = getattr(getattr(type(direction), name, None), "check", None)  # a plain attribute has none
            options[name] = check(given[word]) if check else given[word]
    if not isinstance(options["scale"], Tensor) and options["scale"] == 0:
        track.clear()
        return None
    made = call(memory=track.own, inside=True, options=options)
    inside = made.inside = _inside(direction.sigma_range, made.sigma)
    if inside is False:
        track.clear()
        return None
    _warn(direction, taps, made.x)
    strength = checks.for_each_sample(f"{direction.name.lower()}_scale", options["scale"], made.x)
    return Plan(direction, track, taps, made, strength)


def _inside(sigma_range: tuple[float, float], sigma: Tensor) -> bool | Tensor:
    low, high = sigma_range
    if (low, high) == (0.0, math.inf):
        return True
    inside = (low <= sigma) & (sigma <= high)
    return inside if bool(inside.any()) else False


def _warn(direction: Direction, taps: Taps, x: Tensor) -> None:
    message = direction.check_latent(x)
    if message is None and any(tap.layer.training for tap in taps[0]):
        message = "inner_model is in train mode, so that its dropout, if it has any, is active: call inner_model.eval()."
    if message and not torch.compiler.is_dynamo_compiling():
        warnings.warn(message, stacklevel=7)  # at the call of the wrapper

"""How the model is called: what is batched, read, changed, and replayed as a graph."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ksag.model import checks, compiled
from ksag.model.conditioning import Conditioning, join, joinable, repeat, unshared
from ksag.model.graphs import CUDAGraphs


class Tap(Protocol):
    """Hooks on a part of the model that can be told about a pass; see `ksag.attention.tap` and `ksag.model.module_edit`."""

    @property
    def to_check(self) -> bool: ...

    def visit(self, read: int, edits: Sequence[tuple[int, int, Callable[..., Any]]], dims: int) -> Any: ...

    def begin_call(self) -> None: ...

    def begin(self, visit: Any) -> None: ...

    def end(self, visit: Any) -> None: ...

    def is_compiled(self, inner_model: nn.Module) -> bool: ...


class Part(NamedTuple):
    """A prediction that the model is asked for."""

    x: Tensor
    """(b, c, *spatial) noisy latent."""
    cond: Conditioning
    edits: tuple[tuple[Tap, Callable[..., Any]], ...] = ()
    """What is changed while its rows are computed: (tap, formula)."""


Found = dict[Tap, Tensor]
"""Saliency, (b, *grid), by the tap that read it."""


class Pass:
    """One call of the model, with one or more parts in its batch.

    Args:
        inner_model, cond_key, shared: as for `Passes`.
        edits: for each part, what is changed.
        reads: the taps that read the first part.
    """

    def __init__(
        self,
        inner_model: nn.Module,
        cond_key: str | None,
        shared: Sequence[str],
        edits: Sequence[tuple[tuple[Tap, Callable[..., Any]], ...]],
        reads: Sequence[Tap],
    ):
        self.inner_model, self.cond_key, self.shared, self.edits, self.reads = inner_model, cond_key, shared, edits, reads
        self.taps = list(dict.fromkeys([*reads, *(tap for of_part in edits for tap, _ in of_part)]))

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for two passes that do the same."""
        return self.inner_model, self.cond_key, self.shared, tuple(self.edits), tuple(self.reads)

    def visits(self, b: int, dims: int) -> list[tuple[Tap, Any]]:
        """The task of each tap in the rows of each part."""
        found = []
        for tap in self.taps:
            edits = [(i * b, (i + 1) * b, f) for i, of_part in enumerate(self.edits) for edited, f in of_part if edited is tap]
            found.append((tap, tap.visit(b if tap in self.reads else 0, edits, dims)))
        return found

    def __call__(
        self, sigma: Tensor, latents: Sequence[Tensor], conds: Sequence[Conditioning], kwargs: dict[str, Any]
    ) -> tuple[Tensor, list[Tensor]]:
        """The denoised latents of all parts, and the saliency that each of `reads` found in the first."""
        b, n, dims = sigma.shape[0], len(latents), latents[0].ndim - 2
        x, cond = latents[0], conds[0]
        if n > 1:
            x, sigma, cond = torch.cat(list(latents)), torch.cat([sigma] * n), join(*conds)
            kwargs = repeat(kwargs, b, n, self.shared)
        visits = self.visits(b, dims)
        try:
            for tap, visit in visits:
                tap.begin(visit)
            denoised = self.denoise(x, sigma, cond, kwargs)
        finally:
            for tap, visit in visits:
                tap.end(visit)
        for _, visit in visits:
            visit.finish()
        return denoised, [visit.saliency() for tap, visit in visits if tap in self.reads]

    def denoise(self, x: Tensor, sigma: Tensor, cond: Conditioning, kwargs: dict[str, Any]) -> Tensor:
        conditioning = {} if cond is None else cond if self.cond_key is None else {self.cond_key: cond}
        # with containers of its own, because some models pop from the lists they are given
        return checks.denoised(self.inner_model(x, sigma, **unshared(conditioning), **unshared(kwargs)), x)


class Passes:
    """Asks a model for several predictions at once: in one batch if their conditionings can be batched.

    Args:
        taps: all hooks on the model.
    """

    def __init__(self, taps: Sequence[Tap]):
        self.taps = taps
        self.graphs: CUDAGraphs | None = None

    def __call__(
        self,
        inner_model: nn.Module,
        parts: Sequence[Part],
        sigma: Tensor,
        kwargs: dict[str, Any],
        *,
        cond_key: str | None,
        batched: bool = True,
        shared: Sequence[str] = (),
        reads: Sequence[Tap] = (),
        keep: bool = False,
    ) -> tuple[list[Tensor], Found]:
        """The predictions, in order, and the saliency that each of `reads` found in the first.

        Args:
            inner_model: the model.
            parts: at least one.
            sigma: (b,) noise levels of each part.
            kwargs: what else goes to every call, for b samples.
            cond_key: the keyword for the conditioning; None if it is keywords itself.
            batched: False evaluates the parts one after the other.
            shared: names of `kwargs` that all samples share.
            reads: the taps that read the first part.
            keep: whether the predictions have to outlive the next call, which may overwrite them.
        """
        predictions: dict[int, Tensor] = {}
        found: Found = {}
        for tap in dict.fromkeys([*reads, *(tap for part in parts for tap, _ in part.edits)]):
            tap.begin_call()
        for group in _groups([part.cond for part in parts]) if batched else [[i] for i in range(len(parts))]:
            latents, conds, edits = zip(*(parts[i] for i in group), strict=True)
            model_pass = Pass(inner_model, cond_key, shared, edits, reads if 0 in group else ())
            denoised, maps = self._ask(model_pass, sigma, latents, conds, kwargs)
            if keep or self.graphs is not None or len(group) < len(parts):  # the next pass may overwrite them
                denoised, maps = denoised.clone(), [t.clone() for t in maps]
            found.update(zip(model_pass.reads, maps, strict=True))
            predictions.update(zip(group, denoised.chunk(len(group)), strict=True))
        return [predictions[i] for i in range(len(parts))], found

    def _ask(self, model_pass: Pass, *args: Any) -> tuple[Tensor, list[Tensor]]:
        to_check = any(tap.to_check for tap in model_pass.taps)
        is_compiled = any(tap.is_compiled(model_pass.inner_model) for tap in self.taps)
        with compiled.one_at_a_time(to_check or is_compiled):
            if self.graphs is None or to_check:
                with compiled.eagerly(to_check):
                    answer = model_pass(*args)
            if self.graphs is None:
                return answer
            return self.graphs(model_pass, *args, key=model_pass.key)  # type: ignore[no-any-return]


def _groups(conds: Sequence[Conditioning]) -> list[list[int]]:
    """The numbers of the parts, those together that can be batched."""
    groups: list[list[int]] = []
    for i, cond in enumerate(conds):
        for group in groups:
            if joinable(conds[group[0]], cond):
                group.append(i)
                break
        else:
            groups.append([i])
    return groups

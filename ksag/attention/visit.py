"""One pass of the model through a layer: which rows of the batch are read, which are changed, and what was seen so far."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ksag.attention.families import Attention, Family, Seen, sdpa
from ksag.attention.families.family import Grid, resolve

Formula: TypeAlias = Callable[[Attention], Tensor]
"""What some rows attended with (the image's queries, all keys) → their new attention output, (b, heads, tokens, dim)."""


class Edit(NamedTuple):
    """Rows of the batch whose attention output is replaced by a formula's."""

    start: int
    stop: int
    formula: Formula


class Visit:
    """The task of a layer in one pass, and what was seen of it so far.

    Args:
        path: the layer's, for messages.
        read: the first rows of the batch, whose saliency is wanted.
        edits: the rows that are changed.
        dims: the number of spatial dimensions of the latent.
    """

    def __init__(self, path: str, read: int = 0, edits: Sequence[Edit] = (), dims: int = 2):
        self.path, self.read, self.edits, self.dims = path, read, tuple(edits), dims
        self.total = max([read, *(edit.stop for edit in self.edits)])
        self.done = 0
        """How many rows have gone through the layer. A model may send its batch through in several pieces."""
        self.maps: list[Tensor] = []
        """A saliency map (b, *grid) for each piece."""

        self.batch: int | None = None
        """b of the nearest spatial input."""
        self.spatial: Grid | None = None
        """Its sides."""
        self.patch: Grid = ()
        """The sides of its patches that are the tokens."""
        self.tokens: int | None = None
        """The number of the image's tokens, if a module around the layer is given these instead of the latent."""
        self.embedded = False
        """Whether the module that makes tokens of the latent was called."""
        self.sized = True
        """Whether the size of the tokens' patches is known, if they are patches."""

        self.before: tuple[int, int] | None = None
        """How many rows and maps there were before a call of the layer that has not returned yet."""
        self.started = False
        """Whether the layer has begun to attend, and not yet ended."""
        self.seen: Seen = {}
        """What its submodules have returned or been given since."""
        self.checking = False
        """Whether that is checked against what the layer applied."""
        self.through_sdpa = False
        """The checker's, as the layer began: another thread may run the layer in another way meanwhile."""
        self.kept: list[tuple[Tensor, Tensor]] = []
        """For the check: each tensor seen as it was then, and as it is now."""
        self.unread = ""
        """Why the layer ran without being read, if that is known."""
        self.watch: sdpa.WatchSDPA | None = None
        """What sees the layer's call of scaled_dot_product_attention, if that is needed."""

    def begin_layer(self) -> None:
        """The layer is called. If its last call did not return, a model has caught an error and tries again: that call was none."""
        if self.before is not None:
            self.done, maps = self.before
            del self.maps[maps:]
        self.before = self.done, len(self.maps)

    def stop(self) -> None:
        """The layer has attended, or never will."""
        self.seen, self.kept = {}, []
        self.started = self.checking = False
        if self.watch is not None:
            self.watch.close()
            self.watch = None

    @property
    def missing(self) -> int:
        """How many rows have not gone through the layer yet."""
        return self.total - self.done

    def enter(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], family: Family | None) -> None:
        """A module around the layer is called, from the outermost inwards: what it is given may be the latent, or its tokens."""
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        patch = next((size for size in (resolve(module, name) for name in family.patch) if size), None) if family else None
        if patch is not None:
            if isinstance(patch, int):  # of height and width; time has its own
                patch = (resolve(module, "config.patch_size_t") or 1, patch, patch) if self.dims == 3 else (patch,) * self.dims
            self.patch = tuple(patch)[-self.dims :]
        if family is not None and family.packed and hasattr(module, "config"):
            first, *others = (kwargs.get(name) for name in family.packed)
            inputs = [x for x in (args[0] if first is None and args else first, *others) if isinstance(x, Tensor)]
            if inputs and inputs[0].ndim == 3 and self.dims > 1:
                self.batch, self.tokens = inputs[0].shape[0], sum(x.shape[1] for x in inputs)
                self.embedded = self.sized = True
                return
        # Inside the module that makes tokens of the latent, (b, 1, tokens, tokens) is a mask. (b, c, n) looks like a sequence of
        # tokens, so that of a latent of one dimension the outermost one counts.
        elif patch is None and (self.embedded or (self.dims == 1 and self.spatial is not None)):
            return
        self.embedded = self.embedded or patch is not None
        self.sized = self.embedded or family is None or not family.patch
        for value in inputs:
            if value.ndim == self.dims + 2:
                self.batch, self.spatial, self.tokens = value.shape[0], tuple(value.shape[2:]), None
                break

    @property
    def grid(self) -> Grid | None:
        """The sides of the nearest spatial input, or of its patches that are tokens; None if these cannot be its patches."""
        if self.spatial is None:
            return None
        if self.tokens is not None:
            return sdpa.patches(self.spatial, self.tokens)
        return tuple(side // patch for side, patch in zip(self.spatial, self.patch or (1,) * self.dims, strict=True))

    def part(self, start: int, stop: int, rows: int) -> slice | None:
        """Which of the `rows` now in the layer are rows `start` to `stop` of the batch; None if none are."""
        start, stop = max(start - self.done, 0), min(stop - self.done, rows)
        return slice(start, stop) if start < stop else None

    def finish(self) -> None:
        """Raises a RuntimeError if the layer did not run for all rows."""
        if self.missing > 0:
            raise RuntimeError(
                f"{self.path!r} ran for {self.done} of {self.total} samples while inner_model ran, so there is nothing to "
                f"guide by. {self.unread or 'Check that the layer is part of this forward.'} If the model was compiled or its "
                f"attention replaced after it was wrapped, wrap it again, and compile afterwards."
            )

    def saliency(self) -> Tensor:
        """(read, *grid): how much attention each of the layer's image tokens received; the mean is 1."""
        self.finish()
        return torch.cat(self.maps) if len(self.maps) > 1 else self.maps[0]

"""One pass of the model through a layer: which rows of the batch are read, which are changed, and what was seen so far."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ksag.attention.families import Attention, Seen, sdpa
from ksag.attention.families.family import Grid

Formula: TypeAlias = Callable[[Attention], Tensor]
"""What some rows attended with (the image's queries, all keys) → their new attention output, (b, heads, tokens, dim)."""


class Edit(NamedTuple):
    """Rows of the batch whose attention output is replaced by a formula's."""

    start: int
    stop: int
    formula: Formula


class Visit:
    """What one pass asks of a layer, and what the layer has shown so far.

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

        self.started = False
        """Whether the layer has begun to attend, and not yet ended."""
        self.seen: Seen = {}
        """What its submodules have returned or been given since."""
        self.checking = False
        """Whether that is checked against what the layer applied."""
        self.kept: list[tuple[Tensor, Tensor]] = []
        """For the check: each tensor seen as it was then, and as it is now."""
        self.watch: sdpa.WatchSDPA | None = None
        """What sees the layer's call of scaled_dot_product_attention, if that is needed."""

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

    @property
    def grid(self) -> Grid | None:
        """The sides of the nearest spatial input, or of its patches that are tokens."""
        if self.spatial is None or not self.patch:
            return self.spatial
        return tuple(side // patch for side, patch in zip(self.spatial, self.patch, strict=True))

    def part(self, start: int, stop: int, rows: int) -> slice | None:
        """Which of the `rows` now in the layer are rows `start` to `stop` of the batch; None if none are."""
        start, stop = max(start - self.done, 0), min(stop - self.done, rows)
        return slice(start, stop) if start < stop else None

    def finish(self) -> None:
        """Raises a RuntimeError if the layer did not run for all rows."""
        if self.missing > 0:
            raise RuntimeError(
                f"{self.path!r} ran for {self.done} of {self.total} samples while inner_model ran, so there is nothing to guide "
                f"by. Check that the layer is part of this forward, that its own projections are used, and that its attention goes "
                f"through PyTorch (not xformers or flash-attn). If the model was compiled or its attention replaced after it was "
                f"wrapped, wrap it again, and compile afterwards."
            )

    def saliency(self) -> Tensor:
        """(read, *grid): how much attention each of the layer's image tokens received; the mean is 1."""
        self.finish()
        return torch.cat(self.maps) if len(self.maps) > 1 else self.maps[0]

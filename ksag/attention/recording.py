"""What a tap has seen of one pass of the model."""

import torch
from torch import Tensor

from ksag.attention.families import Seen, sdpa


class Recording:
    """What a tap has seen so far of the first `rows` samples that went through the layer."""

    def __init__(self, rows: int, path: str):
        self.rows = rows
        self.path = path
        self.maps: list[Tensor] = []
        """A saliency map, (b, h', w'), for each time that the layer ran."""

        self.batch: int | None = None
        """b of the nearest spatial input."""
        self.spatial: tuple[int, int] | None = None
        """(h, w) of that."""
        self.patch: tuple[int, int] = (1, 1)
        """The size of its patches that are the tokens."""

        self.started = False
        """Whether the layer has begun to attend, and not yet ended."""
        self.seen: Seen = {}
        """What its parts have returned or been given since."""
        self.checking = False
        """Whether that is to be checked."""
        self.kept: list[tuple[Tensor, Tensor]] = []
        """For the check: each tensor seen as it was then, and as it is now."""
        self.watch: sdpa.WatchSDPA | None = None
        """What sees the layer's call of scaled_dot_product_attention, where that is asked for."""

    def stop(self) -> None:
        """The layer has attended, or never will."""
        self.seen, self.kept = {}, []
        self.started = self.checking = False
        if self.watch is not None:
            self.watch.close()
            self.watch = None

    @property
    def grid(self) -> tuple[int, int] | None:
        """(h', w') of the nearest spatial input, or of the patches of it that are tokens."""
        return self.spatial and (self.spatial[0] // self.patch[0], self.spatial[1] // self.patch[1])

    @property
    def missing(self) -> int:
        """How many samples have not gone through the layer yet."""
        return self.rows - sum(m.shape[0] for m in self.maps)

    def saliency(self) -> Tensor:
        """(rows, h', w'): how much attention each of the layer's tokens received."""
        if self.missing:
            raise RuntimeError(
                f"{self.path!r} ran for {self.rows - self.missing} of the latent's {self.rows} samples while inner_model ran, so "
                f"there is nothing to guide by. Is the layer part of this forward, and are its own projections used? Was the model "
                f"compiled before it was wrapped, or its attention replaced since? Then wrap it anew, and compile afterwards."
            )
        return torch.cat(self.maps) if len(self.maps) > 1 else self.maps[0]

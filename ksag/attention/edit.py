"""A layer has attended: what it read becomes a saliency map, and some rows of its output are replaced."""

import math
from collections.abc import Callable

from einops import rearrange
from torch import Tensor

from ksag.attention.families.family import Attention, Grid
from ksag.attention.saliency import saliency
from ksag.attention.visit import Visit


def with_grid(visit: Visit, read: Attention) -> Attention:
    """`read` with the grid of its image tokens, which may be that of the layer's nearest spatial input.

    Raises:
        ValueError: there is no such grid, so this is no self-attention over the image.
    """
    queries, keys = read.q.shape[2], read.k.shape[2]
    grid = read.grid or visit.grid
    if visit.dims == 1 and read.grid is None and read.tokens == "all":
        grid = (queries,)
    tokens = math.prod(grid or ())
    fits = queries == keys == tokens if read.tokens == "all" else tokens <= min(queries, keys)
    if grid is None or not fits:
        raise ValueError(
            f"{visit.path!r} attends from {queries} to {keys} tokens, which does not match its input's grid of {grid}: it is no "
            f"self-attention over the image. Name another layer; ksag.list_attention shows them."
        )
    return read._replace(grid=grid)


def merged(output: Tensor, pattern: str, grid: Grid | None) -> Tensor:
    """A formula's output, (b, heads, tokens, dim), as the layer gives its own to its output projection."""
    assert grid is not None
    if "(h w)" not in pattern:
        return rearrange(output, pattern)
    return rearrange(output, pattern, h=grid[0], w=grid[1])


def attended(visit: Visit, read: Attention, change: Callable[[slice, Tensor], None]) -> None:
    """Keeps the saliency of the rows that are read, and calls `change(rows, new output)` for those that are changed."""
    rows = read.q.shape[0]
    if (part := visit.part(0, visit.read, rows)) is not None:
        own = read.rows(part).detach()
        visit.maps.append(_saliency(own).unflatten(1, own.grid))
    for edit in visit.edits:
        if (part := visit.part(edit.start, edit.stop, rows)) is not None:
            change(part, edit.formula(read.rows(part).image_queries))
    visit.done += rows


def _saliency(read: Attention) -> Tensor:
    if read.tokens == "all":
        return saliency(read.q, read.k, read.scale, mask=read.mask)
    queries = read.image_queries
    return saliency(queries.q, read.k, read.scale, read.of_image(read.k.shape[2]), queries.mask)

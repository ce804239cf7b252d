"""A layer has attended: what it read becomes a saliency map, and some rows of its output are replaced."""

import math
from collections.abc import Callable
from dataclasses import replace

from einops import rearrange
from torch import Tensor

from ksag.attention.families.family import Attention, Grid
from ksag.attention.saliency import saliency
from ksag.attention.visit import Visit


def with_grid(visit: Visit, read: Attention) -> Attention:
    """`read` with the grid of its image tokens, which may be the grid of the layer's nearest spatial input.

    Raises:
        ValueError: there is no such grid, so this is no self-attention over the image.
    """
    queries, keys = read.q.shape[2], read.k.shape[2]
    grid = read.grid or visit.grid
    if visit.dims == 1 and read.grid is None and read.tokens == "all":
        grid = (queries,)
    tokens = math.prod(grid or ())
    fits = queries == keys == tokens if read.tokens == "all" else tokens <= min(queries, keys) and visit.sized
    if grid is not None and fits:
        return replace(read, grid=grid)
    raise ValueError(f"{visit.path!r} attends from {queries} to {keys} tokens, {_misfit(visit, read, grid)}")


def _misfit(visit: Visit, read: Attention, grid: Grid | None) -> str:
    if grid is None and visit.tokens is not None:
        return (
            f"and the model around it was given {visit.tokens} image tokens, which cannot be the patches of a latent of "
            f"{visit.spatial}. Tokens of reference images are not supported."
        )
    if read.tokens != "all" and not visit.sized:
        return (
            "text and image, but nothing around it says how large the image's patches are. Give the module that is called with "
            "the latent an attribute patch_size."
        )
    return (
        f"which does not match its input's grid of {grid}: it is no self-attention over the image. Name another layer; "
        f"ksag.list_attention shows them."
    )


def replace_merged(output: Tensor, new: Tensor, pattern: str, read: Attention) -> None:
    """Replaces the image's part of what a layer gives to its output projection, in place.

    Args:
        output: of some samples, merged by `pattern`; it may hold the text's tokens too.
        new: a formula's output, (b, heads, tokens, dim).
        pattern: einops pattern.
        read: what these samples attended with.
    """
    assert read.grid is not None
    sides = dict(zip("hw", read.grid, strict=True)) if "(h w)" in pattern else {}
    new = rearrange(new, pattern, **sides)
    part = output if output.shape == new.shape else output[:, read.of_image(output.shape[1])]
    part.copy_(new)


def replace_by_head(output: Tensor, new: Tensor, read: Attention) -> None:
    """Likewise of what scaled_dot_product_attention returned, (b, heads, tokens, dim)."""
    image = read.of_image(output.shape[2])
    if read.places is None:
        output[:, :, image] = new.to(output.dtype)
    else:
        output.scatter_(2, read.places[:, None, image, None].expand(new.shape), new.to(output.dtype))


def attended(visit: Visit, read: Attention, change: Callable[[slice, Tensor], None]) -> None:
    """Keeps the saliency of the rows that are read, and calls `change(rows, new output)` for the rows that are changed."""
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

"""cond and uncond, in any nesting of dicts, lists and tuples of tensors ↔ one batch."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

Conditioning: TypeAlias = Any
"""A tensor, batch first, or any nesting of dicts, lists and tuples of such tensors."""


def concatenate(uncond: Conditioning, cond: Conditioning) -> Conditioning:
    """[uncond, cond] as one batch, with the nesting of both."""
    return _zip(lambda place, u, c: torch.cat([u, c]), "", uncond, cond)


def batchable(uncond: Conditioning, cond: Conditioning) -> bool:
    """Whether every pair of tensors agrees in all but the batch (77 against 154 tokens do not)."""
    shapes_agree = []
    _zip(lambda place, u, c: shapes_agree.append(u.shape[1:] == c.shape[1:]), "", uncond, cond)
    return all(shapes_agree)


def check(uncond: Conditioning, cond: Conditioning, batch: int) -> None:
    """Raises a ValueError that names the place where the two do not match each other or the latent's batch."""

    def check_batch(place: str, u: Tensor, c: Tensor) -> None:
        for name, tensor in ("cond", c), ("uncond", u):
            if tensor.ndim == 0 or tensor.shape[0] != batch:
                raise ValueError(
                    f"{name}{place} has shape {tuple(tensor.shape)}, but the latent is a batch of {batch}: a conditioning "
                    f"has one row for each sample. One prompt for all of them is tensor.expand({batch}, ...)."
                )

    _zip(check_batch, "", uncond, cond)


def repeat(kwargs: dict[str, Any], batch: int) -> dict[str, Any]:
    """`kwargs` for a batch of [uncond, cond]: what has one row for each sample is doubled, all else is left as it is."""

    def double(place: str, leaf: Any, _: Any) -> Any:
        return torch.cat([leaf, leaf]) if leaf.ndim > 0 and leaf.shape[0] == batch else leaf

    return _zip(double, "", kwargs, kwargs)


def _zip(fn: Callable[[str, Tensor, Tensor], Any], place: str, u: Any, c: Any) -> Any:
    """`fn(place, u, c)` for each pair of tensors, in the nesting that both share."""
    if isinstance(u, Tensor) and isinstance(c, Tensor):
        return fn(place, u, c)
    if isinstance(u, Mapping) and isinstance(c, Mapping):
        if u.keys() != c.keys():
            raise ValueError(f"uncond{place} has the keys {sorted(u)}, cond{place} has {sorted(c)}: they must be the same.")
        return {key: _zip(fn, f"{place}[{key!r}]", u[key], c[key]) for key in u}
    if isinstance(u, (list, tuple)) and isinstance(c, (list, tuple)):
        if len(u) != len(c):
            raise ValueError(f"uncond{place} has {len(u)} entries, cond{place} has {len(c)}: they must be as many.")
        pairs = [_zip(fn, f"{place}[{i}]", u[i], c[i]) for i in range(len(u))]
        return tuple(pairs) if isinstance(u, tuple) else pairs
    if isinstance(u, Tensor) or isinstance(c, Tensor) or (u is not c and u != c):
        raise ValueError(
            f"uncond{place} is {_describe(u)}, cond{place} is {_describe(c)}: tensors pair with tensors, and anything else "
            f"must be the same on both sides."
        )
    return u


def _describe(leaf: Any) -> str:
    return f"a tensor of shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)

"""NVlabs: EDM and EDM2. A block may resample on the way to its attention, so that only qkv's output knows the grid."""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ksag.attention.families.family import Attention, Family, Seen, from_image, has_modules, reads_image, unet


def _level(encoder: nn.Module, path: str) -> int:
    """A path begins with the resolution, as in 8x8_block0."""
    return -int(path.partition("x")[0])


MIDDLE = unet(down="enc", middle=r"dec\.\d+x\d+_in0", up="dec", level=_level)
"""The first block of the way up, at the lowest resolution."""


# EDM: UNetBlock in SongUNet and DhariwalUNet


def _is_edm(layer: Any, path: str, parent: nn.Module) -> bool:
    return has_modules(layer, "conv0", "conv1", "affine", "norm2", "qkv", "proj") and bool(getattr(layer, "num_heads", 0))


EDM = Family(
    "EDM UNetBlock",
    matches=_is_edm,
    middle=MIDDLE,
    read=reads_image("qkv", "num_heads", "heads d three"),
    projection="proj",
    merged="b heads (h w) d -> b (heads d) h w",
    outputs=("qkv",),
    heads="num_heads",
)


# EDM2: Block


def _is_edm2(layer: Any, path: str, parent: nn.Module) -> bool:
    return has_modules(layer, "attn_qkv", "attn_proj", "conv_res0") and bool(getattr(layer, "num_heads", 0))


def _read_edm2(layer: Any, seen: Seen) -> Attention | None:
    if "attn_qkv" not in seen:
        return None
    read = from_image(seen["attn_qkv"][0], layer.num_heads, "heads d three")
    q, k, v = (x if x is None else _pixel_normalised(x) for x in (read.q, read.k, read.v))
    assert q is not None and k is not None
    return replace(read, q=q, k=k, v=v)


def _pixel_normalised(x: Tensor) -> Tensor:
    """The root mean square over the head's channels becomes 1. EDM2 adds its epsilon to that, not to its square."""
    return x / (x.float().square().mean(-1, keepdim=True).sqrt() + 1e-4).to(x.dtype)


EDM2 = Family(
    "EDM2 Block",
    matches=_is_edm2,
    middle=MIDDLE,
    read=_read_edm2,
    projection="attn_proj",
    merged="b heads (h w) d -> b (heads d) h w",
    outputs=("attn_qkv",),
    heads="num_heads",
)

FAMILIES = (EDM, EDM2)

"""diffusers: UNet2DModel and UNet2DConditionModel, and the transformers DiT and PixArt."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from ksag.attention.families.family import Attention, Family, Place, Seen, from_tokens, has_modules, ran, stack, unet


def _is_attention(layer: Any, path: str, parent: nn.Module) -> bool:
    has_parts = has_modules(layer, "to_q", "to_k", "to_v", "to_out") and hasattr(layer, "heads") and hasattr(layer, "processor")
    return has_parts and not getattr(layer, "is_cross_attention", False) and not is_joint(layer)


def is_joint(layer: Any) -> bool:
    """Whether image and text attend together: in SD3 and Flux by added projections, in Flux's later blocks as one sequence."""
    added = getattr(layer, "added_kv_proj_dim", None) is not None or getattr(layer, "pre_only", False)
    return hasattr(layer, "processor") and has_modules(layer, "to_q", "to_k") and added


def _read(layer: Any, seen: Seen) -> Attention | None:
    # to_q and to_k stay there beside a fused to_qkv, and norm_q and norm_k need not be used: what ran says which
    if "to_qkv" in seen:
        q, k, v = seen["to_qkv"][0].chunk(3, dim=-1)
    elif ran(seen, "to_q", "to_k", "to_v"):
        q, k, v = (seen[name][0] for name in ("to_q", "to_k", "to_v"))
    else:
        return None
    q, k = seen.get("norm_q", [q])[0], seen.get("norm_k", [k])[0]
    return from_tokens(q, k, v, layer.heads, layer.scale)


_unet = unet(down="down_blocks", middle="mid_block", up="up_blocks")
_stack = stack("transformer_blocks")


def _unet_or_stack(model: nn.Module, paths: Sequence[str]) -> list[Place]:
    """A UNet's blocks hold stacks as well, but only a whole transformer embeds positions."""
    transformers = [path for path, module in model.named_modules() if has_modules(module, "transformer_blocks", "pos_embed")]
    of_transformers = [path for path in paths if path.partition(".transformer_blocks")[0] in transformers or "" in transformers]
    return _unet(model, paths) or _stack(model, of_transformers)


ATTENTION = Family(
    "diffusers Attention",
    matches=_is_attention,
    middle=_unet_or_stack,
    read=_read,
    projection="to_out.0",
    outputs=("to_q", "to_k", "to_v", "to_qkv", "norm_q", "norm_k"),
    patch="pos_embed.patch_size",
)

FAMILIES = (ATTENTION,)

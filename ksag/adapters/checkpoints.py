"""The kind of a .safetensors file, by the names and shapes in its header. No weight is read, and nothing is unpickled."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

UNET, VAE, TEXT = "model.diffusion_model.", ("first_stage_model.", "vae."), ("cond_stage_model.", "conditioner.embedders.")
"""Prefixes of the tensors in a Stable Diffusion checkpoint: of its UNet or transformer, its VAE and its text encoders."""

CLIP_L, CLIP_G, T5 = (f"text_encoders.{encoder}.transformer." for encoder in ("clip_l", "clip_g", "t5xxl"))

TRANSFORMERS = {
    "StableDiffusion3Pipeline": (
        "Stable Diffusion 3", "joint_blocks.0.x_block.attn.qkv.weight", {"CLIP-L": CLIP_L, "CLIP-G": CLIP_G},
    ),
    "FluxPipeline": ("Flux", "double_blocks.0.img_mod.lin.weight", {"CLIP-L": CLIP_L, "T5": T5}),
}  # fmt: skip
"""diffusers' class → its model, a tensor that only this has, and the text encoders without which there is no picture."""

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")


class Header(NamedTuple):
    """The names of a .safetensors file's tensors with their shapes, and its metadata."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]

    def starts(self, *prefixes: str) -> bool:
        """Whether a tensor's name starts with one of these."""
        return any(name.startswith(prefixes) for name in self.shapes)


def read_header(path: Path) -> Header:
    """The header of a .safetensors file; a ValueError for a damaged file or one of another kind."""
    if path.suffix.lower() in PICKLES:
        raise ValueError(
            f"{path.name} is a {path.suffix} file, a pickle, which can run any program when it is loaded. Look for the same model "
            f"as .safetensors, or convert it. diffusers opens it with weights_only=True: diffusers.StableDiffusionPipeline."
            f"from_single_file({str(path)!r}).save_pretrained('folder'). Then load('folder'), or ksag sample --pipeline folder."
        )
    try:
        with safe_open(path, framework="pt") as file:
            return Header({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        with path.open("rb") as file:
            reason = "it is a Git LFS pointer, not the file itself" if b"git-lfs" in file.read(100) else error
        raise ValueError(f"{path} is damaged, or not a .safetensors file, the only kind that ksag loads. ({reason})") from error


def check_whole(header: Header, path: Path) -> None:
    """Raises a ValueError for everything but a whole Stable Diffusion or Flux checkpoint."""
    if "config" in header.metadata and not header.starts(UNET):
        raise ValueError(
            f"{path.name} is a k-diffusion model: load it with ksag.zoo.load({str(path)!r}), or ksag sample --weights."
        )
    if pipeline := _transformer_pipeline(header):
        kind, _, encoders = TRANSFORMERS[pipeline]
        parts = {"VAE": VAE} | {f"{name} text encoder": (prefix,) for name, prefix in encoders.items()}
    else:
        kind = "Stable Diffusion or Flux"
        parts = {"UNet": (UNET + "input_blocks.0.0.weight",), "VAE": VAE, "text encoder": TEXT}
    if lacks := [part for part, prefixes in parts.items() if not header.starts(*prefixes)]:
        raise ValueError(
            f"{path.name} is not a whole {kind} checkpoint: it has no {' and no '.join(lacks)}, so give a folder or a hub id. "
            f"For LoRAs and single parts, see docs/diffusers.md."
        )


def _transformer_pipeline(header: Header) -> str | None:
    """The diffusers class for a file with a transformer; None for another file."""
    kinds = (kind for kind, (_, marker, _) in TRANSFORMERS.items() if marker in header.shapes or UNET + marker in header.shapes)
    return next(kinds, None)


def pipeline_of(header: Header) -> str:
    """The diffusers class for a whole checkpoint."""
    if pipeline := _transformer_pipeline(header):
        return pipeline
    kind = "XL" if header.starts("conditioner.embedders.") else ""
    is_refiner = header.starts("conditioner.embedders.0.model.") and not header.starts("conditioner.embedders.1.")
    is_inpainting = header.shapes[UNET + "input_blocks.0.0.weight"][1:2] == (9,)
    return f"StableDiffusion{kind}{'Img2Img' if is_refiner else 'Inpaint' if is_inpainting else ''}Pipeline"


def predicts_v(header: Header, tensors: Mapping[str, Tensor]) -> bool | None:
    """Whether the UNet predicts v; None if the file does not say."""
    if "v_pred" in tensors:
        return True
    if stated := header.metadata.get("modelspec.prediction_type"):
        return stated.lower().startswith("v")
    bias = UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
    if header.starts("cond_stage_model.model.") and bias in tensors:
        # No name tells the two kinds of 2.x apart. Training for v left this bias wider; ComfyUI uses the same test.
        return bool(tensors[bias].float().std(unbiased=False) > 0.09)
    return None

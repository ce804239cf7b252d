"""What a .safetensors file is, from the names and shapes in its header. No weight is read, and nothing is unpickled."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import safetensors
from safetensors import SafetensorError

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", ("cond_stage_model.", "conditioner.embedders.")
"""How the keys of a whole Stable Diffusion checkpoint begin: of its UNet, its VAE and its text encoders."""

SUPPORTED = "ksag samples Stable Diffusion 1.x, 2.x and XL"

FLOW = f"Its flow matching and its joint attention are not supported: {SUPPORTED}"

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")

LOAD = "pipe = ksag.adapters.diffusers.load(MODEL)"

SAVE = "pipe.save_pretrained('folder'). Then load('folder'), or ksag sample --pipeline folder"
"""How advice ends that makes a pipeline in Python."""

CONVERT = (
    "Stable Diffusion (for XL with StableDiffusionXLPipeline), in Python: "
    f"pipe = diffusers.StableDiffusionPipeline.from_single_file({{path!r}}); {SAVE}."
)
"""diffusers opens a pickle with weights_only=True, which runs nothing in it."""


class Header(NamedTuple):
    """What stands at the beginning of a .safetensors file."""

    shapes: dict[str, tuple[int, ...]]
    """The shape of each tensor."""
    metadata: dict[str, str]
    """What whoever wrote it says about it."""

    def any(self, *patterns: str) -> bool:
        """Whether a key holds one of the regular expressions."""
        return any(re.search(pattern, key) for pattern in patterns for key in self.shapes)

    def starts(self, *prefixes: str) -> bool:
        """Whether a key starts with one of these."""
        return any(key.startswith(prefixes) for key in self.shapes)


def about_pickle(path: Path) -> str:
    return (
        f"{path.name} is a {path.suffix} file, a pickle, which can run any program when it is loaded, so ksag does not load it. "
        f"Look for the same model as .safetensors, or convert it."
    )


def read_header(path: Path) -> Header:
    """The header of a .safetensors file.

    Raises:
        ValueError: it is something else; the message says what.
    """
    if path.suffix.lower() in PICKLES:
        raise ValueError(f"{about_pickle(path)} {CONVERT.format(path=str(path))}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return Header({key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}, file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        with path.open("rb") as file:
            begin = file.read(100)
        if b"git-lfs" in begin:
            raise ValueError(f"{path.name} is a Git LFS pointer, not the file that it points to. Download that.") from None
        if path.suffix.lower() != ".safetensors":
            raise ValueError(f"{path.name} is not a .safetensors file, and ksag takes no other. Give the model as one.") from None
        raise ValueError(f"{path.name} is damaged, or not a .safetensors file. Download it again. ({error})") from None


class Other(NamedTuple):
    """A kind of file that is no whole Stable Diffusion checkpoint."""

    name: str
    patterns: tuple[str, ...]
    """It is one if a key holds one of these regular expressions."""
    advice: str


# In this order, because a LoRA has the names of the layers that it changes, and an architecture those of its parts.
OTHERS = (
    Other(
        "a LoRA, not a whole model", (r"lora_(up|down|A|B)\b", r"\.lora\.", r"^lora_", r"\.hada_w1", r"\.lokr_w", r"\.oft_"),
        f"In Python, where MODEL is the one that it changes: {LOAD}; pipe.load_lora_weights({{path!r}}); pipe.fuse_lora(); "
        f"pipe.unload_lora_weights(); {SAVE}",
    ),
    Other(
        "an IP-Adapter, not a whole model", (r"^image_proj\.", r"^ip_adapter\."),
        "It works from Python alone: load a model, then pipe.load_ip_adapter; docs/diffusers.md has the rest",
    ),
    Other("a motion module, for video", (r"motion_modules?\.",), SUPPORTED),
    Other(
        "a ControlNet, not a whole model", (r"^control_model\.", r"controlnet_", r"input_hint_block", r"zero_convs\."),
        "It works from Python alone: controlnet = ControlNetModel.from_single_file({path!r}), then "
        "StableDiffusionControlNetPipeline.from_pipe(pipe, controlnet=controlnet); docs/diffusers.md has the rest",
    ),
    Other(
        "a T2I-Adapter, not a whole model", (r"^(adapter\.)?body\.\d",),
        "It works from Python alone, with diffusers' T2IAdapter; docs/diffusers.md shows how it goes in",
    ),
    Other(
        "a textual inversion, not a whole model", (r"^emb_params$", r"^string_to_param", r"^clip_[lg]$", r"^<.*>$"),
        f"In Python, where MODEL is the one that it is for: {LOAD}; pipe.load_textual_inversion({{path!r}}); {SAVE}",
    ),
    Other("a Stable Diffusion 3 model", (r"joint_blocks\.",), FLOW),
    Other(
        "a Flux model, or one like it", (r"double_blocks\.", r"double_stream", r"single_transformer_blocks\."),
        FLOW,
    ),
    Other("a Stable Cascade model", (r"clip_txt_mapper", r"clip_txt_pooled_mapper", r"\.channelwise\."), SUPPORTED),
    Other(
        "a UNet alone, without VAE and text encoder",
        (r"(^|diffusion_model\.)input_blocks\.0\.", r"^down_blocks\.\d+\.attentions"),
        f"In Python, where MODEL is the one that it was made from: {LOAD}; pipe.unet = "
        f"diffusers.UNet2DConditionModel.from_single_file({{path!r}}, config=MODEL, subfolder='unet'); {SAVE}",
    ),
    Other(
        "a VAE alone", (r"(^|^vae\.|first_stage_model\.)(encoder|decoder)\.(conv_in|mid|mid_block|down|up|\w+_blocks)\.",),
        f"In Python, where MODEL is the one that it is for: {LOAD}; pipe.vae = "
        f"diffusers.AutoencoderKL.from_single_file({{path!r}}, config=MODEL, subfolder='vae'); {SAVE}",
    ),
    Other(
        "a text encoder alone",
        (r"text_model\.", r"^encoder\.(layers|block)\.\d", r"transformer\.resblocks\.", r"^(model\.)?embed_tokens\."),
        "Give the checkpoint or the folder that it belongs to",
    ),
    Other("a diffusion transformer", (r"(transformer_)?blocks\.\d", r"layers\.\d"), SUPPORTED),
)  # fmt: skip


def other_kind(header: Header) -> Other | None:
    return next((other for other in OTHERS if header.any(*other.patterns)), None)


def describe(other: Other, path: Path) -> str:
    return f"{path.name} is {other.name}. {other.advice.format(path=str(path))}."


def is_checkpoint(header: Header) -> bool:
    """Whether it is one of Stable Diffusion, whole or not: a UNet and more."""
    return header.starts(UNET + "input_blocks.0.") and header.starts(VAE, *TEXT)


def check_whole(header: Header, path: Path) -> None:
    """Refuses what is no whole Stable Diffusion checkpoint.

    Raises:
        ValueError: it is another file; the message says which, and what would work.
    """
    if "config" in header.metadata and not header.starts(UNET):
        raise ValueError(
            f"{path.name} is a k-diffusion model, with its config in its metadata. Load it with ksag.zoo.load({str(path)!r}), or "
            f"ksag sample --weights."
        )
    if is_checkpoint(header):
        for part, prefixes in {"VAE": (VAE,), "text encoder": TEXT}.items():
            if not header.starts(*prefixes):
                raise ValueError(f"{path.name} is a Stable Diffusion checkpoint without its {part}. Give one that holds it.")
        return _check_channels(header, path)
    if other := other_kind(header):
        raise ValueError(describe(other, path))
    raise ValueError(f"{path.name} is not a model that ksag knows: its tensors are {_some(header.shapes)}. {SUPPORTED}.")


def _check_channels(header: Header, path: Path) -> None:
    channels = header.shapes[UNET + "input_blocks.0.0.weight"][1]
    if channels not in (4, 9):
        purposes = {5: "depth", 7: "upscaling", 8: "editing by instruction"}
        raise ValueError(
            f"{path.name} is a Stable Diffusion model for {purposes.get(channels, 'another task')}, whose UNet takes {channels} "
            f"channels. ksag samples those for text to image, 4 channels, and for inpainting, 9."
        )


def _some(keys: Iterable[str]) -> str:
    first, *rest = sorted(keys) or ["none"]
    return f"{first!r} and {len(rest)} more" if rest else repr(first)


# What a whole one is


def is_xl(header: Header) -> bool:
    return header.starts("conditioner.embedders.")


def is_refiner(header: Header) -> bool:
    return header.starts("conditioner.embedders.0.model.") and not header.starts("conditioner.embedders.1.")


def is_inpainting(header: Header) -> bool:
    return header.shapes[UNET + "input_blocks.0.0.weight"][1] == 9


def is_v2(header: Header) -> bool:
    return header.starts("cond_stage_model.model.")


def predicts_v(header: Header, path: Path) -> bool | None:
    """Whether the UNet predicts v, where the file tells; None where it does not."""
    if "v_pred" in header.shapes:
        return True
    if stated := header.metadata.get("modelspec.prediction_type"):
        return stated.lower().startswith("v")
    bias = UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
    if is_v2(header) and bias in header.shapes:
        # No key tells the two kinds of 2.x apart. Training for v left this bias wider, by which ComfyUI tells them too.
        with safetensors.safe_open(path, framework="pt") as file:
            return bool(file.get_tensor(bias).float().std(unbiased=False) > 0.09)
    return None

"""A Stable Diffusion or Flux pipeline from a folder, a hub id, or a single file."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ksag.adapters import checkpoints
from ksag.adapters.checkpoints import Header
from ksag.adapters.diffusers import folders


def load(
    path_or_id: str | Path,
    *,
    config: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    variant: str | None = None,
    prediction_type: str | None = None,
    zero_snr: bool | None = None,
) -> Any:
    """A Stable Diffusion 1.x, 2.x, XL, 3 or 3.5 or Flux pipeline. Nothing is unpickled, and no code from the model runs.

        pipe = load("stable-diffusion-v1-5/stable-diffusion-v1-5", dtype=torch.float16, device="cuda")

    A single file's own markers set its prediction type and its noise levels. In float16, SDXL's VAE stays in float32, because it
    overflows there. The safety checker is left out.

    Args:
        path_or_id: a diffusers folder, a hub id (owner/name), or a single .safetensors file with the network, the VAE and the text
            encoders. Only Stable Diffusion 3's T5 may be missing: its prompts then go to CLIP alone.
        config: for a single file: the folder or hub id of a pipeline of the same kind, for its configs and tokenizers; by
            default the hub id that diffusers takes for such a file.
        dtype: of the weights; float32 by default.
        device: where to put the pipeline; by default it stays on the CPU, for example for `pipe.enable_model_cpu_offload()`.
        variant: which of a folder's files to take, such as "fp16"; by default the full ones, or the only ones.
        prediction_type: "epsilon" or "v_prediction", if the model's own files are wrong about it.
        zero_snr: whether the noise levels have a zero terminal SNR, if the model's own files are wrong about it.

    Raises:
        ValueError: another kind of model, a missing or damaged file, or weights that do not fit the config. The message names it.
        OSError: there is no such file, or the hub cannot be reached.
        ImportError: accelerate, diffusers or transformers is not installed.
    """
    try:
        import accelerate  # noqa: F401
        import diffusers  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Pipelines need accelerate, diffusers and transformers. In a clone of ksag: pip install '.[diffusers]'"
        ) from error
    path, of_weights = Path(path_or_id), dtype or torch.float32
    if path.is_file():
        pipe = _from_file(path, config, of_weights)
    elif config is not None:
        raise ValueError(f"config= (--config) goes with a single file. {path_or_id} is a folder or a hub id, with its own.")
    else:
        pipe = _from_folder(path if path.is_dir() else _download(str(path_or_id), variant), of_weights, variant)
    if hasattr(pipe, "unet") and (channels := pipe.unet.config.in_channels) not in (4, 9):
        raise ValueError(f"{path_or_id} is for another task: its UNet takes {channels} channels instead of 4 (9 for inpainting).")
    pipe.register_to_config(_name_or_path=str(path_or_id))
    _set_prediction(pipe, prediction_type, zero_snr)
    if dtype == torch.float16 and "XL" in type(pipe).__name__ and getattr(pipe.vae.config, "force_upcast", False):
        pipe.vae.to(torch.float32)
    return pipe if device is None else pipe.to(device)


def _set_prediction(pipe: Any, prediction_type: str | None, zero_snr: bool | None) -> None:
    """Replaces the scheduler, of which only the noise levels and the prediction type are used."""
    if prediction_type is None and zero_snr is None:
        return
    from diffusers import DDIMScheduler

    if not hasattr(pipe.scheduler, "alphas_cumprod"):
        raise ValueError(f"prediction_type and zero_snr are for discrete noise levels, not for {type(pipe.scheduler).__name__}.")
    options = {"prediction_type": prediction_type, "rescale_betas_zero_snr": zero_snr}
    given = {name: value for name, value in options.items() if value is not None}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **given)


def _from_folder(folder: Path, dtype: torch.dtype, variant: str | None) -> Any:
    index = folders.read_index(folder)
    if variant and not any(folder.glob(f"*/*.{variant}*")):
        raise ValueError(f"{folder} has no files of the variant {variant!r}.")
    return folders.build(folder, index, index["_class_name"], dtype, lambda part, config: folders.read_weights(part, variant))


def _download(name: str, variant: str | None) -> Path:
    """The files of a pipeline on the hub, without its pickles. Its model_index.json is downloaded and checked first."""
    from diffusers import DiffusionPipeline
    from huggingface_hub import hf_hub_download

    with _hub(name):
        folders.read_index(Path(hf_hub_download(name, "model_index.json")).parent)
        options = {"use_safetensors": True, "trust_remote_code": False, "safety_checker": None}
        return Path(DiffusionPipeline.download(name, variant=variant, **options))


@contextlib.contextmanager
def _hub(name: str) -> Iterator[None]:
    """Refuses what cannot be a hub id. The hub's errors become one line."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) or Path(name).suffix in (".safetensors", *checkpoints.PICKLES):
        raise FileNotFoundError(f"There is no file or folder {name}, and a hub id is owner/name.")
    try:
        yield
    except OSError as error:
        raise OSError(f"There is no folder {name} here, and the hub says: {' '.join(str(error).split())}") from error


def _from_file(path: Path, config: str | Path | None, dtype: torch.dtype) -> Any:
    header = checkpoints.read_header(path)
    checkpoints.check_whole(header, path)
    pipeline, folder = checkpoints.pipeline_of(header), _configs(path, config, header)
    index = folders.read_index(folder)
    if _family(index["_class_name"]) != _family(pipeline):
        raise ValueError(f"{path.name} is for a {pipeline}, but config={str(folder)!r} is for a {index['_class_name']}.")
    index.pop("image_encoder", None)
    if pipeline == "StableDiffusion3Pipeline" and not header.starts(checkpoints.T5):
        index = {name: value for name, value in index.items() if name not in ("text_encoder_3", "tokenizer_3")}
    encoders = [name for name in index if name.startswith("text_encoder")]
    held = [prefix for prefix in (checkpoints.CLIP_L, checkpoints.CLIP_G, checkpoints.T5) if header.starts(prefix)]
    if len(encoders) < len(held):
        raise ValueError(f"{path.name} has {len(held)} text encoders, but config={str(folder)!r} has {len(encoders)}.")
    tensors = load_file(path)
    try:
        pipe = folders.build(folder, index, pipeline, dtype, lambda part, config: _tensors_of(part.name, config, tensors))
    except (ValueError, LookupError, TypeError, RuntimeError) as error:
        reason = f"There is no {error}." if isinstance(error, KeyError) else error
        raise ValueError(f"{path.name} cannot be loaded with the configs of {folder}. ({reason})") from error
    if hasattr(pipe, "unet"):
        _follow_markers(pipe, tensors, header, path)
    return pipe


def _family(pipeline: str) -> str:
    """Pipelines of the same family have the same parts."""
    families = "StableDiffusionXL", "StableDiffusion3", "Flux"
    return next((family for family in families if pipeline.startswith(family)), "StableDiffusion")


def _configs(path: Path, config: str | Path | None, header: Header) -> Path:
    """The folder with the configs for a single file, downloaded if it is not here."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config
    from huggingface_hub import snapshot_download

    if config is None:
        shapes = {name: torch.empty(shape, device="meta") for name, shape in header.shapes.items()}
        config = fetch_diffusers_config(shapes)["pretrained_model_name_or_path"]
    if Path(config).is_dir():
        return Path(config)
    try:
        with _hub(str(config)):
            return Path(snapshot_download(str(config), allow_patterns=["*.json", "*.txt", "*/spiece.model"]))
    except OSError as error:
        raise OSError(
            f"{path.name} has only weights. Give config= (--config) the folder of a diffusers pipeline of the same kind, whose "
            f"weights are not needed. ({error})"
        ) from error


PREFIXES = {
    "transformer": (checkpoints.UNET, ""),
    "text_encoder": (
        "cond_stage_model.transformer.", "cond_stage_model.model.", "conditioner.embedders.0.transformer.", checkpoints.CLIP_L,
    ),
    "text_encoder_2": (
        "conditioner.embedders.1.model.", "conditioner.embedders.0.model.", checkpoints.CLIP_G, checkpoints.T5,
    ),
    "text_encoder_3": (checkpoints.T5,),
}  # fmt: skip
"""Part → the prefixes that its tensors may have in a single file; `model.` is OpenCLIP's."""

OF_TEXT_ENCODER = {"CLIPTextModelWithProjection": ("text_model.", "text_projection."), "T5EncoderModel": ("",)}
"""transformers' class → its tensors after the prefix. Merging tools leave other parts of CLIP next to text_model."""

CONVERTERS = {
    "SD3Transformer2DModel": "convert_sd3_transformer_checkpoint_to_diffusers",
    "FluxTransformer2DModel": "convert_flux_transformer_checkpoint_to_diffusers",
}


def _tensors_of(part: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of one part in a single file, by diffusers' names."""
    from diffusers.loaders import single_file_utils as ldm

    found: dict[str, Tensor]
    prefix = next((prefix for prefix in PREFIXES.get(part, ()) if any(name.startswith(prefix) for name in tensors)), part)
    if part == "unet":
        found = ldm.convert_ldm_unet_checkpoint(tensors, config)
    elif part == "transformer":
        names = (name for name in tensors if name.startswith(prefix) and not name.startswith((*checkpoints.VAE, "text_encoders.")))
        own = {name.removeprefix(prefix): tensors[name] for name in names}
        found = getattr(ldm, CONVERTERS[config["_class_name"]])(own) | own  # the converter takes out what it knows
    elif part == "vae":
        found = ldm.convert_ldm_vae_checkpoint(tensors, config)
    elif prefix.endswith(".model."):
        found = ldm.convert_open_clip_checkpoint(SimpleNamespace(config=SimpleNamespace(**config)), tensors, prefix)
    else:
        kept = tuple(prefix + start for start in OF_TEXT_ENCODER.get(config["_class_name"], ("text_model.",)))
        found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(kept)}
        if prefix == checkpoints.CLIP_L and len(kept) == 2:  # files may leave it out, as it is the identity
            found.setdefault("text_projection.weight", torch.eye(len(found["text_model.final_layer_norm.weight"])))
    return found


def _follow_markers(pipe: Any, tensors: dict[str, Tensor], header: Header, path: Path) -> None:
    """Sets the noise levels and the prediction that the file states, if the configs are another model's."""
    import diffusers

    if "edm_vpred.sigma_max" in tensors:
        ends = {end: float(tensors[f"edm_vpred.{end}"]) for end in ("sigma_min", "sigma_max") if f"edm_vpred.{end}" in tensors}
        pipe.scheduler = diffusers.EDMEulerScheduler(
            **ends, sigma_data=1.0, prediction_type="v_prediction", sigma_schedule="exponential"
        )
    elif "edm_mean" in tensors:
        if not hasattr(pipe.scheduler, "precondition_outputs"):
            raise ValueError(f"{path.name} is a Playground v2.5 model, and config= is for another: give its own.")
    elif (v := checkpoints.predicts_v(header, tensors)) is not None:
        _set_prediction(pipe, "v_prediction" if v else "epsilon", True if "ztsnr" in tensors else None)

"""A Stable Diffusion pipeline from a folder, a hub id, or a single file."""

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch

from ksag.adapters import checkpoints
from ksag.adapters.checkpoints import SUPPORTED, Header


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
    """A Stable Diffusion 1.x, 2.x or XL pipeline, from safetensors alone: nothing is unpickled, and no code of the model's runs.

        pipe = load("stable-diffusion-v1-5/stable-diffusion-v1-5", dtype=torch.float16, device="cuda")

    What a single file predicts, and over which noise levels, is read from its own markers: v-prediction, a zero terminal SNR,
    CosXL's noise levels. In float16, SDXL's VAE, which overflows there, stays in float32. The safety checker is left out, since
    the pipeline itself is not called.

    Args:
        path_or_id: a diffusers folder, a hub id (owner/name, downloaded by diffusers), or a single .safetensors checkpoint.
        config: for a single file: the folder or hub id of a diffusers pipeline of the same kind, for its configs and tokenizers; by
            default diffusers' choice for it, downloaded.
        dtype: what it computes in; float32 by default.
        device: where it goes; by default it stays on the CPU, for `pipe.enable_model_cpu_offload()`, say.
        variant: which of a folder's files to take, such as "fp16"; by default the full ones, or those where there are no others.
        prediction_type: "epsilon" or "v_prediction", where the model's own files are wrong about it.
        zero_snr: whether the noise levels end at a zero terminal SNR, where the model's own files are wrong about it.

    Returns:
        The diffusers pipeline, for `denoiser`, `conditioning`, `encode` and `decode`.

    Raises:
        ValueError: a file or folder of another kind; the message says which, and what would work.
        OSError: there is no such file, or the hub cannot be reached.
        ImportError: diffusers and transformers are not installed.
    """
    try:
        import diffusers  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Stable Diffusion needs diffusers and transformers. In a clone of ksag: pip install '.[diffusers]'"
        ) from error
    path = Path(path_or_id)
    if path.is_file():
        pipe = _from_file(path, config, dtype)
    elif config is not None:
        raise ValueError(
            f"config= (--config) goes with a single file. A folder or a hub id, such as {path_or_id}, has its own configuration."
        )
    else:
        pipe = _from_pretrained(path_or_id, dtype, variant)
    _set_prediction(pipe, prediction_type, zero_snr)
    if dtype == torch.float16 and _is_xl(pipe.components) and getattr(pipe.vae.config, "force_upcast", False):
        pipe.vae.to(torch.float32)
    return pipe if device is None else pipe.to(device)


def _is_xl(components: Any) -> bool:
    return "text_encoder_2" in components


def _set_prediction(pipe: Any, prediction_type: str | None, zero_snr: bool | None) -> None:
    """Replaces the scheduler, whose noise levels and prediction are all that is used of it."""
    if prediction_type is None and zero_snr is None:
        return
    from diffusers import DDIMScheduler

    if prediction_type not in (None, "epsilon", "v_prediction"):
        raise ValueError(f"prediction_type is 'epsilon' or 'v_prediction', got {prediction_type!r}.")
    if not hasattr(pipe.scheduler, "alphas_cumprod"):
        raise ValueError(f"prediction_type and zero_snr are for discrete noise levels, not for {type(pipe.scheduler).__name__}.")
    options = {"prediction_type": prediction_type, "rescale_betas_zero_snr": zero_snr}
    given = {name: value for name, value in options.items() if value is not None}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **given)


# A single file


def _from_file(path: Path, config: str | Path | None, dtype: torch.dtype | None) -> Any:
    header = checkpoints.read_header(path)
    checkpoints.check_whole(header, path)
    if config is not None:
        _check_config(config, header, path)
    # the safety checker of 1.x is no part of the file
    options = {} if checkpoints.is_xl(header) else {"safety_checker": None, "requires_safety_checker": False}
    try:
        with _without_dtype_warning():
            pipe = _class_of(header).from_single_file(
                str(path), config=None if config is None else str(config), torch_dtype=dtype, **options
            )
    except OSError as error:
        raise OSError(
            f"{path.name} holds weights alone. Its configs and tokenizers come from {config or 'the hub'}, where ksag could not "
            f"get them. Give config= (--config) the folder of a diffusers pipeline of the same kind; its weights are not needed. "
            f"({error})"
        ) from error
    except (ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path.name} does not fit {_configs(config)}. ({error})") from error
    _check_filled(pipe, config, path)
    _follow_markers(pipe, header, path)
    return pipe


def _class_of(header: Header) -> Any:
    import diffusers

    if checkpoints.is_refiner(header):
        return diffusers.StableDiffusionXLImg2ImgPipeline
    if checkpoints.is_xl(header):
        inpainting = checkpoints.is_inpainting(header)
        return diffusers.StableDiffusionXLInpaintPipeline if inpainting else diffusers.StableDiffusionXLPipeline
    return diffusers.StableDiffusionInpaintPipeline if checkpoints.is_inpainting(header) else diffusers.StableDiffusionPipeline


def _check_config(config: str | Path, header: Header, path: Path) -> None:
    """Refuses a folder of configs that is for another kind of model."""
    folder = Path(config)
    if not folder.is_dir():
        return  # a hub id
    index = _index_of(folder)
    if _is_xl(index) != checkpoints.is_xl(header):
        kind = "a Stable Diffusion XL" if checkpoints.is_xl(header) else "a Stable Diffusion 1.x or 2.x"
        raise ValueError(f"{path.name} is {kind} model, but config={str(config)!r} is for a {index['_class_name']}.")


def _configs(config: str | Path | None) -> str:
    if config is None:
        return "the configs that diffusers chose for it: give config= (--config) a pipeline of the same kind"
    return f"the configs of {config}, which are for another model: give those of the same kind"


@contextlib.contextmanager
def _without_dtype_warning() -> Iterator[None]:
    """torch_dtype is the name that every version of diffusers takes, and newer ones warn of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated", category=FutureWarning)
        yield


def _check_filled(pipe: Any, config: str | Path | None, path: Path) -> None:
    """Refuses a model with layers that the file gave no weights, which diffusers leaves without a word."""
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module) and any(weight.is_meta for weight in part.parameters()):
            raise ValueError(f"{path.name} does not fit {_configs(config)}: it has no weights for some layers of the {name}.")


def _follow_markers(pipe: Any, header: Header, path: Path) -> None:
    """Gives the pipeline the noise levels and the prediction that the file states, where the configs are another model's."""
    import diffusers

    if "edm_vpred.sigma_max" in header.shapes:
        with safetensors.safe_open(path, framework="pt") as file:
            ends = {end: float(file.get_tensor(f"edm_vpred.{end}")) for end in ("sigma_min", "sigma_max") if header.any(end)}
        pipe.scheduler = diffusers.EDMEulerScheduler(
            **ends, sigma_data=1.0, prediction_type="v_prediction", sigma_schedule="exponential"
        )
    elif "edm_mean" in header.shapes:
        if not hasattr(pipe.scheduler, "precondition_outputs"):
            raise ValueError(f"{path.name} is a Playground v2.5 model, and config= is for another: give its own.")
    elif (v := checkpoints.predicts_v(header, path)) is not None:
        _set_prediction(pipe, "v_prediction" if v else "epsilon", True if "ztsnr" in header.shapes else None)


# A folder or a hub id


def _from_pretrained(path_or_id: str | Path, dtype: torch.dtype | None, variant: str | None) -> Any:
    from diffusers import DiffusionPipeline

    index = _index_of(path_or_id)
    _check_index(index, path_or_id)
    options = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in index else {}
    try:
        with _without_dtype_warning():
            pipe = DiffusionPipeline.from_pretrained(
                str(path_or_id), torch_dtype=dtype, variant=variant or _only_variant(Path(path_or_id)), use_safetensors=True,
                trust_remote_code=False, **options,
            )  # fmt: skip
    except OSError as error:
        raise OSError(
            f"{path_or_id} cannot be loaded from .safetensors files, the only ones that ksag takes, because pickles (.bin, .ckpt) "
            f"can run any program. ({error})"
        ) from error
    channels = pipe.unet.config.in_channels
    if channels not in (4, 9):
        raise ValueError(
            f"{path_or_id} is a {type(pipe).__name__}, whose UNet takes {channels} channels. ksag samples those for text to image, "
            f"4 channels, and for inpainting, 9."
        )
    return pipe


def _index_of(path_or_id: str | Path) -> dict[str, Any]:
    """What a pipeline's model_index.json says."""
    path = Path(path_or_id)
    if path.is_dir():
        file = path / "model_index.json"
        if not file.is_file():
            raise ValueError(f"{path} is {_folder(path)}.")
        return json.loads(file.read_text())
    if path.suffix or path.is_absolute() or str(path_or_id).startswith(".") or str(path_or_id).count("/") != 1:
        raise FileNotFoundError(f"There is no file or folder {path_or_id}, and a hub id is owner/name.")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return json.loads(Path(hf_hub_download(str(path_or_id), "model_index.json")).read_text())
    except LocalEntryNotFoundError as error:
        raise OSError(
            f"There is no folder {path_or_id} here, and the hub cannot be reached. Give the folder of a pipeline."
        ) from error
    except OSError as error:
        raise OSError(f"There is no folder {path_or_id} here, and the hub says: {' '.join(str(error).split())}") from error


def _folder(path: Path) -> str:
    """What a folder without a model_index.json is."""
    if (path / "config.json").is_file():
        name = json.loads((path / "config.json").read_text()).get("_class_name", "model")
        return f"the folder of a {name} alone. Give the folder of the whole pipeline, which holds model_index.json"
    if files := sorted(path.glob("*.safetensors")):
        return f"not the folder of a diffusers pipeline: it has no model_index.json. Give one of its files, such as {files[0]}"
    return "not the folder of a diffusers pipeline: it has no model_index.json"


def _check_index(index: dict[str, Any], path_or_id: str | Path) -> None:
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise ValueError(f"{path_or_id} needs code of its own ({name}), which ksag does not run. {SUPPORTED}.")
    if index.get("unet") != ["diffusers", "UNet2DConditionModel"] or "vae" not in index:
        raise ValueError(f"{path_or_id} is a {name}. {SUPPORTED}: pipelines with a UNet and a VAE.")
    for part in "text_encoder", "text_encoder_2":
        _, encoder = index.get(part) or (None, None)
        if encoder is not None and "CLIP" not in encoder:
            raise ValueError(f"{path_or_id} is a {name} whose {part} is a {encoder}. {SUPPORTED}, whose text encoders are CLIP's.")


def _only_variant(folder: Path) -> str | None:
    """The variant of a folder whose UNet comes in no other."""
    names = [file.name.split(".") for file in folder.glob("unet/*.safetensors")]
    variants = {name[1].split("-")[0] for name in names if len(name) == 3}
    return variants.pop() if len(variants) == 1 and all(len(name) == 3 for name in names) else None

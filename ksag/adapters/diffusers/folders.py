"""A diffusers pipeline from a folder that anyone may have made.

Only the classes in `PARTS` are used, and only JSON, vocabularies and .safetensors files are read. diffusers and transformers do
not get the folder, because they follow names in it to code, pickles and other models. They get the values that ksag has read.
"""

import importlib
import inspect
import json
import logging
import math
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file
from torch import Tensor

from ksag.adapters.checkpoints import read_header

PIPELINES = (
    "StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline",
    "StableDiffusionControlNetPipeline", "StableDiffusionAdapterPipeline", "LatentConsistencyModelPipeline",
    "StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLControlNetPipeline", "StableDiffusionXLAdapterPipeline",
    "StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline",
    "FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline",
)  # fmt: skip

PARTS = {
    "unet": "diffusers: UNet2DConditionModel",
    "transformer": "diffusers: SD3Transformer2DModel FluxTransformer2DModel",
    "vae": "diffusers: AutoencoderKL",
    "controlnet": "diffusers: ControlNetModel",
    "adapter": "diffusers: T2IAdapter",
    "scheduler": "diffusers: DDIMScheduler DDPMScheduler DEISMultistepScheduler DPMSolverMultistepScheduler DPMSolverSDEScheduler "
    "DPMSolverSinglestepScheduler EDMDPMSolverMultistepScheduler EDMEulerScheduler EulerAncestralDiscreteScheduler "
    "EulerDiscreteScheduler FlowMatchEulerDiscreteScheduler HeunDiscreteScheduler KDPM2AncestralDiscreteScheduler "
    "KDPM2DiscreteScheduler LCMScheduler LMSDiscreteScheduler PNDMScheduler TCDScheduler UniPCMultistepScheduler",
    "text_encoder": "transformers: CLIPTextModel CLIPTextModelWithProjection T5EncoderModel",
    "tokenizer": "transformers: CLIPTokenizer CLIPTokenizerFast T5Tokenizer T5TokenizerFast",
    "image_encoder": "transformers: CLIPVisionModelWithProjection SiglipVisionModel",
    "feature_extractor": "transformers: CLIPImageProcessor CLIPFeatureExtractor SiglipImageProcessor",
    "safety_checker": "stable_diffusion: StableDiffusionSafetyChecker",  # never loaded
}
"""Part → its library and the classes it may have. A name may end in _2 or _3, as in text_encoder_2."""

VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")

CONFIGS = {"scheduler": "scheduler_config.json", "feature_extractor": "preprocessor_config.json"}

OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""How VAEs that were saved by diffusers before 0.17 name their attention."""

Weights: TypeAlias = Callable[[Path, dict[str, Any]], dict[str, Tensor]]
"""(folder of a part, its config) → its tensors."""

Loaded: TypeAlias = tuple[Any, Collection[str], Collection[str], Collection[str]]
"""A model, and the names of tensors that are missing, unexpected, or of another shape."""


def read_index(folder: Path) -> dict[str, Any]:
    """The model_index.json of a pipeline, without the parts that are null; a ValueError if it names a class not listed above."""
    file = folder / "model_index.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no model_index.json, so it is not the folder of a diffusers pipeline.")
    index = {name: value for name, value in _read_json(file).items() if value not in (None, [None, None])}
    pipeline = index.get("_class_name")
    if pipeline not in PIPELINES:
        raise ValueError(
            f"{folder} is a {pipeline!r:.200}. ksag samples Stable Diffusion 1.x, 2.x, XL, 3 and 3.5, and Flux, and runs no code "
            f"from a model folder."
        )
    for name, value in index.items():
        kind = re.sub(r"_[23]$", "", name)
        if name.startswith("_") or (kind not in PARTS and not isinstance(value, list)):
            continue
        library, _, classes = PARTS.get(kind, "").partition(": ")
        if value not in [[library, known] for known in classes.split()] or ("unet" in index and value[1] == "T5EncoderModel"):
            raise ValueError(
                f"{file} names {value!r:.200} as {name}. ksag knows no such {name} of a {pipeline}, and runs no code from a model "
                f"folder."
            )
    return index


def build(folder: Path, index: dict[str, Any], pipeline: str, dtype: torch.dtype, weights: Weights) -> Any:
    """A pipeline on the CPU, without a safety checker, from the configs in a folder. Errors begin with the file or folder."""
    whole = _class("diffusers", pipeline)
    parts: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(whole.__init__).parameters.items())[1:]:
        if isinstance(parameter.default, bool):
            parts[name] = name != "requires_safety_checker" and bool(index.get(name, parameter.default))
        elif name in index and name != "safety_checker":
            library, part = index[name]
            parts[name] = _load_part(folder / name, library, part, dtype, weights)
        elif name in ("unet", "transformer", "vae", "scheduler"):
            raise ValueError(f"{folder / 'model_index.json'} names no {name}, which a {pipeline} needs.")
        elif parameter.default is inspect.Parameter.empty:
            parts[name] = None
    pipe = _call(folder, whole, **parts)
    _fit_tokenizers(pipe, folder)
    _check_widths(pipe, folder)
    return pipe


def _load_part(folder: Path, library: str, name: str, dtype: torch.dtype, weights: Weights) -> Any:
    if not folder.is_dir():
        raise ValueError(f"{folder} is missing: model_index.json names it as a {name}.")
    if "Tokenizer" in name:
        if not any((folder / file).is_file() for file in VOCABULARIES):  # transformers would make an empty one
            raise ValueError(f"{folder} has no vocabulary: expected {' or '.join(VOCABULARIES)}. Download it again.")
        return _call(folder, _class(library, name).from_pretrained, str(folder), local_files_only=True, trust_remote_code=False)
    part = _class(library, name)
    config = _read_json(folder / CONFIGS.get(folder.name, "config.json")) | {"_class_name": name}
    if folder.name in CONFIGS:
        return _call(folder, part.from_config if library == "diffusers" else part.from_dict, config)
    make = _diffusers_model if library == "diffusers" else _transformers_model
    model, *differences = _call(folder, make, part, config, weights(folder, config), dtype)
    kinds = zip(("missing", "unexpected", "of another shape"), differences, strict=True)
    if found := [f"{kind}: {', '.join(sorted(names)[:3])} ({len(names)} in all)" for kind, names in kinds if names]:
        raise ValueError(f"{folder} has weights that do not fit its config.json. Tensors {'; '.join(found)}.")
    return model.eval()


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file} is missing.")
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON. Download it again. ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a JSON {type(content).__name__}, but an object was expected. Download it again.")
    return content


def _class(library: str, name: str) -> Any:
    """A class of diffusers or transformers, by the name it has in the installed version."""
    module = importlib.import_module(library)
    for spelling in (name, name.removesuffix("Fast"), name.replace("FeatureExtractor", "ImageProcessor")):
        if hasattr(module, spelling):
            return getattr(module, spelling)
    raise ValueError(f"{library} {module.__version__} has no {name}. Install a newer one: pip install -U {library}")


def _call(folder: Path, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a library, which can raise anything for damaged values, and says in one line which folder they are from."""
    try:
        return function(*args, **kwargs)
    except (MemoryError, ImportError):
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{folder} cannot be loaded: it is damaged, or made for another version. ({reason:.400})") from error


def _diffusers_model(part: Any, config: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype) -> Loaded:
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = part.from_config(config)
    expected = model.state_dict()
    mismatched = {name for name in expected.keys() & tensors.keys() if expected[name].shape != tensors[name].shape}
    if not mismatched:
        model.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, strict=False, assign=True)
    return model, expected.keys() - tensors.keys(), tensors.keys() - expected.keys(), mismatched


def _transformers_model(part: Any, config: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype) -> Loaded:
    """transformers itself renames tensors of older versions, ties weights and ignores superfluous ones."""
    # other entries of a config can make transformers load code, pickles and other models
    known = part.config_class().to_dict().keys() & config.keys()
    # transformers 4 leaves 8 bits as they are; bfloat16 holds them exactly
    tensors = {name: t.bfloat16() if t.is_floating_point() and t.itemsize == 1 else t for name, t in tensors.items()}
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)  # no report of tensors that do not fit: ksag's error names them
    try:
        model, info = part.from_pretrained(
            None, config=part.config_class(**{name: config[name] for name in known}), state_dict=tensors, dtype=dtype,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    finally:
        logger.setLevel(level)
    unexpected = [name for name in info["unexpected_keys"] if not name.endswith("position_ids")]
    mismatched = [entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]]
    return model, info["missing_keys"], unexpected, mismatched


def _fit_tokenizers(pipe: Any, folder: Path) -> None:
    """Limits CLIP's tokenizers to as many tokens as their text encoders take, which a folder may not say."""
    for name in (name for name in pipe.components if name.startswith("tokenizer")):
        tokenizer, encoder = getattr(pipe, name), getattr(pipe, name.replace("tokenizer", "text_encoder"))
        if tokenizer is None or encoder is None:
            continue
        if len(tokenizer) > encoder.config.vocab_size:
            raise ValueError(f"{folder / name} has {len(tokenizer)} tokens, its text encoder {encoder.config.vocab_size}.")
        longest = min(tokenizer.model_max_length, getattr(encoder.config, "max_position_embeddings", math.inf))
        if longest < 3:
            raise ValueError(f"{folder / name} has model_max_length={longest}: a prompt needs 3 tokens.")
        tokenizer.model_max_length = longest


def _check_widths(pipe: Any, folder: Path) -> None:
    """Refuses text encoders of another width than the UNet or transformer expects."""
    encoders = [part for name, part in pipe.components.items() if name.startswith("text_encoder")]
    if None in encoders:
        return
    if hasattr(pipe, "unet"):
        expected = pipe.unet.config.encoder_hid_dim or pipe.unet.config.cross_attention_dim
    else:
        expected = pipe.transformer.config.joint_attention_dim
        encoders = [encoder for encoder in encoders if encoder.config.model_type == "t5"]
    width = sum(encoder.config.hidden_size for encoder in encoders)
    if isinstance(expected, int) and width != expected:
        raise ValueError(f"{folder} has text encoders of another model: they give {width} channels, but {expected} are needed.")


def read_weights(folder: Path, variant: str | None) -> dict[str, Tensor]:
    """The tensors in the .safetensors files of a part: of the variant, else without one, else of the only variant."""
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(folder, variant):
        read_header(file)  # for its errors
        tensors |= load_file(file)
    if folder.name != "vae":
        return tensors
    old = r"\.(query|key|value|proj_attn)\.(weight|bias)$"
    return {re.sub(old, lambda match: f".{OLD_ATTENTION[match[1]]}.{match[2]}", name): t for name, t in tensors.items()}


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    pattern = r"(?:diffusion_pytorch_)?model(?:\.(\w+))?\.safetensors(?:\.index(?:\.(\w+))?\.json)?"
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    found = {match[1] or match[2] or "": match[0] for match in (re.fullmatch(pattern, name) for name in names) if match}
    name = found.get(variant or "") or found.get("") or ("".join(found.values()) if len(found) == 1 else None)
    if name is None:
        raise ValueError(
            f"{folder} has no weights that ksag loads, only {', '.join(names) or 'no files'}. They must be .safetensors files, "
            f"because pickles (.bin) can run any program. For weights of a variant, such as fp16, give variant=."
        )
    if not name.endswith(".json"):
        return [folder / name]
    shards = _read_json(folder / name).get("weight_map")
    files: list[Any] = list(shards.values()) if isinstance(shards, dict) else [shards]
    for file in files:
        if file not in names or not file.endswith(".safetensors"):
            raise ValueError(f"{folder / name} names {file!r:.200}, but there is no such .safetensors file in that folder.")
    return [folder / file for file in sorted(set(files))]

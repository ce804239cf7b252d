"""The bundled denoiser, and any other k-diffusion checkpoint of its form (README.md beside this file is its model card).

guided = ksag.SAGDenoiser(ksag.zoo.load(), cond_key="mapping_cond", **ksag.zoo.SETTINGS)
cond, uncond = ksag.zoo.conditioning(["Animals & Nature", "Food & Drink"], ["noto", "twemoji"])
"""

import difflib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import k_diffusion as K
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from ksag.model.checksum import checksum

EMOJI = Path(__file__).parent / "emoji.safetensors"
"""The bundled model's weights."""

CATEGORIES = (
    "Smileys & Emotion", "People & Body", "Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects", "Symbols",
)  # fmt: skip
"""Unicode's groups of emoji, in the order of the bundled model's one-hot categories."""

STYLES = ("noto", "noto-v1", "fluent-emoji", "fluent-emoji-flat", "fxemoji", "twemoji", "emojione")
"""The emoji sets that the bundled model was trained on, in the order of its one-hot styles."""

SETTINGS: dict[str, Any] = {
    "sag_scale": 1.4, "blur_sigma": 1.5, "sigma_range": (0.4, 12.0), "attention": "inner_model.u_net.u_blocks.1.1",
}  # fmt: skip
"""What to give `SAGDenoiser` for the bundled model, as `benchmarks/quality.py` chose it: its layer is the first one at 16 × 16 on
the way up."""


def save(
    weights: Mapping[str, Tensor], path: str | os.PathLike[str], config: dict[str, Any], record: dict[str, Any] | None = None
) -> None:
    """Writes a model's weights, as float16, with all that `load` needs: their config, and a checksum of both.

    Args:
        weights: the `state_dict()` of what `K.config.make_model(config)` makes.
        path: the safetensors file to write.
        config: the k-diffusion config, as read from JSON; `load_config(path)` finds it again.
        record: how the model was trained, kept as "training".
    """
    tensors = {name: tensor.detach().to("cpu", torch.float16).contiguous() for name, tensor in weights.items()}
    metadata = {"config": json.dumps(config)}
    if record is not None:
        metadata["training"] = json.dumps(record)
    save_file(tensors, path, metadata | {"sha256": checksum(tensors, metadata)})


def _read(weights: str | os.PathLike[str]) -> tuple[dict, dict[str, Tensor]]:
    """The config, with k-diffusion's defaults filled in, and the tensors of a file that is whole."""
    if os.path.isdir(weights):
        raise IsADirectoryError(f"{weights} is a folder; expected a safetensors file.")
    try:
        with safe_open(weights, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    except SafetensorError as error:
        raise ValueError(
            f"{weights} is cut off, or no safetensors file: {error}. A checkpoint of k-diffusion's training (.pth) becomes one "
            f"by its convert_for_inference.py."
        ) from error
    if "config" not in metadata:
        raise ValueError(
            f"{weights} has no k-diffusion config in its metadata, so the model cannot be built. ksag.zoo.save writes one, and "
            f"k-diffusion's convert_for_inference.py. For Stable Diffusion and other UNets of diffusers use "
            f"ksag.adapters.diffusers."
        )
    if "sha256" in metadata:
        if metadata["sha256"] != checksum(tensors, metadata):
            raise ValueError(f"{weights} is damaged: its checksum is not that of its weights and metadata. Fetch or save it again.")
    elif metadata.keys() != {"config"}:
        raise ValueError(
            f"{weights} has no checksum (sha256) in its metadata, only {', '.join(sorted(metadata))}. Either it is damaged, or "
            f"neither ksag.zoo.save wrote it nor k-diffusion's convert_for_inference.py, which leaves nothing but a config. "
            f"Fetch it again, or write it with one of them."
        )
    try:
        return K.config.load_config(json.loads(metadata["config"])), tensors
    except Exception as error:
        raise _bad_config(weights, error) from error


def _bad_config(weights: str | os.PathLike[str], error: Exception) -> ValueError:
    return ValueError(f"{weights} has a config that k-diffusion cannot build a model from: {type(error).__name__}: {error}.")


def load_config(weights: str | os.PathLike[str] = EMOJI) -> dict:
    """The k-diffusion config in the metadata of a safetensors file, with k-diffusion's defaults filled in.

    Args:
        weights: a safetensors file, as for `load`; by default the bundled model's.

    Raises:
        OSError: no such file, or a folder.
        ValueError: the file is damaged, no safetensors file, or holds no k-diffusion config.

    >>> load_config()["model"]["input_size"]
    [64, 64]
    """
    return _read(weights)[0]


def load(
    weights: str | os.PathLike[str] = EMOJI, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> K.layers.Denoiser:
    """A k-diffusion denoiser from a safetensors file; by default the bundled model of emoji.

    The bundled model takes what `conditioning` makes as `mapping_cond`, and denoises images of (b, 3, 64, 64) in [-1, 1] at
    sigma 0.32 to 160. Nothing is unpickled.

    Args:
        weights: a file of `save`, whose checksum tells damage to its weights or its config; or one of k-diffusion's
            `convert_for_inference.py`, which has no checksum, so that damage to its weights goes unseen.
        device: where to put the model.
        dtype: of the weights; they are stored as float16.

    Returns:
        `K.layers.Denoiser` in evaluation mode, channels last, without gradients for its weights.

    Raises:
        OSError: no such file, or a folder.
        ValueError: the file is damaged, no safetensors file, holds no k-diffusion config, or its weights do not fit it.

    >>> denoiser = load()
    >>> cond, _ = conditioning(["Food & Drink"])
    >>> image = denoiser(torch.randn(1, 3, 64, 64) * 80, torch.tensor([80.0]), mapping_cond=cond)
    >>> image.shape
    torch.Size([1, 3, 64, 64])
    """
    config, state = _read(weights)
    try:
        model = K.config.make_model(config)
        denoiser = K.config.make_denoiser_wrapper(config)(model)
    except Exception as error:
        raise _bad_config(weights, error) from error
    given, wanted = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (state, model.state_dict()))
    if wrong := sorted(name for name in given.keys() | wanted.keys() if given.get(name) != wanted.get(name)):
        raise ValueError(
            f"{weights} does not fit its own config: {len(wrong)} of its tensors differ from the model's {len(wanted)}. "
            f"{wrong[0]} is {given.get(wrong[0], 'missing')} in the file, and {wanted.get(wrong[0], 'unknown')} to the model."
        )
    model.load_state_dict(state)
    return denoiser.to(device, dtype).to(memory_format=torch.channels_last).eval().requires_grad_(False)


def one_hot(classes: Sequence[int], num_classes: int, device: str | torch.device = "cpu") -> Tensor:
    """Class vectors (b, num_classes) for `mapping_cond` of a class-conditional model; their `zeros_like` is no class.

    Args:
        classes: each sample's class, 0 to num_classes - 1.
        num_classes: how many the model knows.
        device: the model's.

    Raises:
        RuntimeError: no such class.

    >>> one_hot([1, 0], num_classes=3)
    tensor([[0., 1., 0.],
            [1., 0., 0.]])
    """
    return F.one_hot(torch.tensor(classes, dtype=torch.long, device=device), num_classes).float()


def _one_hot_names(what: str, given: Sequence[str | None], names: tuple[str, ...], device: str | torch.device) -> Tensor:
    """(b, len(names)); None is all zeros."""
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"{what} is a list with a name, or None for any, for each sample; got {given!r}.")
    for name in given:
        if name is not None and name not in names:
            near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"{name!r} is not one of the bundled model's {what}: {hint}It knows {', '.join(names)}; None is any.")
    rows = [[float(name == other) for other in names] for name in given]
    return torch.tensor(rows, device=device).reshape(len(given), len(names))


def conditioning(
    categories: Sequence[str | None], styles: Sequence[str | None] | None = None, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor]:
    """What the bundled model takes as `mapping_cond`: cond and uncond, (b, 15) each, one-hot category beside one-hot style.

    Args:
        categories: for each sample a name out of `CATEGORIES`, or None for any.
        styles: for each sample a name out of `STYLES`, or None for any; without them every sample has any style.
        device: the model's.

    Returns:
        cond, and uncond, which is all zeros: any category in any style.

    Raises:
        TypeError: no list.
        ValueError: no such name, or not one style for each category.

    >>> cond, uncond = conditioning(["Animals & Nature", None], ["noto", "twemoji"])
    >>> cond.nonzero().tolist(), uncond.any()
    ([[0, 2], [0, 8], [1, 13]], tensor(False))
    """
    category = _one_hot_names("categories", categories, CATEGORIES, device)
    style = _one_hot_names("styles", [None] * len(categories) if styles is None else styles, STYLES, device)
    if len(category) != len(style):
        raise ValueError(f"Give a category and a style for each sample, got {len(category)} categories and {len(style)} styles.")
    cond = torch.cat([category, style], dim=1)
    return cond, torch.zeros_like(cond)

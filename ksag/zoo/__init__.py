"""The bundled model of emoji, and any other k-diffusion model in a safetensors file. Model card: ksag/zoo/README.md.

guided = ksag.SAGDenoiser(ksag.zoo.load(), cond_key="mapping_cond", **ksag.zoo.SETTINGS)  # SAG alone
guided = ksag.GuidedDenoiser(ksag.zoo.load(), ksag.zoo.directions(), cond_key="mapping_cond")  # SAG and PAG
cond, uncond = ksag.zoo.conditioning(["Animals & Nature", "Food & Drink"], ["noto", "twemoji"])
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ksag import PAG, SAG, Direction
from ksag.zoo import files

if TYPE_CHECKING:  # the functions import it themselves, because it takes seconds
    import k_diffusion as K

EMOJI = Path(__file__).parent / "emoji.safetensors"
"""The bundled model's weights."""

CATEGORIES = (
    "Smileys & Emotion", "People & Body", "Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects", "Symbols",
)  # fmt: skip
"""Unicode's groups of emoji, in the order of the bundled model's one-hot categories."""

STYLES = ("noto", "noto-v1", "fluent-emoji", "fluent-emoji-flat", "fxemoji", "twemoji", "emojione")
"""The emoji sets that the bundled model was trained on, in the order of its one-hot styles."""

SETTINGS: dict[str, Any] = {
    "sag_scale": 1.96, "blur_sigma": 1.5, "sigma_range": (0.4, 12.0), "attention": "inner_model.u_net.u_blocks.1.1",
}  # fmt: skip
"""Recommended keywords of `SAGDenoiser` for the bundled model, chosen by `benchmarks/quality.py`. The layer is the first one at
16 × 16 in the decoder."""


PAG_LAYERS = ("inner_model.u_net.d_blocks.3.2", "inner_model.u_net.d_blocks.3.4", "inner_model.u_net.u_blocks.0.1")
"""The layers at 8 × 8 in the encoder, and the first one in the decoder."""


def directions(sag_scale: float = 0.98, pag_scale: float = 0.98) -> list[Direction]:
    """The recommended combination for the bundled model: the blur, layers and sigma range of `SETTINGS`, and PAG.

    Args:
        sag_scale, pag_scale: the recommended strengths for both together.
    """
    sag = {name: value for name, value in SETTINGS.items() if name != "sag_scale"}
    return [SAG(sag_scale, **sag), PAG(pag_scale, list(PAG_LAYERS), sigma_range=SETTINGS["sigma_range"])]


def save(
    weights: Mapping[str, Tensor], path: str | os.PathLike[str], config: dict[str, Any], record: dict[str, Any] | None = None
) -> None:
    """Writes a model's weights, as float16, with their config and a checksum of both.

    Args:
        weights: the `state_dict()` of `K.config.make_model(config)`.
        path: the safetensors file to write.
        config: the k-diffusion config, as read from JSON; `load_config(path)` returns it.
        record: how the model was trained, kept as "training".
    """
    halves = {name: tensor.detach().to("cpu", torch.float16) for name, tensor in weights.items()}
    files.write(path, halves, config=config, **({} if record is None else {"training": record}))


def _config_and_weights(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Of an undamaged file, with k-diffusion's defaults filled in."""
    import k_diffusion as K

    tensors, metadata = files.read(path)
    if not isinstance(metadata.get("config"), dict):
        raise ValueError(
            f"{path} has no k-diffusion config in its metadata; ksag.zoo.save and k-diffusion's convert_for_inference.py write it. "
            f"Load Stable Diffusion with ksag.adapters.diffusers, or ksag sample --pipeline."
        )
    if "sha256" not in metadata and metadata.keys() != {"config"}:  # convert_for_inference.py writes the config only
        raise ValueError(f"{path} has no checksum (sha256) in its metadata: it is damaged. Download it again.")
    with _named(path):
        return K.config.load_config(metadata["config"]), tensors


@contextlib.contextmanager
def _named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns any error of k-diffusion into one that names the file."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} has a config that k-diffusion cannot build its model from: {reason}") from error


def load_config(weights: str | os.PathLike[str] = EMOJI) -> dict[str, Any]:
    """The k-diffusion config in the metadata of a safetensors file, with k-diffusion's defaults filled in.

    Args:
        weights: a safetensors file, as for `load`; by default the bundled model's.

    Raises:
        OSError: no such file, or a folder.
        ValueError: the file is damaged, not a safetensors file, or holds no k-diffusion config.

    >>> load_config()["model"]["input_size"]
    [64, 64]
    """
    return _config_and_weights(weights)[0]


def load(
    weights: str | os.PathLike[str] = EMOJI, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> "K.layers.Denoiser":
    """A k-diffusion denoiser from a safetensors file; by default the bundled model of emoji.

    The bundled model takes the vectors of `conditioning` as `mapping_cond`, and denoises images of (b, 3, 64, 64) in [-1, 1] at
    sigma 0.32 to 160. Nothing is unpickled.

    Args:
        weights: a file written by `save`, whose checksum is verified; or by k-diffusion's `convert_for_inference.py`, which
            writes no checksum.
        device: where to put the model.
        dtype: of the weights; they are stored as float16.

    Returns:
        `K.layers.Denoiser` in evaluation mode, channels last, without gradients for its weights.

    Raises:
        OSError: no such file, or a folder.
        ValueError: the file is damaged, not a safetensors file, holds no k-diffusion config, or its weights do not fit it.

    >>> denoiser = load()
    >>> cond, _ = conditioning(["Food & Drink"])
    >>> image = denoiser(torch.randn(1, 3, 64, 64) * 80, torch.tensor([80.0]), mapping_cond=cond)
    >>> image.shape
    torch.Size([1, 3, 64, 64])
    """
    import k_diffusion as K

    config, state = _config_and_weights(weights)
    with _named(weights):
        model = K.config.make_model(config)
        denoiser = K.config.make_denoiser_wrapper(config)(model)
        model.load_state_dict(state)
    return denoiser.to(device, dtype).to(memory_format=torch.channels_last).eval().requires_grad_(False)


def one_hot(classes: Sequence[int | None], num_classes: int, device: str | torch.device = "cpu") -> Tensor:
    """Class vectors (b, num_classes) for `mapping_cond` of a class-conditional model.

    Args:
        classes: each sample's class, 0 to num_classes - 1; None is no class, all zeros.
        num_classes: how many the model was trained with.
        device: the model's.

    Raises:
        RuntimeError: no such class.

    >>> one_hot([1, None], num_classes=3)
    tensor([[0., 1., 0.],
            [0., 0., 0.]])
    """
    indices = torch.tensor([c or 0 for c in classes], dtype=torch.long, device=device)
    known = torch.tensor([c is not None for c in classes], device=device)
    return F.one_hot(indices, num_classes).float() * known[:, None]


def _indices(what: str, given: Sequence[str | None], names: tuple[str, ...]) -> list[int | None]:
    for name in given:
        if name is not None and name not in names:
            raise ValueError(f"{name!r} is not one of the bundled model's {what}: {', '.join(names)}; None is any.")
    return [None if name is None else names.index(name) for name in given]


def conditioning(
    categories: Sequence[str | None], styles: Sequence[str | None] | None = None, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor]:
    """The bundled model's `mapping_cond`: cond and uncond, (b, 15) each, a one-hot category followed by a one-hot style.

    Args:
        categories: for each sample a name out of `CATEGORIES`, or None for any.
        styles: for each sample a name out of `STYLES`, or None for any; without them every sample has any style.
        device: the model's.

    Returns:
        cond, and uncond, which is all zeros: any category in any style.

    Raises:
        ValueError: no such name, or not one style for each category.

    >>> cond, uncond = conditioning(["Animals & Nature", None], ["noto", "twemoji"])
    >>> cond.nonzero().tolist(), uncond.any()
    ([[0, 2], [0, 8], [1, 13]], tensor(False))
    """
    category = _indices("categories", categories, CATEGORIES)
    style = _indices("styles", [None] * len(category) if styles is None else styles, STYLES)
    if len(category) != len(style):
        raise ValueError(f"Give a category and a style for each sample, got {len(category)} categories and {len(style)} styles.")
    cond = torch.cat([one_hot(category, len(CATEGORIES), device), one_hot(style, len(STYLES), device)], dim=1)
    return cond, torch.zeros_like(cond)

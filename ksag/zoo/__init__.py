"""The bundled denoiser, and any other k-diffusion checkpoint of its form (README.md beside this file is its model card).

denoiser = ksag.zoo.load()
guided = ksag.SAGDenoiser(denoiser, cond_key="mapping_cond")
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import k_diffusion as K
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

CIFAR10 = Path(__file__).parent / "cifar10.safetensors"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""What the bundled model was trained on, in the order of its one-hot classes."""


def load_config(weights: str | os.PathLike[str] = CIFAR10) -> dict:
    """The k-diffusion config in the metadata of a safetensors file, with k-diffusion's defaults filled in.

    Args:
        weights: a safetensors file; by default the bundled model's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is cut off, no safetensors file, or holds no k-diffusion config.

    >>> load_config()["model"]["input_size"]
    [32, 32]
    """
    try:
        with safe_open(weights, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{weights} is cut off, or no safetensors file: {error}.") from error
    if "config" not in metadata:
        raise ValueError(
            f"{weights} has no k-diffusion config in its metadata, so the model cannot be built. Weights come from "
            f"scripts/train_cifar10.py, or from k-diffusion's convert_for_inference.py."
        )
    return K.config.load_config(json.loads(metadata["config"]))


def load(
    weights: str | os.PathLike[str] = CIFAR10, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> K.layers.Denoiser:
    """A k-diffusion denoiser from a safetensors file; by default the bundled class-conditional CIFAR-10 model.

    The bundled model takes `mapping_cond`, one-hot classes (b, 10), zeros for the unconditional class, and denoises
    images of (b, 3, 32, 32) in [-1, 1] at sigma 0.002 to 80. Nothing is unpickled.

    Args:
        weights: a safetensors file with a k-diffusion config in its metadata.
        device: where to put the model.
        dtype: of the weights; they are stored as float16.

    Returns:
        `K.layers.Denoiser` in evaluation mode, channels last, without gradients for its weights.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is cut off, no safetensors file, or its weights do not fit its config.

    >>> denoiser = load()
    >>> image = denoiser(torch.randn(1, 3, 32, 32) * 80, torch.tensor([80.0]), mapping_cond=one_hot([3]))
    >>> image.shape
    torch.Size([1, 3, 32, 32])
    """
    config = load_config(weights)
    model = K.config.make_model(config)
    with safe_open(weights, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    given, wanted = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (state, model.state_dict()))
    if wrong := sorted(name for name in given.keys() | wanted.keys() if given.get(name) != wanted.get(name)):
        raise ValueError(
            f"{weights} does not fit its own config: {len(wrong)} of its tensors differ from the model's {len(wanted)}. "
            f"{wrong[0]} is {given.get(wrong[0], 'missing')} in the file, and {wanted.get(wrong[0], 'unknown')} to the model."
        )
    model.load_state_dict(state)
    denoiser = K.config.make_denoiser_wrapper(config)(model)
    return denoiser.to(device, dtype).to(memory_format=torch.channels_last).eval().requires_grad_(False)


def one_hot(classes: Sequence[int], num_classes: int = 10, device: str | torch.device = "cpu") -> Tensor:
    """Class vectors (b, num_classes) for `mapping_cond`; their `zeros_like` is the unconditional class.

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


def conditioning(classes: Sequence[str | int], device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    """What the bundled model takes as `mapping_cond`, for each sample's class and for none: cond and uncond, (b, 10) each.

    Args:
        classes: a name out of `CLASSES`, or its number, for each sample.
        device: the model's.

    Raises:
        ValueError: no such class.

    >>> cond, uncond = conditioning(["cat", 7])
    >>> cond.argmax(dim=1), uncond.any()
    (tensor([3, 7]), tensor(False))
    """
    numbers = [CLASSES.index(name) if name in CLASSES else name for name in classes]
    for number in numbers:
        if number not in range(len(CLASSES)):
            raise ValueError(f"{number!r} is no class of the bundled model: give a list of 0 to 9, or of {', '.join(CLASSES)}.")
    cond = one_hot([int(number) for number in numbers], len(CLASSES), device)
    return cond, torch.zeros_like(cond)

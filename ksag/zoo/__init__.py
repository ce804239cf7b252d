"""The bundled denoiser, and any other k-diffusion checkpoint of its form (README.md beside this file is its model card).

denoiser = ksag.zoo.load()
guided = ksag.SAGDenoiser(denoiser, cond_key="mapping_cond")
"""

import hashlib
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

CIFAR10 = Path(__file__).parent / "cifar10.safetensors"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""What the bundled model was trained on, in the order of its one-hot classes."""


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """What a file's metadata holds as "sha256": the SHA-256 of every tensor and of all the other metadata, in hexadecimal.

    Args:
        tensors: their names, dtypes, shapes and bytes count, their order does not.
        metadata: the file's; its own "sha256" is left out.

    >>> checksum({"a": torch.zeros(2)}, {}) == checksum({"a": torch.zeros(2)}, {"sha256": "?"})
    True
    >>> checksum({"a": torch.zeros(2)}, {}) == checksum({"a": torch.zeros(1, 2)}, {})
    False
    """
    described = sorted((name, str(tensor.dtype), list(tensor.shape)) for name, tensor in tensors.items())
    others = sorted((name, text) for name, text in metadata.items() if name != "sha256")
    digest = hashlib.sha256(json.dumps([described, others]).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
            f"k-diffusion's convert_for_inference.py. Stable Diffusion and other UNets of diffusers are no models of the zoo: "
            f"ksag.adapters.diffusers takes them."
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


def load_config(weights: str | os.PathLike[str] = CIFAR10) -> dict:
    """The k-diffusion config in the metadata of a safetensors file, with k-diffusion's defaults filled in.

    Args:
        weights: a safetensors file, as for `load`; by default the bundled model's.

    Raises:
        OSError: no such file, or a folder.
        ValueError: the file is damaged, no safetensors file, or holds no k-diffusion config.

    >>> load_config()["model"]["input_size"]
    [32, 32]
    """
    return _read(weights)[0]


def load(
    weights: str | os.PathLike[str] = CIFAR10, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> K.layers.Denoiser:
    """A k-diffusion denoiser from a safetensors file; by default the bundled class-conditional CIFAR-10 model.

    The bundled model takes `mapping_cond`, one-hot classes (b, 10), zeros for the unconditional class, and denoises
    images of (b, 3, 32, 32) in [-1, 1] at sigma 0.002 to 80. Nothing is unpickled.

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
    >>> image = denoiser(torch.randn(1, 3, 32, 32) * 80, torch.tensor([80.0]), mapping_cond=one_hot([3]))
    >>> image.shape
    torch.Size([1, 3, 32, 32])
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

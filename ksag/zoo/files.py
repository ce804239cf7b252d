"""safetensors files with a checksum: the bundled weights and statistics."""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """The SHA-256 of every tensor and of the metadata, in hexadecimal.

    Args:
        tensors: their names, dtypes, shapes and bytes count; their order does not.
        metadata: the file's, as text; the entry "sha256" is left out.

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


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], **metadata: Any) -> None:
    """Writes tensors and metadata (as JSON) with a checksum of both, under "sha256"."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    texts = {name: json.dumps(value) for name, value in metadata.items()}
    save_file(on_cpu, path, texts | {"sha256": checksum(on_cpu, texts)})


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the metadata of a safetensors file. Metadata that is not JSON stays text.

    The checksum is verified if the metadata has one: "sha256" is then among them.

    Raises:
        OSError: no such file, or a folder.
        ValueError: not a safetensors file, or damaged.
    """
    with open(path, "rb"):
        pass  # its error names the file, and that of safetensors does not
    try:
        with safe_open(path, "pt") as file:
            texts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is not a dict
    except SafetensorError as error:
        raise ValueError(
            f"{path} is cut off, or not a safetensors file ({error}). k-diffusion's convert_for_inference.py makes one from a "
            f"checkpoint of its training."
        ) from error
    if "sha256" in texts and texts["sha256"] != checksum(tensors, texts):
        raise ValueError(f"{path} is damaged: its contents do not match its checksum. Download or save it again.")
    return tensors, {name: text if name == "sha256" else _decoded(text) for name, text in texts.items()}


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text

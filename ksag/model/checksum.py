"""The checksum by which a safetensors file of ksag tells that it is whole."""

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor


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

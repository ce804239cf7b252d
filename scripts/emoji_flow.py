"""The transformer of emoji that `train_emoji_flow.py` trains by flow matching: its conditioning and its files.

    velocity = emoji_flow.load("runs/emoji_flow", device="cuda")
    denoiser = ksag.FlowDenoiser(velocity)
    cond, uncond = ksag.zoo.conditioning(["Food & Drink"], device="cuda")

The files are safetensors of at most 15 MiB each. The large matrices are stored as int8 with one float32 scale per row, the other
weights as float16.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

SHARD_BYTES = 15 * 2**20
QUANTISED = 2**16
"""Matrices with at least this many elements are stored as int8."""
AUGMENTATIONS = 9
"""Numbers that describe an augmented picture; all zero for one that was not augmented."""


class EmojiFlow(nn.Module):
    """The velocity of `x_t = (1 - t) x_0 + t noise`, conditional on category and style.

    The condition enters twice, as in Stable Diffusion 3: as two tokens (category, style) of the joint attention, and as the
    pooled projection.

    Args:
        config: the recipe, as in `emoji_flow.json`.
        augmented: whether the pooled projection also has the numbers that describe an augmentation.
    """

    of_token: Tensor

    def __init__(self, config: dict[str, Any], augmented: bool = False) -> None:
        super().__init__()
        counts = torch.tensor([len(config["dataset"]["categories"]), len(config["dataset"]["styles"])])
        total = int(counts.sum())
        of_token = torch.arange(2).repeat_interleave(counts) == torch.arange(2)[:, None]
        self.register_buffer("of_token", of_token.float(), persistent=False)
        self.transformer: Any = SD3Transformer2DModel(
            **config["transformer"],
            joint_attention_dim=total,
            pooled_projection_dim=total + (AUGMENTATIONS if augmented else 0),
        )

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, augmentation: Tensor | None = None) -> Tensor:
        """The velocity (b, 3, 64, 64).

        Args:
            x: noisy pictures x_t (b, 3, 64, 64).
            t: times (b,), 0 for a clean picture, 1 for noise.
            cond: one-hot category beside one-hot style (b, 15); zeros for any. `ksag.zoo.conditioning` makes it.
            augmentation: (b, 9), only in training.
        """
        pooled = cond if augmentation is None else torch.cat([cond, augmentation], dim=1)
        tokens = cond[:, None] * self.of_token
        velocity: Tensor = self.transformer(x, tokens, pooled, 1000 * t, return_dict=False)[0]
        return velocity

    def loss(self, reals: Tensor, noise: Tensor, t: Tensor, cond: Tensor, augmentation: Tensor | None = None) -> Tensor:
        """The squared error of the velocity, (b,)."""
        part = t[:, None, None, None]
        velocity = self((1 - part) * reals + part * noise, t, cond, augmentation)
        return (velocity.float() - (noise - reals)).square().mean((1, 2, 3))


def initialise(model: EmojiFlow) -> None:
    """As in DiT: Xavier for the linear layers, and zeros for the layers that scale a block, which then starts as the identity."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    transformer = model.transformer
    patches = transformer.pos_embed.proj
    nn.init.xavier_uniform_(patches.weight.view(len(patches.weight), -1))
    nn.init.zeros_(patches.bias)
    scales = [norm.linear for block in transformer.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    for linear in (*scales, transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(linear.weight)


def inference_weights(model: EmojiFlow) -> dict[str, Tensor]:
    """The weights of a model for pictures that are not augmented: without the columns that read the augmentation."""
    state = dict(model.state_dict())
    name = "transformer.time_text_embed.text_embedder.linear_1.weight"
    state[name] = state[name][:, : model.of_token.shape[1]]
    return state


def packed(name: str, weight: Tensor) -> dict[str, Tensor]:
    """What is stored of one weight."""
    weight = weight.detach().cpu().float()
    if weight.ndim != 2 or weight.numel() < QUANTISED:
        return {name: weight.half()}
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return {name: (weight / scale).round().to(torch.int8), f"{name}.scale": scale}


def unpacked(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The float32 weights of what `packed` made."""
    return {
        name: tensor.float() * stored.get(f"{name}.scale", 1.0) for name, tensor in stored.items() if not name.endswith(".scale")
    }


def save(weights: Mapping[str, Tensor], folder: Path, config: dict[str, Any], record: dict[str, Any]) -> list[Path]:
    """Writes `emoji_flow-1-of-n.safetensors` and so on; each has the config and the training record in its metadata."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, weight in weights.items():
        stored = packed(name, weight)
        grown = sum(tensor.nbytes for tensor in stored.values())
        if shards[-1] and size + grown > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1] |= stored
        size += grown
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"config": json.dumps(config), "training": json.dumps(record), "files": str(len(shards))}
    paths = [folder / f"emoji_flow-{i}-of-{len(shards)}.safetensors" for i in range(1, len(shards) + 1)]
    for path, shard in zip(paths, shards, strict=True):
        save_file(shard, path, metadata)
    return paths


def read(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """The config, the training record, and the weights in the files of one training."""
    paths = sorted(Path(folder).glob("emoji_flow-*.safetensors"))
    stored: dict[str, Tensor] = {}
    described = set()
    for path in paths:
        with safe_open(path, framework="pt") as file:
            described.add(tuple(sorted(file.metadata().items())))
            stored |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    if len(described) != 1:
        raise ValueError(f"{folder} has files of {len(described)} trainings; expected the emoji_flow-*.safetensors of one.")
    metadata = dict(described.pop())
    if len(paths) != int(metadata["files"]):
        raise ValueError(f"{folder} has {len(paths)} of the {metadata['files']} files of the model. Copy the others beside them.")
    return json.loads(metadata["config"]), json.loads(metadata["training"]), unpacked(stored)


def load(folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> EmojiFlow:
    """The model in a folder that `train_emoji_flow.py` wrote: float32, in evaluation mode, without gradients for its weights.

    Raises:
        ValueError: files are missing, or the folder has files of several trainings.
    """
    config, _, weights = read(folder)
    model = EmojiFlow(config)
    model.load_state_dict(weights)
    return model.to(device).eval().requires_grad_(False)

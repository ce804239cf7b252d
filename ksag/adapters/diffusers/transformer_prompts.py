"""Prompts → the keywords of a transformer, by its pipeline's own `encode_prompt`."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

Texts: TypeAlias = list[str]

GUIDANCE = 3.5
"""The guidance scale that a model which takes it as an input gets by default, as in Flux's pipeline."""


def _stable_diffusion_3(pipe: Any, texts: Texts, second: Texts, n: int, clip_skip: int | None) -> dict[str, Any]:
    options = {"num_images_per_prompt": n, "do_classifier_free_guidance": False, "clip_skip": clip_skip}
    embeds, _, pooled, _ = pipe.encode_prompt(texts, second, None, **options)
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}


def _flux(pipe: Any, texts: Texts, second: Texts, n: int, clip_skip: int | None) -> dict[str, Any]:
    embeds, pooled, _ = pipe.encode_prompt(texts, second, num_images_per_prompt=n)
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}


def _chroma(pipe: Any, texts: Texts, second: Texts, n: int, clip_skip: int | None) -> dict[str, Any]:
    embeds, _, mask, *_ = pipe.encode_prompt(texts, num_images_per_prompt=n, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": embeds, "attention_mask": mask}


def _qwen_image(pipe: Any, texts: Texts, second: Texts, n: int, clip_skip: int | None) -> dict[str, Any]:
    embeds, mask = pipe.encode_prompt(texts, num_images_per_prompt=n, max_sequence_length=512)
    if mask is None:  # no padding; cond and uncond must have the same keys
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64, device=embeds.device)
    return {"encoder_hidden_states": embeds, "encoder_hidden_states_mask": mask}


ENCODERS: dict[str, Callable[..., dict[str, Any]]] = {
    "SD3Transformer2DModel": _stable_diffusion_3,
    "FluxTransformer2DModel": _flux,
    "ChromaTransformer2DModel": _chroma,
    "QwenImageTransformer2DModel": _qwen_image,
}
"""diffusers' class of the transformer → (pipe, texts, texts for the second encoder, n, clip_skip) → its keywords."""

TWO_TEXTS = ("SD3Transformer2DModel", "FluxTransformer2DModel")
DISTILLED = ("FluxTransformer2DModel",)
"""Sampled with cond alone, unless there is a negative prompt."""


def encode(
    pipe: Any, cond: list[Texts], uncond: list[Texts] | None, *, n: int, guidance: float | None, clip_skip: int | None
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """`conditioning` for a pipeline with a transformer; `cond` and `uncond` are the texts for each of two encoders."""
    name, kind = type(pipe).__name__, type(pipe.transformer).__name__
    if kind not in ENCODERS or getattr(pipe, "text_encoder", None) is None:
        raise TypeError(
            f"Expected a pipeline with text encoders and one of {', '.join(ENCODERS)}; got a {name}. Make cond and uncond of what "
            f"its encode_prompt returns: {{'encoder_hidden_states': ...}}."
        )
    if kind not in TWO_TEXTS and any(side[0] != side[1] for side in (cond, uncond) if side):
        raise ValueError(f"A {name} has one text encoder, so it takes no prompt_2 and no negative_prompt_2.")
    if clip_skip and kind != "SD3Transformer2DModel":
        raise ValueError(f"A {name} does not use the layers of a CLIP text encoder, so it takes no clip_skip.")
    takes_guidance = pipe.transformer.config.get("guidance_embeds", False)
    if guidance is not None and not takes_guidance:
        raise ValueError(f"The transformer of this {name} does not take its guidance scale as an input: leave guidance= out.")
    if uncond is None and kind not in DISTILLED:
        uncond = [[""] * len(cond[0])] * 2

    def side(texts: list[Texts]) -> dict[str, Any]:
        keywords = ENCODERS[kind](pipe, *texts, n, clip_skip)
        if takes_guidance:
            text = keywords["encoder_hidden_states"]
            keywords["guidance"] = torch.full(text.shape[:1], GUIDANCE if guidance is None else guidance, device=text.device)
        return keywords

    return side(cond), None if uncond is None else side(uncond)

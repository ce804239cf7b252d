"""Prompts of any length → the keywords of a UNet or transformer, with a pipeline's text encoders."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ksag.adapters.diffusers import transformer_prompts
from ksag.adapters.diffusers.networks import execution_device, trained_size

Prompt = str | Sequence[str]


@torch.no_grad()
def conditioning(
    pipe: Any,
    prompt: Prompt,
    negative_prompt: Prompt | None = None,
    *,
    prompt_2: Prompt | None = None,
    negative_prompt_2: Prompt | None = None,
    clip_skip: int | None = None,
    n: int = 1,
    size: tuple[int, int] | None = None,
    guidance: float | None = None,
    control: Any = None,
    control_scale: float | Sequence[float] = 1.0,
) -> tuple[dict[str, Any], Any]:
    """cond and uncond of a Stable Diffusion 1.x, 2.x, XL or 3, Flux, Chroma or Qwen-Image pipeline, `n` rows for each prompt.

        cond, uncond = conditioning(pipe, ["a cat", "a dog"], "blurry", n=2)   # four rows each

    For Stable Diffusion 1.x, 2.x and XL, a prompt of more than 75 tokens is encoded in chunks of up to 75, as in ComfyUI. A prompt
    shorter than another in its list is filled up with empty chunks. If cond and uncond have different lengths, both are repeated
    to their least common multiple, which does not change the UNet's cross-attention. The other pipelines cut long prompts with a
    warning. Parentheses and other weights are not interpreted. No gradients.

    Args:
        pipe: the pipeline.
        prompt: one, or a list of them.
        negative_prompt: the prompt for uncond: one, or one for each prompt. The default is the pipeline's: an empty prompt, zeros
            (usually for SDXL), or no uncond (Flux).
        prompt_2, negative_prompt_2: for the second text encoder of SDXL, Stable Diffusion 3 and Flux; by default the same.
        clip_skip: the number of the CLIP text encoders' last layers to leave out, in prompts and negative prompts, as diffusers
            counts. In A1111, this is "Clip skip" minus 1; for XL and 3, whose default is the last layer but one, minus 2.
        n: pictures for each prompt.
        size: (height, width) in pixels, an input of SDXL; by default what it was trained on.
        guidance: the guidance scale for models that take it as an input, such as Flux dev; 3.5 by default.
        control: the picture for the pipeline's ControlNet: PIL, or a tensor (1, 3, H, W) in [0, 1], or one for each prompt; for
            several ControlNets a list, one for each.
        control_scale: the strength of the ControlNet; for several a list.

    Returns:
        Two dicts of the network's keywords, for a `SAGDenoiser` with `cond_key=None`, such as `encoder_hidden_states`
            (rows, tokens, channels). uncond is None for Flux without a negative prompt: sample with cond alone.

    Raises:
        TypeError, ValueError: other text encoders, lists of different lengths, or an argument that the pipeline cannot use.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if control is not None and getattr(pipe, "controlnet", None) is None:
        raise ValueError(f"A {type(pipe).__name__} has no ControlNet, so it takes no control picture.")
    if getattr(pipe, "transformer", None) is not None:
        positive = _lists(prompts, prompt, prompt_2, 2)
        negative = None if negative_prompt is None else _lists(prompts, negative_prompt, negative_prompt_2, 2)
        return transformer_prompts.encode(pipe, positive, negative, n=n, guidance=guidance, clip_skip=clip_skip)
    if guidance is not None:
        raise ValueError("guidance= is for transformers that take their guidance scale as an input: leave it out.")
    encoders = _encoders(pipe)
    if len(encoders) == 1 and (prompt_2 is not None or negative_prompt_2 is not None):
        raise ValueError(f"A {type(pipe).__name__} has one text encoder, so it takes no prompt_2 and no negative_prompt_2.")
    cond, pooled = _encode(pipe, encoders, _lists(prompts, prompt, prompt_2, len(encoders)), clip_skip)
    if negative_prompt is None and negative_prompt_2 is None and pipe.config.get("force_zeros_for_empty_prompt"):
        uncond, negative_pooled = torch.zeros_like(cond), None if pooled is None else torch.zeros_like(pooled)
    else:
        negatives = _lists(prompts, negative_prompt or "", negative_prompt_2, len(encoders))
        uncond, negative_pooled = _encode(pipe, encoders, negatives, clip_skip)
    tokens = math.lcm(cond.shape[1], uncond.shape[1])
    sides: list[dict[str, Any]] = []
    for text, text_embeds in (cond, pooled), (uncond, negative_pooled):
        side: dict[str, Any] = {"encoder_hidden_states": text.repeat(1, tokens // text.shape[1], 1).repeat_interleave(n, dim=0)}
        if text_embeds is not None:
            time_ids = text.new_tensor(_time_ids(pipe, size, negative=bool(sides))).expand(len(prompts) * n, -1)
            side["added_cond_kwargs"] = {"text_embeds": text_embeds.repeat_interleave(n, dim=0), "time_ids": time_ids}
        sides.append(side)
    if control is not None:
        pictures = _control(pipe, control, size, len(prompts), n)
        scale = control_scale if isinstance(control_scale, (int, float)) else list(control_scale)
        for side in sides:
            side |= {"controlnet_cond": pictures, "conditioning_scale": scale}
    cond_side, uncond_side = sides
    return cond_side, uncond_side


def _encoders(pipe: Any) -> list[tuple[Any, Any]]:
    """The tokenizers, each with its text encoder."""
    pairs = [(getattr(pipe, f"tokenizer{i}", None), getattr(pipe, f"text_encoder{i}", None)) for i in ("", "_2")]
    found = [(tokenizer, encoder) for tokenizer, encoder in pairs if tokenizer is not None and encoder is not None]
    if not found or not all("CLIP" in type(encoder).__name__ for _, encoder in found):
        raise TypeError(
            f"Expected a Stable Diffusion 1.x, 2.x or XL pipeline, with CLIP text encoders; got a {type(pipe).__name__}. Make cond "
            f"and uncond of what its encode_prompt returns: {{'encoder_hidden_states': ...}}."
        )
    return found


def _lists(prompts: list[str], first: Prompt, second: Prompt | None, encoders: int) -> list[list[str]]:
    """For each text encoder one text for each prompt."""
    lists = []
    for texts in [first, first if second is None else second][:encoders]:
        texts = [texts] * len(prompts) if isinstance(texts, str) else list(texts)
        if len(texts) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but {len(texts)} texts beside them: give one for all, or one for each.")
        lists.append(texts)
    return lists


def _chunks(pipe: Any, tokenizer: Any, text: str) -> list[list[int]]:
    """The text's tokens, in chunks that fit between a begin and an end token; at least one chunk."""
    words = text.split()  # word by word, because a tokenizer warns of texts that are too long for one chunk
    if hasattr(pipe, "maybe_convert_prompt"):
        words = pipe.maybe_convert_prompt(words, tokenizer)  # a textual inversion of several vectors becomes several tokens
    tokens = [token for word in words for token in tokenizer(word, add_special_tokens=False).input_ids]
    room = tokenizer.model_max_length - 2
    return [tokens[i : i + room] for i in range(0, max(len(tokens), 1), room)]


def _padded(tokenizer: Any, chunk: list[int]) -> list[int]:
    row = [tokenizer.bos_token_id, *chunk, tokenizer.eos_token_id]
    return row + [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(row))


def _encode(
    pipe: Any, encoders: list[tuple[Any, Any]], texts: list[list[str]], clip_skip: int | None
) -> tuple[Tensor, Tensor | None]:
    """Texts for each encoder → (prompts, tokens, channels), and SDXL's pooled (prompts, channels)."""
    chunks = [[_chunks(pipe, tokenizer, text) for text in side] for (tokenizer, _), side in zip(encoders, texts, strict=True)]
    longest = max(len(of_text) for side in chunks for of_text in side)
    embeds, pooled = [], None
    is_xl = hasattr(pipe, "text_encoder_2")
    for (tokenizer, encoder), side in zip(encoders, chunks, strict=True):
        rows = [_padded(tokenizer, chunk) for of_text in side for chunk in (*of_text, *[[]] * (longest - len(of_text)))]
        text, pool = _hidden(pipe, encoder, torch.tensor(rows), clip_skip, is_xl)
        embeds.append(text.unflatten(0, (-1, longest)).flatten(1, 2))
        if is_xl:
            pooled = pool[::longest]  # the first chunk's, of the last encoder
    return torch.cat(embeds, dim=-1), pooled


def _hidden(pipe: Any, encoder: Any, ids: Tensor, clip_skip: int | None, is_xl: bool) -> tuple[Tensor, Tensor]:
    """(rows, 77, channels), and what the encoder returns first: the pooled (rows, channels) where it projects."""
    out = encoder(ids.to(execution_device(pipe.unet)), output_hidden_states=True)
    skipped = clip_skip or 0
    if not 0 <= skipped < len(out.hidden_states) - 1 - is_xl:
        raise ValueError(f"clip_skip={clip_skip}, but this text encoder has {len(out.hidden_states) - 1} layers.")
    if is_xl:  # the UNet was trained on the last layer but one, as it is
        return out.hidden_states[-2 - skipped], out[0]
    if not skipped:
        return out[0], out[0]
    norm = getattr(encoder, "text_model", encoder).final_layer_norm
    return norm(out.hidden_states[-1 - skipped]), out[0]


def _time_ids(pipe: Any, size: tuple[int, int] | None, negative: bool) -> list[float]:
    """SDXL's input about its picture: the size before cropping, the corner, and the size after it, or the refiner's score."""
    height, width = size or trained_size(pipe)
    if pipe.config.get("requires_aesthetics_score"):
        return [height, width, 0, 0, 2.5 if negative else 6.0]
    return [height, width, 0, 0, height, width]


def _control(pipe: Any, control: Any, size: tuple[int, int] | None, prompts: int, n: int) -> Any:
    """(rows, 3, H, W) in [0, 1]; for several ControlNets a list."""
    if hasattr(pipe.controlnet, "nets"):
        if not isinstance(control, (list, tuple)) or len(control) != len(pipe.controlnet.nets):
            raise ValueError(f"This pipeline has {len(pipe.controlnet.nets)} ControlNets: give control a list, a picture for each.")
        return [_rows(pipe, pictures, size, prompts, n) for pictures in control]
    return _rows(pipe, control, size, prompts, n)


def _rows(pipe: Any, pictures: Any, size: tuple[int, int] | None, prompts: int, n: int) -> Tensor:
    if isinstance(pictures, Tensor) and pictures.ndim != 4:
        raise ValueError(f"A control picture is a tensor (b, 3, H, W) in [0, 1], got {tuple(pictures.shape)}.")
    rows = pipe.control_image_processor.preprocess(pictures, *(size or trained_size(pipe)))
    if rows.shape[0] not in (1, prompts):
        raise ValueError(f"{rows.shape[0]} control pictures for {prompts} prompts: give one for all, or one for each.")
    rows = rows.expand(prompts, -1, -1, -1).repeat_interleave(n, dim=0)
    moved: Tensor = rows.to(execution_device(pipe.unet), pipe.controlnet.dtype)
    return moved

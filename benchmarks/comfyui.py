"""One guided step as ComfyUI takes it, plain and with its own node Self-Attention Guidance, for gpu.py to time.

Everything but the weights is ComfyUI's, imported from a checkout: its loader and UNet for Stable Diffusion 1.5, its model
management, its sampling function and comfy_extras/nodes_sag.py, all as without command-line options (contiguous, not channels
last). Latents and conditioning are float32, as ComfyUI holds them between passes. The weights are random, those of gpu.py's
UNet. One process keeps to the kind of device that it first asks for.

Tried with ComfyUI a061b06 (0.3.60) and a125cd8 (0.3.64), whose node and sampling function compute the same. From 0.3.61 on
the node's file imports PyAV: `pip install av`.
"""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

CFG, SAG = "ComfyUI: plain CFG", "ComfyUI: SAG node"


def state_dict(device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    with device:
        unet: Any = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    return unet.to(dtype).state_dict()


@torch.no_grad()
def steps(checkout: Path, side: int, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """One step each at sigma 4 and cond_scale 7.5 on latents (batch, 4, side, side), with the weights on the device already."""
    if (folder := str(checkout.resolve())) not in sys.path:
        sys.path.insert(0, folder)  # first, since ComfyUI has modules of common names, such as utils
    logging.getLogger().setLevel(logging.ERROR)  # its loader warns of every key that this UNet has no use for
    from comfy.cli_args import args  # type: ignore[import-not-found]  # which leaves this program's arguments alone

    args.cpu = device.type == "cpu"  # read when the next is imported
    from comfy import model_management, sampler_helpers, samplers, sd  # type: ignore[import-not-found]
    from comfy_extras.nodes_sag import SelfAttentionGuidance  # type: ignore[import-not-found]

    plain = sd.load_diffusion_model_state_dict(state_dict(device, dtype), model_options={"dtype": dtype})
    node = SelfAttentionGuidance()
    guided = getattr(node, node.FUNCTION)(model=plain, scale=0.5, blur_sigma=2.0)[0]  # a clone, which shares the model
    model_management.load_models_gpu([guided], force_full_load=True)
    guided.pre_run()
    model = guided.model

    x = torch.randn(batch, 4, side, side, device=device) * 4
    sigma = torch.full((batch,), 4.0, device=device)
    conds = {
        name: sampler_helpers.convert_cond([[torch.randn(batch, 77, 768, device=device), {}]]) for name in ("positive", "negative")
    }
    conds = samplers.process_conds(model, x, conds, device)

    def step_of(options: dict[str, Any]) -> Callable[[], None]:
        @torch.inference_mode()  # as ComfyUI's nodes run
        def step() -> None:
            samplers.sampling_function(model, x, sigma, conds["negative"], conds["positive"], 7.5, model_options=options)

        return step

    return {CFG: step_of(plain.model_options), SAG: step_of(guided.model_options)}

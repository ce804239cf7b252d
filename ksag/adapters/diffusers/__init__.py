"""Stable Diffusion and other diffusers UNets as k-diffusion denoisers, with what surrounds them: prompts, pictures, files.

pipe = ksag.adapters.diffusers.load("folder, hub id or .safetensors")
denoiser = ksag.adapters.diffusers.denoiser(pipe)
guided = ksag.SAGDenoiser(denoiser, cond_key=None)
cond, uncond = ksag.adapters.diffusers.conditioning(pipe, "a photograph of a cat", size=(512, 512))
"""

from ksag.adapters.diffusers.controlnet import ControlledUNet
from ksag.adapters.diffusers.denoisers import DiscreteDenoiser, EDMDenoiser, denoiser
from ksag.adapters.diffusers.loading import load
from ksag.adapters.diffusers.pictures import decode, encode
from ksag.adapters.diffusers.prompts import conditioning

__all__ = ["ControlledUNet", "DiscreteDenoiser", "EDMDenoiser", "conditioning", "decode", "denoiser", "encode", "load"]

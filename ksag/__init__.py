"""Guidance without training for any k-diffusion sampler: SAG, PAG and SEG, alone or together."""

from ksag.attention.find import AttentionLayer, list_attention
from ksag.denoiser import GuidedDenoiser, SAGDenoiser
from ksag.flow import FlowDenoiser
from ksag.guidance import cfg
from ksag.guidance.direction import Ask, Call, Direction
from ksag.guidance.pag import PAG
from ksag.guidance.sag import SAG, Guidance, self_attention_guidance
from ksag.guidance.seg import SEG
from ksag.guidance.trace import Trace, TraceStep

__all__ = [
    "PAG", "SAG", "SEG", "Ask", "AttentionLayer", "Call", "Direction", "FlowDenoiser", "Guidance", "GuidedDenoiser", "SAGDenoiser",
    "Trace", "TraceStep", "cfg", "list_attention", "self_attention_guidance",
]  # fmt: skip
__version__ = "0.2.0"

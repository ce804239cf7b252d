"""Self-Attention Guidance for any k-diffusion sampler."""

from ksag.attention.find import AttentionLayer, list_attention
from ksag.denoiser import SAGDenoiser
from ksag.guidance import cfg
from ksag.guidance.sag import Guidance, self_attention_guidance
from ksag.guidance.trace import Trace, TraceStep

__all__ = ["AttentionLayer", "Guidance", "SAGDenoiser", "Trace", "TraceStep", "cfg", "list_attention", "self_attention_guidance"]
__version__ = "0.1.0"

"""Self-Attention Guidance for any k-diffusion sampler."""

from ksag.attention import AttentionLayer, list_attention
from ksag.denoiser import SAGDenoiser
from ksag.trace import Trace, TraceStep

__all__ = ["AttentionLayer", "SAGDenoiser", "Trace", "TraceStep", "list_attention"]
__version__ = "0.1.0"

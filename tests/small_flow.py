"""The transformer of emoji with two small blocks and random weights."""

import json

import emoji_flow
import torch

from tests.emoji_packages import ROOT

CONFIG = json.loads((ROOT / "scripts/emoji_flow.json").read_text())
CONFIG["transformer"] |= {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "caption_projection_dim": 32}


def small_flow(augmented):
    torch.manual_seed(0)
    model = emoji_flow.EmojiFlow(CONFIG, augmented).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model

"""How is a transformer of emoji trained by flow matching?  `python scripts/train_emoji_flow.py --data emoji`

Trains the `SD3Transformer2DModel` of diffusers that `--config` describes on the pictures that `make_emoji.py` wrote, in pixels,
on one GPU. It writes into `--out`: `emoji_flow-*.safetensors`, the averaged weights, which `emoji_flow.load` reads;
`curve.json`, the losses along the run; and `samples.png`: one row per category, 24 steps of Euler, at the left without
classifier-free guidance, at the right from the same noise with cond_scale 2.
"""

import copy
import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
import diffusers
import torch
from emoji_flow import EmojiFlow, inference_weights, initialise, load, save
from torch import Tensor, nn
from torchvision.utils import save_image
from tqdm.auto import tqdm
from train_emoji import Pictures, augment, condition, ema_gamma, learning_rate, load_pictures, to_reals


def draw_times(n: int, mean: float, std: float, device: torch.device) -> Tensor:
    """Logit-normal times (n,), stratified."""
    u = (torch.arange(n, device=device) + torch.rand(n, device=device)) / n
    return torch.sigmoid(mean + std * 2**0.5 * torch.erfinv((2 * u - 1).clamp(-0.99999, 0.99999)))


def autocast(device: torch.device):
    return torch.autocast(device.type, torch.bfloat16) if device.type == "cuda" else nullcontext()


@torch.no_grad()
def held_out_loss(model: EmojiFlow, pictures: Pictures, config: dict[str, Any], draws: int = 4) -> float:
    """Mean loss over the held-out pictures, with the same noise, times and dropped conditions for every model."""
    device = pictures.images.device
    reals, losses = to_reals(pictures.images), []
    with torch.random.fork_rng([device] if device.type == "cuda" else []), autocast(device):
        torch.manual_seed(0)
        for _ in range(draws):
            t = draw_times(len(reals), **config["time"], device=device)
            t = t[torch.randperm(len(t), device=device)]  # the pictures are sorted by style
            parts = (reals, torch.randn_like(reals), t, condition(pictures, config["dataset"]))
            losses += [model.loss(*part) for part in zip(*(tensor.split(256) for tensor in parts), strict=True)]
    return torch.cat(losses).mean().item()


@torch.no_grad()
def sample_grid(model: EmojiFlow, categories: int, device: torch.device, columns: int = 8, steps: int = 24) -> Tensor:
    """Samples in [0, 1] (categories * 2 * columns, 3, size, size), row by row."""
    config = model.transformer.config
    generator = torch.Generator(device).manual_seed(0)
    shape = (categories * columns, config.in_channels, config.sample_size, config.sample_size)
    noise = torch.randn(shape, generator=generator, device=device)
    cond = torch.eye(categories, model.of_token.shape[1], device=device).repeat_interleave(columns, dim=0)
    halves = []
    for cond_scale in (1.0, 2.0):
        x = noise
        for t, following in torch.linspace(1, 0, steps + 1, device=device).unfold(0, 2, 1):
            with autocast(device):
                u, g = (model(x, t.expand(len(x)), c).float() for c in (torch.zeros_like(cond), cond))
            x = x + (following - t) * (u + (g - u) * cond_scale)
        halves.append(x.unflatten(0, (categories, columns)))
    return torch.cat(halves, dim=1).flatten(0, 1).clamp(-1, 1) * 0.5 + 0.5


@click.command(help=__doc__)
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True,
              help="The folder that make_emoji.py wrote.")  # fmt: skip
@click.option("--config", type=click.Path(exists=True, path_type=Path), default=Path(__file__).with_name("emoji_flow.json"),
              show_default=True, help="The recipe.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/emoji_flow"), show_default=True)
@click.option("--steps", default=5000, show_default=True)
@click.option("--minutes", type=float, help="Train for so long instead of so many steps; compilation does not count.")
@click.option("--batch-size", default=512, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--judge-every", default=500, show_default=True, help="Steps between held-out losses.")
@click.option("--compile/--no-compile", "compiled", default=True, show_default=True)
def main(data, config, out, steps, minutes, batch_size, seed, judge_every, compiled):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out.mkdir(parents=True, exist_ok=True)
    config = json.loads(config.read_text())
    dataset, opt = config["dataset"], config["optimizer"]
    training, held_out = (p.to(device) for p in load_pictures(data, dataset["categories"], dataset["styles"]))

    torch.manual_seed(seed)
    model = EmojiFlow(config, augmented=True).to(device)
    initialise(model)
    averaged, judged = copy.deepcopy(model).requires_grad_(False), EmojiFlow(config).to(device).eval()
    gamma = ema_gamma(config["ema_sigma_rel"])
    parameters, averages = list(model.parameters()), list(averaged.parameters())
    optimizer = torch.optim.AdamW(parameters, **opt, fused=device.type == "cuda")
    tqdm.write(f"{sum(p.numel() for p in parameters) / 1e6:.1f} M parameters, {len(training)} pictures, {len(held_out)} held out")

    loss_fn = torch.compile(model.loss) if compiled else model.loss
    running, step, curve = torch.tensor(float("nan"), device=device), 0, []
    started = time.monotonic()

    def elapsed() -> float:
        return time.monotonic() - started

    def judge() -> None:
        judged.load_state_dict(inference_weights(averaged))
        loss = held_out_loss(judged, held_out, config)
        curve.append({"step": step, "seconds": round(elapsed(), 1), "training_loss": running.item(), "held_out_loss": loss})
        (out / "curve.json").write_text(json.dumps(curve, indent=1))
        tqdm.write(f"step {step}: {elapsed():.0f} s, training loss {running.item():.5f}, held-out loss {loss:.5f}")

    progress = tqdm(total=None if minutes else steps, desc="training", mininterval=5)
    while (done := elapsed() / (60 * minutes) if minutes else step / steps) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(done, step, opt["lr"], config["warmup_steps"])
        batch = training[torch.randint(len(training), [batch_size], device=device)]
        reals, augmentation = augment(to_reals(batch.images), batch.mirror, config["augment_prob"])
        t = draw_times(batch_size, **config["time"], device=device)
        with autocast(device):
            loss = loss_fn(reals, torch.randn_like(reals), t, condition(batch, dataset), augmentation).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        progress.update()
        with torch.no_grad():
            torch._foreach_lerp_(list[Tensor](averages), list[Tensor](parameters), 1 - (1 - 1 / step) ** (gamma + 1))
        running = torch.where(running.isnan(), loss.detach(), running.lerp(loss.detach(), 0.01))
        if step == 1:
            running.item()
            started = time.monotonic()  # without the time to compile
        if step % 50 == 0:
            progress.set_postfix(loss=f"{running.item():.4f}", refresh=False)  # waits for the GPU, so that time is its time
        if step % judge_every == 0:
            judge()
    progress.close()
    if step % judge_every:
        judge()

    record = {
        "steps": step,
        "batch_size": batch_size,
        "seed": seed,
        "seconds": round(elapsed()),
        "training_loss": round(running.item(), 5),
        "held_out_loss": round(curve[-1]["held_out_loss"], 5),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    for old in out.glob("emoji_flow-*.safetensors"):
        old.unlink()
    paths = save(inference_weights(averaged), out, config, record)
    stored = load(out, device)
    size = sum(path.stat().st_size for path in paths)
    tqdm.write(f"{len(paths)} files in {out} ({size / 2**20:.1f} MiB): {json.dumps(record)}")
    tqdm.write(f"held-out loss of the weights as they are stored: {held_out_loss(stored, held_out, config):.5f}")
    save_image(sample_grid(stored, len(dataset["categories"]), device), out / "samples.png", nrow=16)


if __name__ == "__main__":
    main()

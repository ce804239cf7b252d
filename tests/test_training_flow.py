"""Does scripts/train_emoji_flow.py train a transformer of emoji, and does emoji_flow.load read what it wrote?"""

import json

import click.testing
import emoji_flow
import pytest
import torch
import train_emoji_flow

from ksag import zoo
from tests.emoji_packages import make_data
from tests.small_flow import CONFIG, small_flow


def inputs(b=3):
    torch.manual_seed(1)
    return torch.randn(b, 3, 64, 64), torch.rand(b), torch.eye(15)[[0, 9, 3]]


def test_times_are_logit_normal():
    torch.manual_seed(0)
    logits = torch.logit(train_emoji_flow.draw_times(10_000, 0.3, 1.2, torch.device("cpu")))
    expected = 0.3 + 1.2 * torch.distributions.Normal(0, 1).icdf((torch.arange(10_000) + 0.5) / 10_000)
    torch.testing.assert_close(logits[100:-100], expected[100:-100], atol=0.02, rtol=0)  # each is drawn within its own stratum


def test_the_loss_is_that_of_the_velocity():
    model, (reals, t, cond) = small_flow(augmented=False), inputs()
    noise = torch.randn_like(reals)
    for i in range(3):
        velocity = model((1 - t[i]) * reals[i : i + 1] + t[i] * noise[i : i + 1], t[i : i + 1], cond[i : i + 1])
        expected = (velocity - (noise[i] - reals[i])).square().mean()
        torch.testing.assert_close(model.loss(reals, noise, t, cond)[i], expected)


def test_category_and_style_change_the_velocity():
    model, (x, t, cond) = small_flow(augmented=False), inputs()
    none = model(x, t, torch.zeros_like(cond))
    assert ((model(x, t, cond) - none).abs().amax((1, 2, 3)) > 1e-3).all()


def test_inference_weights_are_the_model_with_no_augmentation():
    model, (x, t, cond) = small_flow(augmented=True), inputs()
    plain = emoji_flow.EmojiFlow(CONFIG).eval()
    plain.load_state_dict(emoji_flow.inference_weights(model))
    torch.testing.assert_close(plain(x, t, cond), model(x, t, cond, torch.zeros(3, 9)), atol=1e-5, rtol=1e-5)
    assert (model(x, t, cond, torch.ones(3, 9)) - plain(x, t, cond)).abs().max() > 1e-3


def test_weights_survive_storage(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji_flow, "QUANTISED", 1024)
    monkeypatch.setattr(emoji_flow, "SHARD_BYTES", 50_000)
    model = small_flow(augmented=False)
    paths = emoji_flow.save(model.state_dict(), tmp_path, CONFIG, {"seed": 7})
    assert len(paths) > 2 and all(path.stat().st_size < 60_000 for path in paths)
    config, record, weights = emoji_flow.read(tmp_path)
    assert config == CONFIG and record == {"seed": 7} and weights.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        largest = weight.abs().amax(-1, keepdim=True) if weight.ndim else weight.abs()
        assert ((weights[name] - weight).abs() <= largest / 250).all(), name  # half a step of int8
    assert emoji_flow.load(tmp_path)(*inputs()).isfinite().all()

    paths[1].unlink()
    with pytest.raises(ValueError, match=f"{len(paths) - 1} of the {len(paths)} files"):
        emoji_flow.load(tmp_path)
    emoji_flow.save(model.state_dict(), tmp_path, CONFIG, {"seed": 8})
    paths[0].rename(tmp_path / "emoji_flow-0-of-9.safetensors")
    emoji_flow.save(model.state_dict(), tmp_path, CONFIG, {"seed": 9})
    with pytest.raises(ValueError, match="files of 2 trainings"):
        emoji_flow.load(tmp_path)


def test_refuses_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="files of 0 trainings"):
        emoji_flow.load(tmp_path)


@pytest.mark.slow
def test_trains(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG | {"warmup_steps": 1}))
    arguments = ["--data", make_data(tmp_path), "--config", config, "--out", tmp_path / "out"]
    arguments = [str(part) for part in (*arguments, "--steps", 4, "--batch-size", 4, "--judge-every", 2)]
    result = click.testing.CliRunner().invoke(train_emoji_flow.main, [*arguments, "--no-compile"], catch_exceptions=False)
    assert result.exit_code == 0
    curve = json.loads((tmp_path / "out/curve.json").read_text())
    assert [row["step"] for row in curve] == [2, 4] and curve[-1]["held_out_loss"] < curve[0]["held_out_loss"]
    assert (tmp_path / "out/samples.png").stat().st_size > 10_000
    _, record, _ = emoji_flow.read(tmp_path / "out")
    assert record["steps"] == 4 and record["seed"] == 0
    cond, _ = zoo.conditioning(["Food & Drink"])
    assert emoji_flow.load(tmp_path / "out")(torch.randn(1, 3, 64, 64), torch.ones(1), cond).abs().max() > 1e-3

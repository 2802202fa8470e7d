"""Eq. 1 on cases that can be solved on paper, its draws and batches, and wrong settings."""
import sys
from pathlib import Path

import pytest
import torch

import train
from config import launch
from data import keyed_generator
from model import DiT, ModelConfig
from train import Config, draw, flow_loss

ROOT = Path(__file__).parent.parent
SMALL = ["--dim", "32", "--depth", "1", "--num_heads", "1", "--enc_dim", "8", "--resolution", "80",
         "--lr_decay", "0", "--train_batch_size", "4", "--save_every", "3", "--log_every", "1",
         "--device", "cpu"]


def small_net():
    torch.manual_seed(0)
    return DiT(ModelConfig(dim=32, depth=2, num_heads=1, enc_dim=8, resolution=64, ae_type="sd2"))


def random_batch(batch=4):
    g = torch.Generator().manual_seed(0)
    return (torch.randn(batch, 4, 8, 8, generator=g), torch.randn(batch, 4, 8, 8, generator=g),
            torch.randn(batch, 5, 8, generator=g))


def test_exact_velocity_has_zero_loss():
    """With z0 = 0 the latent is z_t = t noise, so the exact velocity is z_t / t."""
    z0, t = torch.zeros(4, 4, 8, 8), torch.tensor([0.1, 0.4, 0.7, 1.0])
    noise = torch.randn(z0.shape, generator=torch.Generator().manual_seed(0))
    loss = flow_loss(lambda z_t, t, *_: z_t / t.view(-1, 1, 1, 1), z0, z0, torch.zeros(4, 5, 8),
                     t, noise, partial=t > 0.5, alpha=t)
    assert loss < 1e-12


def test_partial_samples_see_weak_structure_and_no_semantics_and_full_samples_see_all():
    z0, c_str, c_sem = random_batch()
    seen = {}

    def net(z_t, t, c_str, c_sem):
        seen.update(c_str=c_str, c_sem=c_sem)
        return z_t

    partial, alpha = torch.tensor([True, False, True, False]), torch.tensor([0.1, 0.2, 0.25, 0.05])
    flow_loss(net, z0, c_str, c_sem, torch.full((4,), 0.5), z0, partial, alpha)
    for b in range(4):
        assert torch.equal(seen["c_str"][b], alpha[b] * c_str[b] if partial[b] else c_str[b])
        assert torch.equal(seen["c_sem"][b], torch.zeros_like(c_sem[b]) if partial[b] else c_sem[b])


def test_one_batch_overfits_to_near_zero_loss():
    net, (z0, c_str, c_sem) = small_net(), random_batch()
    drawn = draw(Config(), z0, torch.Generator().manual_seed(1))
    opt = torch.optim.AdamW(net.parameters(), lr=3e-3)
    first = flow_loss(net, z0, c_str, c_sem, **drawn).item()
    for _ in range(250):
        loss = flow_loss(net, z0, c_str, c_sem, **drawn)
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert first > 1.5 and loss < 0.02


def test_draws_follow_the_published_laws():
    z0 = torch.zeros(20_000, 1, 1, 1)
    drawn = draw(Config(), z0, torch.Generator().manual_seed(0))
    assert abs(drawn["t"].mean() - 0.5) < 0.01 and drawn["t"].min() >= 0 and drawn["t"].max() < 1
    assert abs(drawn["partial"].float().mean() - 0.1) < 0.01
    assert drawn["alpha"].min() >= 0.05 and drawn["alpha"].max() <= 0.25
    assert drawn["alpha"].unique().numel() > 9_000                              # per sample, not per batch
    assert abs(drawn["strength"].median() - 0.9933) < 0.001


def test_two_ranks_share_the_crops_of_one_process_and_draw_their_own_random_numbers():
    cfg = Config(resolution=80, train_batch_size=4, max_train_steps=2, cache=0)

    def first(rank, world):
        return next(train.batches(cfg, lambda hr, lr: (hr, lr), 0, rank, world, torch.device("cpu")))

    whole, left, right = first(0, 1), first(0, 2), first(1, 2)
    assert torch.equal(torch.cat([left[0], right[0]]), whole[0])                # crops: no overlap, none lost
    assert not torch.equal(left[0], right[0]) and not torch.equal(left[1], right[1])
    z0 = torch.zeros(2, 4, 4, 4)
    a, b = (draw(cfg, z0, keyed_generator("cpu", cfg.seed, 0, 0, rank)) for rank in (0, 1))
    assert all(not torch.equal(a[key], b[key]) for key in ("t", "noise", "alpha", "strength", "struct_noise"))


def test_accumulated_micro_batches_see_the_crops_of_one_large_batch():
    def crops(count, **sizes):
        cfg = Config(resolution=80, max_train_steps=2, cache=0, **sizes)
        stream = train.batches(cfg, lambda hr, lr: (hr,), 0, 0, 1, torch.device("cpu"))
        return torch.cat([next(stream)[0] for _ in range(count)])

    whole = crops(1, train_batch_size=4)
    assert torch.equal(whole, crops(2, train_batch_size=2, gradient_accumulation_steps=2))


def test_learning_rate_is_constant_and_then_a_cosine_to_zero():
    cfg = Config(learning_rate=1.0, lr_decay=0.5, max_train_steps=100)
    assert train.rate(cfg, 0) == train.rate(cfg, 50) == 1.0
    assert abs(train.rate(cfg, 75) - 0.5) < 1e-9 and train.rate(cfg, 99) < 0.01
    assert train.rate(Config(learning_rate=1.0, lr_decay=0.0, max_train_steps=100), 99) == 1.0


def test_wrong_settings_end_in_one_line_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for words, reason in ((("--resolution", "40"), "--dim is a multiple of 4 x --num_heads, --resolution of"),
                          (("--resolution", "16"), "--resolution starts at 32, got 16"),
                          (("--save_every", "0"), "--save_every starts at 1"),
                          (("--ae_type", "foo"), "--ae_type is one of tiny"),
                          (("--device", "foo"), "device 'foo' is not available"),
                          (("--data", "nowhere"), "nowhere does not exist"),
                          (("--weights", "nowhere"), "missing: nowhere")):
        monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, "--out", str(tmp_path / "run"), *words])
        with pytest.raises(SystemExit) as stop:
            launch(train.main)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith(f"error: {reason}") and error.count("\n") == 1


def test_the_log_tells_the_loss_by_quarters_of_t():
    """A network that returns 0 has the error ||noise - z0||^2 whatever t is: 4 where noise - z0 = 2."""
    z0, t, log = torch.zeros(5, 4, 8, 8), torch.tensor([0.0, 0.2, 0.3, 0.99, 1.0]), torch.zeros(2, 4)
    no = torch.zeros(5, dtype=torch.bool)
    loss = flow_loss(lambda z_t, *_: 0 * z_t, z0, z0, torch.zeros(5, 1, 8), t, z0 + 2, no, t, log=log)
    assert loss == 4 and log.tolist() == [[8, 4, 0, 8], [2, 1, 0, 2]]


def test_recomputed_activations_give_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        net, (z0, c_str, c_sem) = small_net(), random_batch()
        for seed, p in enumerate(net.parameters()):
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) * 0.1
        net.recompute = recompute
        flow_loss(net, z0, c_str, c_sem, **draw(Config(), z0, torch.Generator().manual_seed(1))).backward()
        gradients.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))

"""Eq. 4-17 where the answer is known: pictures of one number, drawn from two Gaussians.

The teacher is the exact velocity of that mixture, so what a student should do in one step from t = 1 to 0 is
the solution of dz/dt = v_g (Eq. 5), integrated here in float64.
"""
import math
from itertools import pairwise

import pytest
import torch

from data import keyed_generator
from distill import Config, draw, one_step, rc_loss, shortcut_loss
from model import per_sample

WIDTH, BATCH, STEPS = 0.5, 256, 1500
GRID = torch.linspace(-2.5, 2.5, 101).view(-1, 1, 1, 1)                         # z1
WEIGHT = torch.softmax(-GRID.double() ** 2 / 2, 0)                              # as noise is drawn
LOSSES = {"rc": rc_loss, "shortcut": shortcut_loss}


def condition(count, **kind):
    """c_str, c_sem, all ones: the two say together how many pictures lie around +1."""
    return torch.ones(count, 1, 1, 1, **kind), torch.ones(count, 1, 1, **kind)


def share(c_str, c_sem):
    """Part of the pictures around +1, the others are around -1: 0.8 with both conditions, 0.5 with none."""
    return 0.5 + 0.2 * c_str + 0.1 * c_sem.unsqueeze(-1)


def teacher(z_t, t, c_str, c_sem):
    """v(z, t) = E[noise - z0 | z_t = z], all (B, 1, 1, 1); z_t is a mixture, too, of this variance."""
    t, p = per_sample(t), share(c_str, c_sem)
    variance, logits, v = (1 - t) ** 2 * WIDTH**2 + t**2, [], []
    for mean, weight in ((-1, 1 - p), (1, p)):
        off = z_t - (1 - t) * mean
        logits.append(weight.log() - off**2 / (2 * variance))
        v.append((t - (1 - t) * WIDTH**2) / variance * off - mean)
    return (torch.stack(logits).softmax(0) * torch.stack(v)).sum(0)


def guided(z, t, omega):
    """Eq. 5 at one time for all, with alpha 0.1."""
    t, (c_str, c_sem) = z.new_full((len(z),), t), condition(len(z), dtype=z.dtype)
    weak = teacher(z, t, 0.1 * c_str, 0 * c_sem)
    return weak + omega * (teacher(z, t, c_str, c_sem) - weak)


def follow(omega, steps, order=4):
    """z0 (101, 1, 1, 1) that the teacher reaches from GRID, by Runge and Kutta or, of order 1, by Euler."""
    z, h = GRID.double(), 1 / steps
    for n in range(steps):
        t = 1 - n * h
        k = k1 = guided(z, t, omega)
        if order == 4:
            k2 = guided(z - h / 2 * k1, t - h / 2, omega)
            k3 = guided(z - h / 2 * k2, t - h / 2, omega)
            k = (k1 + 2 * k2 + 2 * k3 + guided(z - h * k3, t - h, omega)) / 6
        z = z - h * k
    return z


def distance(a, b):
    """Root mean square over noise; a picture deviates by about 1 from the mean of all."""
    return (WEIGHT * (a - b) ** 2).sum().sqrt().item()


class Student(torch.nn.Module):
    """u(z_t, t, r) by 8,800 weights; the condition is the same for all, so it is not read."""
    def __init__(self, width=64):
        super().__init__()
        sides, layers = (5, width, width, width, 1), []
        for a, b in pairwise(sides):
            layers += [torch.nn.Linear(a, b), torch.nn.SiLU()]
        self.layers = torch.nn.Sequential(*layers[:-1])

    def forward(self, z_t, t, c_str, c_sem, r):
        z, t, r = z_t.flatten(1), t[:, None], r[:, None]
        return self.layers(torch.cat([z, t, r, t - r, z * t], 1))[..., None, None]


def learn(loss_fn, omega, marks=(0, 100, 400, STEPS), seed=0):
    """One-step maps (101, 1, 1, 1) after these numbers of training steps; t and r by distill.draw."""
    torch.manual_seed(seed)                                                     # initial weights
    cfg, student, maps = Config(strength_mean=99.0, delta=0.05), Student(), {}  # 99: no noise in c_str
    opt = torch.optim.Adam(student.parameters(), betas=(0.9, 0.95), fused=True)
    conditions = condition(BATCH)
    for step in range(STEPS + 1):
        if step in marks:
            with torch.no_grad():
                maps[step] = one_step(student, GRID, *condition(len(GRID))).double()
        g = keyed_generator("cpu", seed, step)
        sign = torch.where(torch.rand(BATCH, 1, 1, 1, generator=g) < share(*conditions), 1.0, -1.0)
        z0 = sign + WIDTH * torch.randn(BATCH, 1, 1, 1, generator=g)
        opt.param_groups[0]["lr"] = 4e-3 * (0.5 + 0.5 * math.cos(math.pi * step / STEPS))
        loss, _ = loss_fn(student, teacher, z0, *conditions, **draw(cfg, z0, g), omega=omega, delta=cfg.delta)
        opt.zero_grad()
        loss.backward()
        opt.step()
    return maps


def test_the_integrated_map_is_the_one_that_keeps_the_order_of_pictures():
    """Without guidance the flow carries noise to data and never crosses: equal quantiles, Phi(z1) = F(z0)."""
    z0, p, phi = follow(omega=1, steps=200), 0.8, torch.special.ndtr
    quantile = p * phi((z0 - 1) / WIDTH) + (1 - p) * phi((z0 + 1) / WIDTH)
    assert (quantile - phi(GRID.double())).abs().max() < 1e-7


@pytest.mark.slow
@pytest.mark.parametrize(("method", "bound"), [("rc", 0.07), ("shortcut", 0.08)])
def test_one_step_of_the_student_is_the_whole_flow_of_the_teacher(method, bound):
    """A picture is about 1 from the mean of all, which is where one step of the teacher lands. The fixed
    point of rc is 1 / delta = 20 Euler steps, which miss by 0.053. Over seeds rc ends at 0.025 to 0.038,
    shortcut at 0.032 to 0.055; rc without the step of Eq. 13 at 0.086, shortcut without its second half at
    1.03, anything with a wrong sign, rollout, weight or omega above 0.19."""
    omega, true = 0.5, follow(0.5, steps=200)
    euler = {n: distance(follow(omega, n, order=1), true) for n in (1, 2, 4, 8, 20)}
    error = {step: distance(z0, true) for step, z0 in learn(LOSSES[method], omega).items()}
    print(f"\n{method}: rms error of z0 by training steps",
          "  ".join(f"{step}: {e:.3f}" for step, e in error.items()))
    print("teacher by Euler steps", "  ".join(f"{n}: {e:.3f}" for n, e in euler.items()))
    assert error[STEPS] < bound and error[STEPS] < euler[1] / 10
    assert error[0] > 1.5 * error[100] and error[100] > 1.5 * error[STEPS]
    assert distance(follow(1, 200), true) > 2 * bound                           # another omega would be seen

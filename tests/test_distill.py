"""Eq. 4-17 on a flow with a known solution: all pictures are zero, so v(z, t) = z / t and z_r = z_t r / t."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data import keyed_generator
from distill import Config, base_loss, draw, edges, one_step, pixel_loss, rc_loss, shortcut_loss
from model import AutoencoderKL, DINOv2, DiT, ModelConfig, load_vae, per_sample

ROOT = Path(__file__).parent.parent
SMALL = ["--dim", "32", "--depth", "1", "--num_heads", "1", "--enc_dim", "8", "--resolution", "80",
         "--cache", "8", "--train_batch_size", "4", "--device", "cpu", "--max_train_steps", "2",
         "--save_every", "1"]


def exact(z_t, t, c_str, c_sem, r=None):
    """Velocity and, as the path is a straight line, also the average velocity from t to any r."""
    return z_t / per_sample(t)


def problem(batch=6):
    g = torch.Generator().manual_seed(0)
    z0, c_str = torch.zeros(batch, 4, 8, 8), torch.randn(batch, 4, 8, 8, generator=g)
    t = torch.tensor([1.0, 0.9, 0.7, 0.5, 0.305, 0.3])[:batch]
    r = torch.tensor([0.0, 0.2, 0.69, 0.0, 0.3, 0.3])[:batch]                    # far, near and equal
    noise = torch.randn(z0.shape, generator=g)
    partial = torch.tensor([False, True, False, False, True, False])[:batch]
    return dict(z0=z0, c_str=c_str, c_sem=torch.randn(batch, 5, 8, generator=g), t=t, r=r, noise=noise,
                partial=partial)


@pytest.mark.parametrize("loss_fn", [rc_loss, shortcut_loss])
def test_the_exact_student_has_zero_loss(loss_fn):
    loss, parts = loss_fn(exact, exact, **problem())
    assert loss < 1e-6 and parts["v_loss"] < 1e-12


@pytest.mark.parametrize("loss_fn", [rc_loss, shortcut_loss])
def test_a_student_that_ignores_the_distance_is_punished(loss_fn):
    """1.5 z / t for r < t is right for the base loss alone."""
    def wrong(z_t, t, c_str, c_sem, r):
        return exact(z_t, t, c_str, c_sem) * per_sample(torch.where(r < t, 1.5, 1.0))

    loss, parts = loss_fn(wrong, exact, **problem())
    assert parts["v_loss"] < 1e-12 and loss > 0.01


def test_one_step_of_the_exact_student_reaches_the_picture():
    z1 = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert one_step(exact, z1, None, None).abs().max() < 1e-6


def test_the_teacher_target_is_the_guided_velocity_of_equation_5():
    def teacher(z_t, t, c_str, c_sem):
        return c_str                                                            # v_cond = c, v_pcond = weak c

    p = problem()
    full, weak = (p["c_str"], p["c_sem"]), (0.1 * p["c_str"], 0 * p["c_sem"])
    _, parts = base_loss(exact, teacher, p["noise"], p["t"], full, full, weak, omega=0.5, interval=(0.4, 1))
    wanted = torch.where(per_sample(p["t"] >= 0.4), 0.55, 1.0) * p["c_str"]
    assert torch.allclose(parts["v_guided"], wanted, atol=1e-6)


@pytest.mark.parametrize("loss_fn", [rc_loss, shortcut_loss])
def test_gradients_reach_the_student_and_not_the_teacher(loss_fn):
    torch.manual_seed(0)
    cfg = dict(dim=32, depth=1, num_heads=1, enc_dim=8, resolution=64, ae_type="sd2")
    teacher, student = DiT(ModelConfig(**cfg)), DiT(ModelConfig(**cfg, auxiliary_time_cond=True))
    for net in (teacher, student):
        torch.nn.init.normal_(net.final_layer.linear.weight, std=0.1)
    loss, _ = loss_fn(student, teacher, **problem())
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())
    assert student.r_embedder.mlp[2].weight.grad.abs().max() > 0


def test_a_fresh_student_equals_its_teacher_where_r_is_t():
    torch.manual_seed(0)
    cfg = dict(dim=32, depth=1, num_heads=1, enc_dim=8, resolution=64, ae_type="sd2")
    teacher, student = DiT(ModelConfig(**cfg)), DiT(ModelConfig(**cfg, auxiliary_time_cond=True))
    torch.nn.init.normal_(teacher.final_layer.linear.weight, std=0.1)
    student.load_state_dict(student.state_dict() | teacher.state_dict())
    p = problem()
    args = p["noise"], p["t"], p["c_str"], p["c_sem"]
    assert torch.equal(teacher(*args), student(*args, r=p["t"]))
    assert not torch.equal(teacher(*args), student(*args, r=0 * p["t"]))


def test_times_follow_the_published_law_and_corners_sit_at_one_and_zero():
    z0 = torch.zeros(40_000, 1, 1, 1)
    drawn = draw(Config(), z0, keyed_generator("cpu", 0))
    t, r = drawn["t"], drawn["r"]
    assert abs(t.mean() - 2 / 3) < 0.01 and abs((r / t).mean() - 0.5) < 0.01
    assert (r <= t).all()
    drawn = draw(Config(corner=0.25), z0, keyed_generator("cpu", 0))
    corner = (drawn["t"] == 1) & (drawn["r"] == 0)
    assert abs(corner.float().mean() - 0.25) < 0.01
    drawn = draw(Config(corner=1, few=4), z0, keyed_generator("cpu", 0))
    assert torch.allclose(drawn["t"] - drawn["r"], torch.tensor(0.25))
    assert torch.equal((4 * drawn["r"]).unique(), torch.arange(4.0))
    for law, mean, spread in (("uniform", 1 / 2, 12**-0.5), ("normal", 1 / 2, 0.2083)):
        t = draw(Config(law=law), z0, keyed_generator("cpu", 0))["t"]
        assert abs(t.mean() - mean) < 0.005 and abs(t.std() - spread) < 0.005


def test_pixel_loss_counts_pixels_once_and_edges_half():
    a = torch.zeros(1, 3, 4, 4)
    b = a.clone()
    b[..., 2:] = 1.0                                                            # one vertical edge, height 1
    assert pixel_loss(a, a) == 0 and pixel_loss(a + 0.25, a) == 0.25
    assert torch.isclose(pixel_loss(b, a), torch.tensor(0.5 + 0.5 * 1 / 3))
    assert [e.shape[-2:] for e in edges(a)] == [(4, 3), (3, 4)]


def start(script, *words, code=0):
    done = subprocess.run([sys.executable, script, *SMALL, *map(str, words)], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == code, done.stderr[-2000:]
    return done


@pytest.mark.slow
def test_the_whole_family_is_made_stage_by_stage_and_then_samples(tmp_path):
    weights, family = tmp_path / "weights", tmp_path / "weights" / "tiny"
    common = ("--weights", weights, "--export", family)
    start("distill.py", "--method", "autoencoder", *common, "--out", tmp_path / "ae")
    start("train.py", *common, "--out", tmp_path / "ms")
    start("distill.py", "--method", "shortcut", *common, "--out", tmp_path / "sc")
    start("distill.py", "--method", "rc", *common, "--out", tmp_path / "rc", "--tau", "0.75",
          "--teacher", tmp_path / "ms" / "last")
    start("distill.py", "--method", "decoder", *common, "--out", tmp_path / "dec")
    assert {p.name for p in family.iterdir()} == {"vae", "semantic", "ms", "os"}
    assert json.loads((tmp_path / "dec" / "args.json").read_text())["tau"] == 0.75     # as the student's
    for model in ("tiny", tmp_path / "rc"):
        shutil.copy(ROOT / "assets" / "input.png", tmp_path / "input.png")
        subprocess.run([sys.executable, "sample.py", "--model", model, "--steps", "1", "--weights", weights,
                        "--overwrite", tmp_path / "input.png"], cwd=ROOT, check=True)
    error = start("distill.py", "--method", "rc", *common, "--teacher", family / "os", code=2).stderr
    assert "is a one-step network" in error and error.count("\n") == 1


@pytest.mark.slow
def test_the_light_decoder_of_tiny_is_half_as_wide_and_loads(tmp_path):
    common = ("--method", "decoder", "--light", "--out", tmp_path / "out", "--export", tmp_path / "tiny")
    start("distill.py", *common, "--latents", "hr")
    vae, full = load_vae(tmp_path / "tiny" / "vae"), load_vae(ROOT / "weights" / "tiny" / "vae")
    assert vae.decoder[0].out_channels == 48 and full.decoder[0].out_channels == 96
    image = torch.rand(1, 3, 32, 48) * 2 - 1
    assert torch.allclose(vae.encode(image), full.encode(image), atol=2e-3)     # the same, in half precision
    assert "starts at" in start("distill.py", *common, "--few", "0", code=2).stderr
    assert "needs the DINOv2" in start("distill.py", *common, "--perceptual", "1", code=2).stderr


@pytest.mark.slow
def test_the_light_decoder_of_stable_diffusion_is_written_as_the_authors_write_it(tmp_path):
    """With a narrow encoder and a narrow DINOv2; the decoder has the published 12,387,459 parameters."""
    shape = dict(block_out_channels=[32, 32, 32, 32], layers_per_block=1)
    vae, eye = tmp_path / "stable-diffusion-2-1-base" / "vae", DINOv2(64, 1, 1, layer=0, size=28)
    file = tmp_path / "torch_cache" / "checkpoints" / "dinov2_vitb14_pretrain.pth"
    vae.mkdir(parents=True)
    file.parent.mkdir(parents=True)
    save_file(AutoencoderKL(**shape).state_dict(), vae / "diffusion_pytorch_model.safetensors")
    (vae / "config.json").write_text(json.dumps(shape))
    torch.save(eye.state_dict(), file)
    done = start("distill.py", "--method", "decoder", "--preset", "0.5B", "--enc_dim", "64",
                 "--weights", tmp_path, "--layer_dinov2b_list", "0", "--dinov2_size", "28", "--log_every=1",
                 "--out", tmp_path / "out", "--export", tmp_path, "--num_workers", "0")
    assert "step 2 | loss" in done.stdout
    stored = torch.load(tmp_path / "sd21_lwdecoder.pth", weights_only=True)
    assert sum(v.numel() for v in stored["model_state_dict"].values()) == 12_387_459
    light = load_vae(vae, tmp_path / "sd21_lwdecoder.pth", "sd2")
    assert light.decode(torch.randn(1, 4, 4, 6)).shape == (1, 3, 32, 48)

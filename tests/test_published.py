"""Folders laid out like the authors' download: small networks in them run, and no wrong file gets through."""
import builtins
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_loading import Bomb
from test_model import filled
from test_sample import picture

import sample
from config import launch
from model import AutoencoderKL, DINOv2, DiT, ModelConfig, QwenVAE, sd_decoder
from sample import DEFAULTS, load, published_files, upscale

SMALL = dict(dim=32, depth=2, num_heads=2, resolution=128, dinov2_size=28, layer_dinov2b_list=[1])
SD_VAE = dict(block_out_channels=[8, 8, 8, 8], norm_num_groups=4, latent_channels=4, act_fn="silu")
QWEN_VAE = dict(base_dim=4, z_dim=16, latents_mean=[0.1] * 16, latents_std=[2.0] * 16, dim_mult=[1, 2, 4, 4])


def write_dit(folder, ae_type, enc_dim, student, **args):
    """args.json says no more than the published ones: nothing of the target time but in VOSR 2.0."""
    shape = SMALL | dict(ae_type=ae_type, enc_dim=enc_dim)
    net = filled(DiT(ModelConfig(**shape, auxiliary_time_cond=student)))
    (folder / "checkpoints").mkdir(parents=True)
    save_file(net.state_dict(), folder / "checkpoints/ema_model.safetensors")
    stored = asdict(net.cfg) | dict(use_rope=True, wo_shift=False, train_steps=1) | args
    del stored["auxiliary_time_cond"]
    (folder / "args.json").write_text(json.dumps(stored | {k: v for k, v in args.items() if "auxil" in k}))


@pytest.fixture
def weights(tmp_path):
    """All five published models in small."""
    root = tmp_path / "weights"
    for folder, config, vae in (
            ("stable-diffusion-2-1-base/vae", SD_VAE, AutoencoderKL((8, 8, 8, 8), norm_num_groups=4)),
            ("Qwen-Image-vae-2d", QWEN_VAE, QwenVAE([0.1] * 16, [2.0] * 16, base_dim=4))):
        (root / folder).mkdir(parents=True)
        (root / folder / "config.json").write_text(json.dumps(config))
        save_file(filled(vae).state_dict(), root / folder / "diffusion_pytorch_model.safetensors")
    (root / "torch_cache/checkpoints").mkdir(parents=True)
    for name, dim in (("vitb14", 64), ("vitl14", 128)):
        encoder = filled(DINOv2(dim, 3, dim // 64))
        torch.save(encoder.state_dict(), root / f"torch_cache/checkpoints/dinov2_{name}_pretrain.pth")
    decoder = dict(in_channels=4, out_channels=3, block_out_channels=[32, 32, 32, 32], layers_per_block=1)
    light = {"config": decoder, "model_state_dict": filled(sd_decoder([32] * 4, 1, 4)).state_dict()}
    torch.save(light, root / "sd21_lwdecoder.pth")
    for kind, student in (("ms", False), ("os", True)):
        write_dit(root / f"VOSR_0.5B_{kind}", "sd2", 64, student)
        write_dit(root / f"VOSR_1.4B_{kind}", "qwen", 128, student)
    write_dit(root / "VOSR2", "qwen", 128, False, auxiliary_time_cond=False, distill_type="onestep")
    return root


@pytest.mark.parametrize("name", ["0.5B-ms", "0.5B-os", "1.4B-ms", "1.4B-os", "2.0"])
def test_each_published_model_runs_and_is_sampled_as_its_kind_wants(weights, name):
    vosr = load(name, 0, weights, device="cpu")
    assert all((weights / file).is_file() for file in published_files(name))
    assert vosr.one_step == (not name.endswith("ms"))
    assert vosr.defaults["steps"] == (1 if vosr.one_step else 25)
    stored = load_file(weights / tensor_file(DEFAULTS[name]["folder"]))
    assert all(torch.equal(value, stored[n]) for n, value in vosr.dit.state_dict().items())
    image = picture(16, 8)
    one, other = (upscale(image, vosr, steps=2, cfg_scale=s, name="x") for s in (0.5, 2.0))
    assert one.size == (64, 32) and np.array_equal(one, other) == vosr.one_step


def test_files_lie_where_the_official_scripts_look_for_them(weights):
    """clean_weights/ and the folder itself serve, too; args.json may be some levels above the weights."""
    folder = weights / "VOSR2"
    for place in ("clean_weights", "."):
        (folder / place).mkdir(exist_ok=True)
        next(folder.rglob("*.safetensors")).rename(folder / place / "ema_model.safetensors")
        assert load("2.0", 1, weights).one_step
    deep = folder / "a/b/c"
    deep.mkdir(parents=True)
    (folder / "ema_model.safetensors").rename(deep / "ema_model.safetensors")
    assert load(str(deep), 1, weights).one_step
    with pytest.raises(ValueError, match="VOSR2/checkpoints/ema_model"):
        load("2.0", 1, weights)


def copied(source, target):
    return lambda root: (root / target).write_bytes((root / source).read_bytes())


def tensors(edit):
    """edit changes the dict of VOSR 2.0's tensors, or returns another."""
    def change(root):
        stored = {n: value.clone() for n, value in load_file(root / TWO).items()}
        save_file(edit(stored) or stored, root / TWO)
    return change


def args(folder, **values):
    def change(root):
        path = root / folder / "args.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return change


def cut(path):
    return lambda root: (root / path).write_bytes((root / path).read_bytes()[:-9])


def text(path, content):
    return lambda root: (root / path).write_text(content)


def saved(path, content):
    return lambda root: torch.save(content, root / path)


def tensor_file(folder):
    return f"{folder}/checkpoints/ema_model.safetensors"


TWO, CODE = tensor_file("VOSR2"), Bomb()
DINO, LIGHT = "torch_cache/checkpoints/dinov2_vitb14_pretrain.pth", "sd21_lwdecoder.pth"
SD, QWEN = "stable-diffusion-2-1-base/vae/config.json", "Qwen-Image-vae-2d/config.json"
MS, OS, BIG_OS = "VOSR_0.5B_ms", "VOSR_0.5B_os", "VOSR_1.4B_os"
WRONG = {  # what was done to a good folder: model, change, words that the refusal must hold
    "multi-step file as student": ("0.5B-os", copied(tensor_file(MS), tensor_file(OS)), "multi-step"),
    "one-step file as teacher": ("0.5B-ms", copied(tensor_file(OS), tensor_file(MS)), "one-step"),
    "multi-step network as VOSR 2.0": ("2.0", args("VOSR2", distill_type="rcgm"), "VOSR2 multi-step"),
    "VOSR 2.0 as teacher": ("1.4B-ms", args("VOSR_1.4B_ms", distill_type="onestep"), "one-step"),
    "r_embedder promised": ("0.5B-ms", args(MS, auxiliary_time_cond=True), "lacks r_embedder args.json"),
    "r_embedder denied": ("0.5B-os", args(OS, auxiliary_time_cond=False), "has r_embedder args.json"),
    "file of another size": ("0.5B-os", copied(tensor_file(BIG_OS), tensor_file(OS)),
                             "ema_model.safetensors shape"),
    "settings of another size": ("0.5B-os", copied("VOSR_1.4B_os/args.json", "VOSR_0.5B_os/args.json"),
                                 "args.json 'qwen' sd2"),
    "unknown prefix": ("2.0", tensors(lambda t: {f"net.{n}": v for n, v in t.items()}), f"{TWO} blocks.0"),
    "tensor missing": ("2.0", tensors(lambda t: t.__delitem__("t_block.1.bias")), f"{TWO} lacks t_block.1"),
    "tensor more": ("2.0", tensors(lambda t: t.update(steps=torch.zeros(1))), f"{TWO} unknown steps"),
    "tensor misshaped": ("2.0", tensors(lambda t: t.update({"mlp_ca.fc1.bias": torch.zeros(3)})),
                         f"{TWO} mlp_ca.fc1.bias"),
    "tensor of integers": ("2.0", tensors(lambda t: t.update({"layer_norm.bias": torch.zeros(128).int()})),
                           f"{TWO} layer_norm.bias"),
    "other positions": ("2.0", tensors(lambda t: t["feat_rope.freqs_sin"].zero_()[:0].tolist()),
                        f"{TWO} feat_rope.freqs_sin"),
    **{f"args.json with {name} {value}": ("2.0", args("VOSR2", **{name: value}), f"{TWO} args.json {tensor}")
       for name, value, tensor in (
           ("dim", 64, "blocks.0"), ("depth", 3, "blocks.2"), ("depth", 1, "blocks.1"), ("patch_size", 1, ""),
           ("num_heads", 4, "k_norm"), ("resolution", 256, "feat_rope"), ("mlp_ratio", 2.0, "mlp.w12"),
           ("enc_dim", 64, "layer_norm"), ("encdim_ratio", 4, "mlp_ca"))},
    "args.json with a negative width": ("2.0", args("VOSR2", dim=-64), "args.json dim"),
    "args.json with a broken number": ("2.0", args("VOSR2", depth=2.7), "args.json depth"),
    "args.json with no block": ("0.5B-os", args(OS, layer_dinov2b_list=[-1]), f"{DINO}"),
    "empty file": ("0.5B-os", text(DINO, ""), f"{DINO} empty"),
    "one-step 1.4B as VOSR 2.0": ("2.0", copied(tensor_file(BIG_OS), TWO), "has r_embedder"),
    "other latents": ("2.0", text(QWEN, json.dumps(QWEN_VAE | dict(latents_mean=[0.0]))), QWEN),
    "args.json with a word": ("2.0", args("VOSR2", depth="many"), "args.json many"),
    "truncated file": ("2.0", cut(TWO), f"{TWO} cannot be read"),
    "pickle in the place of tensors": ("2.0", saved(TWO, CODE), f"{TWO} cannot be read"),
    "truncated encoder": ("0.5B-os", cut(DINO), DINO),
    "encoder of another size": ("0.5B-os", copied(DINO.replace("vitb", "vitl"), DINO), f"{DINO} 128"),
    "encoder without that block": ("0.5B-os", args(OS, layer_dinov2b_list=[8]), f"{DINO} 3 blocks"),
    "encoder that is code": ("0.5B-os", saved(DINO, {"cls_token": CODE}), f"{DINO} code"),
    "decoder that is code": ("0.5B-os", saved(LIGHT, {"config": CODE}), f"{LIGHT} code"),
    "decoder without its shape": ("0.5B-os", saved(LIGHT, {"config": {}, "model_state_dict": {}}), LIGHT),
    "the other autoencoder": ("0.5B-os", copied(QWEN, SD), f"{SD} sd2"),
    "autoencoder without statistics": ("2.0", text(QWEN, '{"base_dim": 4}'), f"{QWEN} latents_mean"),
    "page of a proxy": ("2.0", text(QWEN, "<html>"), QWEN),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_pairing_is_refused_in_one_line(case, weights, tmp_path, monkeypatch, capsys):
    model, change, reason = WRONG[case]
    change(weights)
    picture(8, 8).save(tmp_path / "a.png")
    words = ["--model", model, "--weights", weights, "--device", "cpu", tmp_path / "a.png"]
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        launch(sample.main)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1, line
    assert all(word in line for word in reason.split()), line
    assert not hasattr(builtins, "exploded") and not (tmp_path / "a_x4.png").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_norms_tables_time_and_ends_in_float32(weights, dtype):
    name = {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    half, exact = load("2.0", 1, weights, name, "cpu"), load("2.0", 1, weights, "fp32", "cpu")
    kinds = {n: p.dtype for n, p in half.dit.named_parameters()}
    full = ("x_embedder", "t_embedder", "t_block", "norm", "scale_shift_table", "final_layer")
    assert all((kind == torch.float32) == any(word in n for word in full) for n, kind in kinds.items())
    assert {p.dtype for net in (half.vae, half.semantic_encoder) for p in net.parameters()} == {torch.float32}
    streams, z = [], torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    half.dit.blocks[-1].register_forward_hook(lambda module, given, x: streams.append(x.dtype))
    inputs = (z, torch.ones(1), 0.5 * z, torch.ones(1, 4, 128))
    with torch.no_grad(), torch.autocast("cpu", dtype):
        v = half.dit(*inputs)
    assert streams == [torch.float32]
    assert 0 < (v.float() - exact.dit(*inputs)).abs().max() < 0.05


MEASURE = """
import sys, threading, time
def anonymous():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) / 1024
from model import load_dit
import torch
start, peak, done = anonymous(), [0], []
def watch():
    while not done:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
net = load_dit(sys.argv[1], {"fp32": None, "bf16": torch.bfloat16}[sys.argv[2]])
done.append(1)
thread.join()
print(max(peak[0], anonymous()) - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_no_more_memory_than_the_weights_in_their_final_dtype(tmp_path):
    """In MiB, above what the imports take: nothing for a mapped file, the 16-bit copy for half precision."""
    with torch.device("meta"):
        net = DiT(ModelConfig(**SMALL | dict(dim=512, depth=12, num_heads=8), enc_dim=768))
    (tmp_path / "checkpoints").mkdir()
    save_file({n: torch.zeros(v.shape) if v.is_meta else v for n, v in net.state_dict().items()},
              tmp_path / "checkpoints/ema_model.safetensors")
    (tmp_path / "args.json").write_text(json.dumps(asdict(net.cfg)))
    size = (tmp_path / "checkpoints/ema_model.safetensors").stat().st_size / 2**20
    assert size > 200
    for dtype, limit in (("fp32", 100), ("bf16", 100 + 0.6 * size)):  # 100: modules that torch imports late
        done = subprocess.run([sys.executable, "-c", MEASURE, tmp_path, dtype], check=True, text=True,
                              capture_output=True, cwd=Path(__file__).parent.parent)
        assert float(done.stdout) < limit

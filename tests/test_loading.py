"""Loading takes the published layouts and our own, and nothing that does not fit: one clear line instead."""
import builtins
import json
import pickle

import pytest
import torch
from safetensors.torch import save_file
from test_model import batch, dit, filled, same, small_vaes, wave

from model import (
    DINOv2,
    DiT,
    ModelConfig,
    TinySemanticEncoder,
    load_dit,
    load_semantic_encoder,
    load_strict,
    load_vae,
    sd_decoder,
)


def model_folder(folder, net, tensors=None, half=False, **args):
    """A DiT's folder in the published layout."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    tensors = net.state_dict() if tensors is None else tensors
    save_file({n: v.half() if half else v.contiguous() for n, v in tensors.items()},
              folder / "checkpoints" / "ema_model.safetensors")
    (folder / "args.json").write_text(json.dumps(vars(net.cfg) | args))
    return folder


@pytest.mark.parametrize("student", [False, True])
def test_a_folder_gives_the_network_and_its_keys_decide_about_the_target_time(tmp_path, student):
    """VOSR 2.0 is a one-step network without the embedder of r; old files say nothing about it."""
    net = dit(auxiliary_time_cond=student)
    folder = model_folder(tmp_path, net, auxiliary_time_cond=None, use_pos=False)
    read, r = load_dit(folder), torch.zeros(2) if student else None
    assert read.cfg.auxiliary_time_cond == student and torch.equal(read(*batch(), r=r), net(*batch(), r=r))
    assert all(p.requires_grad and p.device.type == "cpu" for p in read.parameters())


def test_half_precision_files_become_float32_and_rope_tables_may_be_absent(tmp_path):
    net = dit()
    tensors = {n: v for n, v in net.state_dict().items() if not n.startswith("feat_rope")}
    read = load_dit(model_folder(tmp_path, net, tensors, half=True))
    assert {v.dtype for v in read.state_dict().values()} == {torch.float32}
    assert torch.equal(read.feat_rope.freqs_cos, net.feat_rope.freqs_cos)
    assert same(read(*batch()), net(*batch()), 0.01)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "ema_model."])
def test_one_prefix_on_all_names_is_taken_off(prefix):
    net, other = dit(), DiT(ModelConfig(dim=32, depth=2, num_heads=2, enc_dim=8, resolution=64))
    load_strict(other, {prefix + n: v for n, v in net.state_dict().items()}, "file")
    assert torch.equal(other(*batch()), net(*batch()))


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("blocks.1.mlp.w3.bias"), "lacks blocks.1.mlp.w3.bias"),
    (lambda t: t.update(extra=torch.zeros(1)), "has the unknown extra"),
    (lambda t: t.update({"layer_norm.bias": torch.zeros(9)}), "has another shape of layer_norm.bias"),
    (lambda t: t.clear(), r"lacks \S+ and \d+ more")])
def test_a_missing_extra_or_misshaped_tensor_is_an_error_that_names_it(change, words):
    net = dit()
    tensors, before = dict(net.state_dict()), net(*batch())
    change(tensors)
    with pytest.raises(ValueError, match=rf"^weights\.pth {words}"):
        load_strict(net, tensors, "weights.pth")
    assert torch.equal(net(*batch()), before)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "no args", "broken args", "no weights",
                                    "no rope"])
def test_a_damaged_folder_is_one_clear_line(tmp_path, damage):
    folder = model_folder(tmp_path, dit(), **({"use_rope": False} if damage == "no rope" else {}))
    weights, args = folder / "checkpoints" / "ema_model.safetensors", folder / "args.json"
    content = {"truncated": weights.read_bytes()[:5000], "empty": b"", "text": b"<!DOCTYPE html> not found"}
    if damage in content:
        weights.write_bytes(content[damage])
    elif damage == "broken args":
        args.write_text('{"dim": ')
    elif damage != "no rope":
        (args if damage == "no args" else weights).unlink()
    with pytest.raises(ValueError) as error:
        load_dit(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


class Bomb:
    def __reduce__(self):
        return exec, ("import builtins; builtins.exploded = True",)


@pytest.mark.parametrize("damage", ["code", "plain pickle", "text", "list", "other network"])
def test_pickles_with_code_are_refused_and_not_run(tmp_path, damage):
    path = tmp_path / "dinov2.pth"
    content = {"code": {"cls_token": Bomb()}, "list": [torch.zeros(1)], "other network": {"a": path.stem}}
    if damage == "plain pickle":
        path.write_bytes(pickle.dumps(Bomb(), protocol=2))
    elif damage == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    else:
        torch.save(content[damage], path)
    with pytest.raises(ValueError, match="dinov2") as error:
        load_semantic_encoder(path, ModelConfig())
    assert not hasattr(builtins, "exploded") and "\n" not in str(error.value)


def test_semantic_encoders_are_read_from_a_file_or_a_folder(tmp_path):
    cfg, image = ModelConfig(enc_dim=64, layer_dinov2b_list=(1,), dinov2_size=28), torch.rand(1, 3, 64, 96)
    dinov2, tiny = filled(DINOv2(64, 3, 1, layer=1, size=28)), filled(TinySemanticEncoder(64))
    torch.save(dinov2.state_dict(), tmp_path / "dinov2.pth")
    save_file(tiny.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"enc_dim": 64}')
    assert torch.equal(load_semantic_encoder(tmp_path / "dinov2.pth", cfg)(image), dinov2(image))
    assert torch.equal(load_semantic_encoder(tmp_path, cfg)(image), tiny(image))
    assert tiny(image).shape == (1, 6, 64)


@pytest.mark.parametrize("kind, config", [
    ("sd2", dict(block_out_channels=[8, 16, 8, 8], norm_num_groups=4, sample_size=64, act_fn="silu")),
    ("qwen", dict(base_dim=4, latents_mean=[0.5] * 16, latents_std=[2.0] * 16)),
    ("tiny", dict(latent_channels=16, widths=[8, 8]))])
def test_autoencoders_are_told_apart_by_their_config(tmp_path, kind, config):
    vae, image = small_vaes()[kind], torch.rand(1, 3, 16, 16)
    save_file(vae.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = load_vae(tmp_path)
    assert torch.equal(read.encode(image), vae.encode(image))
    assert torch.equal(read.decode(read.encode(image)), vae.decode(vae.encode(image)))


def test_the_light_decoder_replaces_the_decoder_and_the_convolution_before_it(tmp_path):
    vae, light = small_vaes()["sd2"], filled(sd_decoder((32, 32, 32, 32), 1, 4))
    save_file(vae.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text('{"block_out_channels": [8, 16, 8, 8], "norm_num_groups": 4}')
    shape = dict(in_channels=4, out_channels=3, block_out_channels=[32] * 4, layers_per_block=1)
    torch.save({"config": shape, "model_state_dict": light.state_dict()}, tmp_path / "light.pth")
    read, z, image = load_vae(tmp_path, tmp_path / "light.pth"), wave(1, 4, 2, 2), wave(1, 3, 16, 16)
    assert torch.equal(read.decode(z), light(z / 0.18215))
    assert torch.equal(read.encode(image), vae.encode(image))

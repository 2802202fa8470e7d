"""Compare this repository with numbers that the official implementation produced.

    python tests/parity.py DIR        # a row per case, then a summary; exit 1 if one fails

A case is a NAME.json (kind, config, criterion) beside a NAME.safetensors (weights/..., in/..., out/...),
anywhere below DIR. The function that KINDS has for its kind turns the inputs into {name: tensor} with the
functions that the stages themselves use; what is out/NAME in the file must agree. A list of tensors stands
for several ways to the same numbers: all must agree. The official scripts truncate pixels to 8 bits; our
functions return floats, so it is done here.
"""
import itertools
import json
import math
import sys
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a script from anywhere

import parity_degradation

import distill
import model
import sample
from config import die
from train import flow_loss

Case = namedtuple("Case", "path spec kind config inputs outputs")


def read_case(path):
    """NAME.json -> Case, its tensors without the prefixes in/ and out/; half and int16 become float32."""
    spec, tensors = json.loads(path.read_text(encoding="utf-8")), load_file(path.with_suffix(".safetensors"))
    tensors = {n: v.float() if v.dtype in (torch.float16, torch.int16) else v for n, v in tensors.items()}
    inputs, outputs = ({n.removeprefix(part): v for n, v in tensors.items() if n.startswith(part)}
                       for part in ("in/", "out/"))
    return Case(path, spec, spec.get("kind"), spec.get("config", {}), inputs, outputs)


def weights(case, field="weights_from"):
    """Weights of the case, or of the one in the same folder that it names; exact in half precision."""
    path = case.path.with_name(case.spec.get(field, case.path.stem) + ".safetensors")
    tensors = load_file(path).items()
    return {n.removeprefix("weights/"): v.float() for n, v in tensors if n.startswith("weights/")}


# ---------------------------------------------------------------- networks
def gradients(net):
    return {f"grad/{name}": p.grad for name, p in net.named_parameters() if p.grad is not None}


def load_dit(case, field="weights_from"):
    """DiT of the case; the keys of the weights decide about the embedder of r, as for published files."""
    tensors, name = weights(case, field), case.path.stem
    cfg = model.read_config(case.config.get("network", case.config), name)
    cfg.auxiliary_time_cond = any("r_embedder" in n for n in tensors)
    net = model.load_strict(model.DiT(cfg), tensors, name)
    with torch.no_grad():
        for parameter in net.final_layer.linear.parameters():
            parameter *= case.config.get("final_layer_linear_scale", 1)
    return net


def dit(case):
    net, x = load_dit(case), case.inputs["x"].requires_grad_()
    c_str, z_t = x.chunk(2, dim=1)
    v = net(z_t, case.inputs["t"], c_str, case.inputs["z"], case.inputs.get("r"))
    loss = v.square().mean()
    loss.backward()
    return gradients(net) | {"v": v, "loss": loss, "grad/x": x.grad}


def dinov2(case):
    fields = ("embed_dim", "depth", "num_heads", "patch_size", "mlp_ratio", "img_size")
    net = model.DINOv2(**{name: case.config[name] for name in fields})
    model.load_strict(net, weights(case), case.path.stem)
    last, repeat = case.config["depth"] - 1, case.config["repeat"]
    x = case.inputs["x"].repeat_interleave(repeat, 2).repeat_interleave(repeat, 3)
    got = {f"block_{k}": net.features(x, k) for k in range(last)} | {"norm_last": net.features(x, last)}
    net.norm = nn.Identity()
    return got | {f"block_{last}": net.features(x, last)}


def see(image, size):
    """What DINOv2 gets of an image in [-1, 1]; there are no weights in it."""
    return model.DINOv2(embed_dim=1, depth=0, num_heads=1, size=size).preprocess(image)


def autoencoder(kind, case):
    tensors = weights(case)
    for new, old in case.spec.get("rename", ()):
        tensors = {n.replace(new, old) if ".attentions." in n else n: v for n, v in tensors.items()}
    cls, names = model.AUTOENCODERS[kind]
    vae = cls(**{name: case.config[name] for name in names if name in case.config})
    model.load_strict(vae, model.rename_attention(tensors), case.path.stem)
    mean, logvar = vae.moments(case.inputs["image"])
    return dict(mean=mean, logvar=logvar, latent=vae.encode(case.inputs["image"], case.inputs["noise"]),
                decoded=vae.decode(case.inputs["z"]))


def light_decoder(case):
    net = model.sd_decoder(*map(case.config.get, ("block_out_channels", "layers_per_block", "in_channels")))
    return {"image": model.load_strict(net, weights(case), case.path.stem)(case.inputs["z"])}


# ---------------------------------------------------------------- losses
class Witness:
    """Stands between a loss and its network; keeps what went in and out of the calls that have gradients."""

    def __init__(self, net):
        self.net, self.calls = net, []

    def __call__(self, z_t, t, c_str, c_sem, r=None):
        v = self.net(z_t, t, c_str, c_sem, r)
        if v.requires_grad:
            v.retain_grad()
            self.calls.append((torch.cat([c_str, z_t], dim=1), c_sem, v))
        return v

    def seen(self):
        net_input, net_z, _ = map(list, zip(*self.calls, strict=True))
        return gradients(self.net) | dict(net_input=net_input, net_z=net_z)


def loss_arguments(inputs):
    """What all losses share; the names in the files are those of the official code."""
    same = {name: inputs[name] for name in ("t", "strength", "struct_noise")}
    return same | dict(z0=inputs["hq"], c_str=inputs["lq"], c_sem=inputs["z"], noise=inputs["eps"],
                       partial=inputs["partial"] > 0)


def loss_multistep(case):
    net = Witness(load_dit(case))
    loss = flow_loss(net, **loss_arguments(case.inputs), alpha=case.inputs["alpha"].float())
    loss.backward()
    (_, _, pred), = net.calls
    target = pred - pred.grad * pred.numel() / 2  # because the loss is the mean of (pred - target)^2
    return net.seen() | dict(loss=loss, pred=pred, target=target)


def distillation(loss_function, case):
    options, student = case.config["loss"], Witness(load_dit(case))
    teacher = load_dit(case, "teacher_weights_from")
    loss, parts = loss_function(
        student, teacher, **loss_arguments(case.inputs), r=case.inputs["r"], alpha=options["alpha"],
        omega=options["omega"], u_weight=options["consistency_weight"], delta=options.get("delta_t"),
        rollout=options.get("n_steps"), interval=(options["t_start"], options["t_end"]))
    loss.backward()
    if gradients(teacher):
        raise ValueError("the teacher gets gradients")
    if "c_l" in parts:
        parts["near"] = parts["c_l"] == 1  # far away it is larger
    return student.seen() | parts | {"loss": loss}


# ---------------------------------------------------------------- sampling
def sampler(case):
    """Both kinds. Outputs are called n<steps>[_s<guidance>]_<schedule>, time grids t_<schedule>_<steps>."""
    net, settings = load_dit(case), case.config["sampler"]
    z, c_str, c_sem = (case.inputs[name] for name in ("noise", "lq", "z"))
    alpha, interval = settings.get("alpha", 0), (settings.get("t_start", 0), settings.get("t_end", 1))
    got, both = {"lq_weak": model.partial_condition(c_str, c_sem, alpha)[0]}, (c_sem, net.semantics(c_sem))
    for schedule, steps in itertools.product(settings["schedules"], settings["steps"]):
        got[f"t_{schedule}_{steps}"] = times = sample.time_grid(steps, schedule)
        for scale in settings.get("guidance", [None]):
            middle = "" if scale is None else f"_s{scale}"
            got[f"n{steps}{middle}_{schedule}"] = [
                sample.euler(net, z, c_str, s, times, alpha, scale, interval) for s in both]
    return got


def sampler_tiled(case):
    net, tile, settings = load_dit(case), case.config["tile"], case.config["sampler"]
    z, c_str, tokens = (case.inputs[name] for name in ("noise", "lq_latent", "tile_z"))
    side, f = tile["latent_tile"], tile["vae_factor"]
    rows, columns = (sample.tile_layout(n, side, tile["latent_overlap"]) for n in z.shape[-2:])
    places = list(itertools.product(rows, columns))
    window, weight_sum = sample.gaussian_window(side, side), torch.zeros(z.shape[-2:])
    for y, x in places:
        weight_sum[y:y + side, x:x + side] += window
    seen = [see(case.inputs["lq_pixels"][..., f * y:f * (y + side), f * x:f * (x + side)] / 127.5 - 1,
                tile["dinov2_size"]) for y, x in (places[0], places[-1])]
    fields = [(sample.tiled(net, places, side, side, lambda s: net.semantics(tokens[list(s)]), batch), [])
              for batch in (1, 4)] + [(net, tokens)] * (len(places) == 1)
    times = sample.time_grid(settings["steps"], settings["schedule"])
    return dict(window=window, weight_sum=weight_sum, venc_input_first=seen[0], venc_input_last=seen[1],
                latent=[sample.euler(field, z, c_str, c_sem, times, settings["alpha"], settings["guidance"])
                        for field, c_sem in fields])


def planar(levels):
    """uint8 (H, W, 3) -> (3, H, W) in [0, 1]."""
    return levels.permute(2, 0, 1) / 255


def truncated(image):
    """(3, H, W) in [0, 1] -> uint8 (H, W, 3), truncated as by the official scripts."""
    return (image * 255).byte().permute(1, 2, 0)


def adain(image, reference):
    """sample.adain tells what becomes of each of the 256 levels of a channel; uint8 (H, W, 3)."""
    levels = sample.adain(*(Image.fromarray(x.numpy()) for x in (image, reference)))
    return (levels * 255).byte()[torch.arange(3), image.long()]


def wavelet(image, reference):
    """A reference of another size is brought to that of the image by Lanczos."""
    picture = Image.fromarray(reference.numpy()).resize(image.shape[1::-1], Image.Resampling.LANCZOS)
    reference = torch.from_numpy(np.array(picture))
    return truncated(sample.wavelet(planar(image), planar(reference)))


def color(fix, case):
    return {"image": fix(case.inputs["image"], case.inputs["reference"])}


def preprocess(case):
    """One picture from file to file, around stand-ins for the networks of VAE and vision encoder."""
    config, settings = case.config, case.config["sampler"]
    picture = Image.fromarray(case.inputs["lr"].numpy())
    picture = picture.resize([n * config["upscale"] for n in picture.size], Image.Resampling.BICUBIC)
    upscaled = torch.from_numpy(np.array(picture))
    vae_input, heard = planar(upscaled)[None] * 2 - 1, []
    vae = (model.QwenVAE(config["latents_mean"], config["latents_std"], base_dim=4)
           if "latents_mean" in config else
           model.AutoencoderKL((32,), scaling_factor=config["scaling_factor"]))
    vae.moments = lambda image: (case.inputs["vae_sample"], None)
    vae.post_quant_conv = nn.Identity()
    vae.decoder.forward = lambda z: heard.append(z) or case.inputs["decoded"]
    c_str, times = vae.encode(vae_input), sample.time_grid(settings["steps"], settings["schedule"])
    z = sample.euler(load_dit(case), case.inputs["noise"], c_str, case.inputs["z"], times, settings["alpha"],
                     settings["guidance"])
    plain = truncated(vae.decode(z)[0].clamp(-1, 1) * 0.5 + 0.5)
    return dict(upscaled=upscaled, vae_input=vae_input, venc_input=see(vae_input, config["dinov2_size"]),
                lq_latent=c_str, decoder_input=heard, image_nofix=plain, image_adain=adain(plain, upscaled),
                image_wavelet=wavelet(plain, upscaled))


# ---------------------------------------------------------------- all of them
DATA_ONLY = ("weights", "images")  # kinds that other cases refer to
KINDS = dict(
    dit=dit, dinov2=dinov2, light_decoder=light_decoder, qwen_vae2d=partial(autoencoder, "qwen"),
    dinov2_preprocess=lambda case: {"x": see(case.inputs["image"], case.config["dinov2_size"])},
    **dict.fromkeys(("sd_vae", "sd_vae_old_names"), partial(autoencoder, "sd2")),
    loss_multistep=loss_multistep, loss_rc=partial(distillation, distill.rc_loss),
    loss_shortcut=partial(distillation, distill.shortcut_loss),
    sampler_multistep=sampler, sampler_onestep=sampler, sampler_tiled=sampler_tiled, preprocess=preprocess,
    color_adain=partial(color, adain), color_wavelet=partial(color, wavelet),
    **parity_degradation.KINDS)


# ---------------------------------------------------------------- criteria
def compare(case, name, got):
    """(error, bound) of our tensor against out/NAME, by the first criterion that applies."""
    want, got = case.outputs["lq" if name == "chain" else name], torch.as_tensor(got).detach()
    if got.shape != want.shape and not got.numel() == want.numel() == 1:
        raise ValueError(f"{name} has shape {tuple(got.shape)}, not {tuple(want.shape)}")
    want = want.view(got.shape)
    error = (got.double() - want.double()).abs()
    worst = error.max().item()
    if name == "chain":  # root of the mean square, from the PSNR
        return error.square().mean().sqrt().item(), 255 / 10 ** (case.config["e2e_min_psnr"] / 20)
    if want.dtype == torch.uint8:  # flags, and grey levels: one level on one percent of the values
        if name.startswith("image") and worst == 1:
            return (error > 0).double().mean().item(), 0.01
        return worst, 1 if name.startswith(("image", "lq")) else 0
    if f"out/{name}" in case.spec.get("tensor_atol", {}):
        return worst, case.spec["tensor_atol"][f"out/{name}"]
    if name.startswith("grad/") and "grad_tol_of_max" in case.spec:
        return worst, case.spec["grad_tol_of_max"] * want.abs().max().item()
    bound = case.spec["atol"] + case.spec["rtol"] * want.double().abs()
    at = (error - bound).nan_to_num(nan=math.inf).argmax()
    return error.flatten()[at].item(), bound.flatten()[at].item()


def used(error, bound):
    """Share of the bound that the error takes; infinite where there is no number."""
    return math.inf if math.isnan(error) else 0.0 if error == 0 else error / bound if bound else math.inf


def run_case(case):
    """Worst (name, error, bound) of a case; ValueError if there is no function for it or for one output."""
    if case.kind not in KINDS:
        raise ValueError("unknown kind")
    got = KINDS[case.kind](case)
    if missing := case.outputs.keys() - got.keys():
        raise ValueError(f"nothing here computes out/{min(missing)}")
    rows = [(name, *compare(case, name, value)) for name in [*case.outputs, *got.keys() & {"chain"}]
            for value in (got[name] if isinstance(got[name], list) else [got[name]])]
    return max(rows, key=lambda row: used(*row[1:]))


def check(folder, report=print):
    """Run every case below `folder`; report and return rows (kind, name, tensor, error, bound, ok)."""
    rows = []
    report(f"{'kind':<18} {'name':<36} {'error':>9} {'bound':>9}          worst tensor")
    for path in sorted(p for p in Path(folder).rglob("*.json") if p.with_suffix(".safetensors").is_file()):
        kind = None
        try:
            case = read_case(path)
            if (kind := case.kind) in DATA_ONLY:
                continue
            tensor, error, bound = run_case(case)
        except Exception as reason:  # whatever is wrong with one case, the others are still compared
            tensor, error, bound = f"{type(reason).__name__}: {reason}".splitlines()[0], math.nan, 0.0
        ok, name = used(error, bound) <= 1, path.stem
        rows.append((kind, name, tensor, error, bound, ok))
        report(f"{kind!s:<18} {name:<36} {error:9.2e} {bound:9.2e}  {'ok' if ok else 'FAILED':<6}  {tensor}")
    report(f"{len(rows)} cases, {sum(not row[-1] for row in rows)} failed")
    return rows


def main(argv):
    if len(argv) != 1 or not Path(argv[0]).is_dir():
        die("usage: python tests/parity.py DIR, a folder of fixtures")
    rows = check(argv[0]) or die(f"{argv[0]} holds no cases (NAME.json beside NAME.safetensors)")
    sys.exit(not all(row[-1] for row in rows))


if __name__ == "__main__":
    main(sys.argv[1:])

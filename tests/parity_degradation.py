"""The kinds of parity.py that belong to the degradation: its operations one by one, and whole pipelines."""
from unittest import mock

import torch
import torch.nn.functional as F

import data


def kernel(case):
    kernels = [data.blur_kernel(case.config["kernel"], **{n: v[i].item() for n, v in case.inputs.items()})
               for i in range(len(case.inputs["size"]))]
    return {"kernel": torch.stack([F.pad(k, [(21 - len(k)) // 2] * 4) for k in kernels])}


def jpeg(case):
    with mock.patch.object(data, "quantise", wraps=data.quantise) as watched:
        image = data.jpeg(case.inputs["img"], case.inputs["quality"])
    return {"img": image, "factor": [call.args[2] for call in watched.call_args_list]}


STRENGTH, FIELD = dict(gaussian="sigma", poisson="scale"), dict(gaussian="randn", poisson="counts")


def stored_field(inputs, prefix, kind, flag):
    """The stored noise of the samples whose gray flag is `flag`; a field (h, w) serves all of them."""
    field = inputs[f"{prefix}{FIELD[kind]}{'_gray' * flag}"]
    return field if field.dim() == 2 else field[(inputs[f"{prefix}gray"] > 0) == flag]


def noisy(image, inputs, prefix, kind):
    gray, out = inputs[f"{prefix}gray"] > 0, image.clone()
    for flag in set(gray.tolist()):
        some, field = gray == flag, stored_field(inputs, prefix, kind, flag)
        strength = inputs[prefix + STRENGTH[kind]][some]
        out[some] = (data.gaussian_noise(image[some], strength, field) if kind == "gaussian" else
                     data.poisson_noise(image[some], strength, lambda rate, counts=field: counts, flag))
    return out


def noise_poisson(case):
    got = {"img": noisy(case.inputs["img"], case.inputs, "", "poisson")}
    for tail, image in (("", case.inputs["img"]), ("_gray", data.luma(case.inputs["img"]))):
        q, v = data.poisson_base(image)
        got |= {f"vals{tail}": v.flatten(), f"unique{tail}": torch.tensor([len(x.unique()) for x in q])}
    return got


def resize(case):
    """Alone and in a batch of two, which takes another way through data.resize."""
    image = case.inputs["img"]
    return {name: [data.resize(torch.cat([image] * n), [draw] * n)[0][:1] for n in (1, 2)]
            for name, draw in case.config.items()}


def pipeline(case):
    """Each operation on the stored output of the one before it, then all in one go with the stored draws."""
    config, inputs, names = case.config, case.inputs, case.config["ops"]
    kernels, hr = {"blur1": "kernel1", "blur2": "kernel2", "sinc": "sinc_kernel"}, inputs["hr"] / 255

    def operation(name, x):
        if name in kernels:
            return data.blur(x, inputs[kernels[name]].expand(len(x), -1, -1))
        if name.startswith("resize"):
            return data.resize(x, [config[name]] * len(x))[0]
        if name.startswith("jpeg"):
            return data.jpeg(x, inputs[f"{name}_quality"])
        return noisy(x, inputs, f"{name}_", config[name]["kind"])

    before = [hr, *(case.outputs[name] for name in names[:-1])]
    got = {name: operation(name, x) for name, x in zip(names, before, strict=True)}
    whole = data.degrade_with(hr, *stored_draws(config, inputs))
    return got | {"lq": data.round_levels(got[names[-1]]) * 255, "chain": whole * 255}


def stored_draws(config, inputs):
    """Arguments draws, randn, poisson with which data.degrade_with repeats a pipeline."""
    jpeg2 = "jpeg2_late" if config["ops"].index("jpeg2") > config["ops"].index("resize_lr") else "jpeg2_early"
    shared = {name: config[name] for name in config if name.startswith("resize")}
    shared |= {"kernel1": inputs["kernel1"], "sinc": inputs["sinc_kernel"]}
    shared |= {"kernel2": inputs["kernel2"]} if config["second_blur"] else {}
    qualities = zip(inputs["jpeg1_quality"].tolist(), inputs["jpeg2_quality"].tolist(), strict=True)
    draws, fields = [shared | {"jpeg1": first, jpeg2: second} for first, second in qualities], []
    for name, kind in ((name, config[name]["kind"]) for name in ("noise1", "noise2")):
        strengths, flags = (inputs[f"{name}_{what}"].tolist() for what in (STRENGTH[kind], "gray"))
        for draw, strength, flag in zip(draws, strengths, flags, strict=True):
            draw[name] = dict(kind=kind, strength=strength, gray=bool(flag))
        fields += [stored_field(inputs, f"{name}_", kind, bool(flag)) for flag in sorted(set(flags))]
    stored = iter(fields)  # in the order in which they are asked for
    return draws, lambda shape: next(stored), lambda rate: next(stored)


KINDS = dict(
    kernel=kernel, resize=resize, jpeg=jpeg, noise_poisson=noise_poisson, pipeline=pipeline,
    noise_gaussian=lambda case: {"img": noisy(case.inputs["img"], case.inputs, "", "gaussian")},
    filter2d=lambda case: {"img": data.blur(case.inputs["img"], case.inputs["kernel"])},
    clamp_round=lambda case: {"x": data.round_levels(case.inputs["x"])})

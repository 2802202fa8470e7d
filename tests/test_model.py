"""Networks on cases with a known answer, and the names and shapes of the published ones."""
import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels.norm import rms_modulate, rms_norm
from kernels.qk import qk_norm_rope
from model import (
    LATENT_CHANNELS,
    VOSR,
    AutoencoderKL,
    DINOv2,
    DiT,
    ModelConfig,
    QwenVAE,
    TinyAutoencoder,
    guided_velocity,
    rope_table,
    sd_decoder,
)

SIZE_05B = dict(dim=1024, depth=28, num_heads=16, enc_dim=768, ae_type="sd2")
SIZE_14B = dict(dim=1536, depth=36, num_heads=24, enc_dim=1024, ae_type="qwen")
PUBLISHED = {  # constructor, parameters, digest of names and shapes (official code on the meta device)
    "VOSR_0.5B_ms": (lambda: DiT(ModelConfig(**SIZE_05B)), 485_623_616, "399e780cfacf8bcf"),
    "VOSR_0.5B_os": (lambda: DiT(ModelConfig(**SIZE_05B, auxiliary_time_cond=True)), 486_936_384,
                     "8b339b66e5ff6465"),
    "VOSR_1.4B_ms": (lambda: DiT(ModelConfig(**SIZE_14B)), 1_393_943_616, "290eeffd1dee6d64"),  # and VOSR 2.0
    "VOSR_1.4B_os": (lambda: DiT(ModelConfig(**SIZE_14B, auxiliary_time_cond=True)), 1_396_699_200,
                     "d199c4de90bc280e"),
    "dinov2_vits14": (lambda: DINOv2(384, 12, 6), 22_056_576, "d2688998b6a3fd60"),
    "dinov2_vitb14": (lambda: DINOv2(768, 12, 12), 86_580_480, "6af41c6986427c48"),
    "dinov2_vitl14": (lambda: DINOv2(1024, 24, 16), 304_368_640, "7dc53284017908ac"),
    "sd21_vae": (AutoencoderKL, 83_653_863, "600696bc94ffc80f"),
    "light_decoder": (lambda: sd_decoder((64, 128, 256, 256), 2, 4), 12_387_459, "1193b5ce6753b9f0"),
    "qwen_vae2d": (lambda: QwenVAE([0.0] * 16, [1.0] * 16), 44_599_603, "914251e0035ca63d"),
}
MANIFESTS = Path(__file__).parents[2] / "shared" / "fixtures"  # all names, outside the repository


def filled(net):
    """The same network with all parameters set by a formula, of ordinary size; the output is zero no more."""
    for i, p in enumerate(net.parameters()):
        wave = torch.sin(1.7 * torch.arange(p.numel(), dtype=torch.float64) + i).view(p.shape)
        fan = p[0].numel() if p.dim() > 1 else 16
        p.data = (1.4 * wave / fan**0.5 + (p.dim() == 1 and bool((p == 1).all()))).float()
    return net.eval()


def dit(**changes):
    return filled(DiT(ModelConfig(**dict(dim=32, depth=2, num_heads=2, enc_dim=8, resolution=64) | changes)))


def batch(height=8, width=8, tokens=5, channels=4):
    g = torch.Generator().manual_seed(0)
    z_t, c_str = torch.randn(2, 2, channels, height, width, generator=g)
    return z_t, torch.tensor([0.9, 0.3]), c_str, torch.randn(2, tokens, 8, generator=g)


def same(a, b, tolerance=1e-5):
    return a.shape == b.shape and (a - b).abs().max() < tolerance * max(1, b.abs().max())


# ---------------------------------------------------------------- the DiT and its guidance
def test_a_new_network_predicts_zero():
    net = DiT(ModelConfig(dim=32, depth=2, num_heads=2, enc_dim=8, resolution=64))
    assert not net(*batch()).any()


def test_guidance_1_is_the_full_branch_and_0_the_partial_one():
    net, (z, t, c_str, c_sem) = dit(), batch()
    full, weak = net(z, t, c_str, c_sem), net(z, t, 0.1 * c_str, torch.zeros_like(c_sem))
    assert not same(full, weak)
    for scale, wanted in ((1, full), (0, weak), (-0.5, 1.5 * weak - 0.5 * full)):
        assert same(guided_velocity(net, z, t, c_str, c_sem, 0.1, scale), wanted)


def test_a_student_whose_target_time_is_now_is_its_teacher():
    student, args = dit(auxiliary_time_cond=True), batch()
    teacher = DiT(ModelConfig(dim=32, depth=2, num_heads=2, enc_dim=8, resolution=64))
    teacher.load_state_dict({n: v for n, v in student.state_dict().items() if "r_embedder" not in n})
    assert torch.equal(student(*args, r=args[1]), teacher(*args))
    assert not same(student(*args, r=0 * args[1]), teacher(*args))


def test_a_transposed_picture_gives_the_transposed_velocity():
    """With transposed patches, and row and column half of the heads swapped; the grid is not square."""
    net, turned = dit(num_heads=1), dit(num_heads=1)
    swap = torch.arange(32).roll(16)
    turned.x_embedder.proj.weight.data = net.x_embedder.proj.weight.mT
    for name in ("weight", "bias"):
        rows = getattr(net.final_layer.linear, name).data.view(2, 2, 4, -1)
        getattr(turned.final_layer.linear, name).data = rows.transpose(0, 1).reshape(16, -1).squeeze(-1)
        for one, other in zip(net.blocks, turned.blocks, strict=True):
            q, k, v = getattr(one.attn.qkv, name).data.chunk(3)
            getattr(other.attn.qkv, name).data = torch.cat([q[swap], k[swap], v])
    for one, other in zip(net.blocks, turned.blocks, strict=True):
        for norm in ("q_norm", "k_norm"):
            getattr(other.attn, norm).weight.data = getattr(one.attn, norm).weight.data[swap]
    z, t, c_str, c_sem = batch(8, 14)
    assert same(turned(z.mT, t, c_str.mT, c_sem), net(z, t, c_str, c_sem).mT)


def test_prepared_semantics_change_the_work_and_not_the_result():
    """Keys and values once for many steps; the partial branch needs no cross-attention (exact)."""
    net, (z, t, c_str, c_sem) = dit(), batch()
    for sem in (c_sem, 0 * c_sem):
        assert same(net(z, t, c_str, net.semantics(sem)), net(z, t, c_str, sem))
    assert same(net(z, t, c_str, net.semantics(c_sem[:1]))[1:], net(z, t, c_str, 0 * c_sem)[1:])
    for scale in (0.5, 2.0):
        assert same(guided_velocity(net, z, t, c_str, net.semantics(c_sem), 0.1, scale),
                    guided_velocity(net, z, t, c_str, c_sem, 0.1, scale))


@pytest.mark.parametrize("size, step, saved", [(SIZE_05B, 1925, 0.198), (SIZE_14B, 5221, 0.198)])
def test_a_guided_picture_costs_a_fifth_less_than_in_the_official_code(size, step, saved):
    """Operations at 512 px, 25 steps, autoencoder and vision encoder included, in units of 10^9."""
    def cost(function, *inputs):
        with FlopCounterMode(display=False) as counter:
            function(*inputs)
        return counter.get_total_flops() / 1e9

    with torch.device("meta"):
        net, large = DiT(ModelConfig(**size)), size["ae_type"] == "qwen"
        vae = QwenVAE([0.0] * 16, [1.0] * 16) if large else AutoencoderKL()
        decoder = vae.decoder if large else sd_decoder((64, 128, 256, 256), 2, 4)
        vit = DINOv2(1024, 24, 16) if large else DINOv2(768, 12, 12)
        z, t = torch.zeros(1, net.channels, 64, 64), torch.ones(1)
        c_sem = torch.zeros(1, 1024, size["enc_dim"])
        image, seen = torch.zeros(1, 3, 512, 512), torch.zeros(1, 3, 448, 448)
        memory = net.semantics(c_sem)
    around = cost(vae.encoder, image) + cost(decoder, z)
    guided = cost(guided_velocity, net, z, t, z, memory, 0.1, 0.5)
    ours = around + cost(vit.features, seen, 17 if large else 8) + cost(net.semantics, c_sem) + 25 * guided
    official = around + cost(vit.features, seen, len(vit.blocks) - 1) + 25 * 2 * cost(net, z, t, z, c_sem)
    assert guided <= step and 1 - ours / official >= saved


def test_semantic_tokens_have_no_order_and_absent_ones_no_number():
    net, (z, t, c_str, c_sem) = dit(), batch()
    assert same(net(z, t, c_str, c_sem.flip(1)), net(z, t, c_str, c_sem))
    assert same(net(z, t, c_str, torch.zeros(2, 1, 8)), net(z, t, c_str, torch.zeros(2, 9, 8)))


def test_the_constants_in_the_norms_are_the_published_ones():
    """A vector of entries 0.001 has mean square 1e-6: with eps 1e-6 its norm is off by the root of 2."""
    x, one = torch.full((1, 1, 4), 1e-3), torch.ones(4)
    for y in (rms_norm(x, one), rms_modulate(x, one, torch.zeros(1, 1, 4), torch.zeros(1, 1, 4)),
              *qk_norm_rope(x.expand(1, 1, 3, 1, 4), one, one, torch.ones(1, 2), torch.zeros(1, 2))[:2]):
        assert same(y.flatten(), torch.full((4,), 0.5**0.5))
    assert dit().layer_norm.eps == 1e-5 and DINOv2(16, 1, 1).blocks[0].norm1.eps == 1e-6


def test_positions_of_every_size_span_the_native_grid():
    native, double = (rope_table(n, n, 4, 16, torch.device("cpu"))[0].view(n, n, 8) for n in (4, 8))
    assert torch.equal(native, double[::2, ::2])
    wide = rope_table(4, 8, 4, 16, torch.device("cpu"))[0].view(4, 8, 8)
    assert torch.equal(wide[:, ::2], native)


def test_sampling_in_inference_mode_does_not_spoil_training():
    net = dit()
    with torch.inference_mode():
        net(*batch(6, 10))
    net(*batch(6, 10)).sum().backward()
    assert net.blocks[0].attn.qkv.weight.grad is not None


@pytest.mark.parametrize("net, size, r", [(dict(), (8, 7), None), (dict(), (8, 8), 0.0),
                                          (dict(auxiliary_time_cond=True), (8, 8), None)])
def test_odd_sides_and_a_missing_or_unwanted_target_time_are_refused(net, size, r):
    with pytest.raises(ValueError):
        dit(**net)(*batch(*size), r=r if r is None else torch.full((2,), r))


# ---------------------------------------------------------------- autoencoders and semantic encoders
def small_vaes():
    return {"sd2": filled(AutoencoderKL((8, 16, 8, 8), norm_num_groups=4)),
            "qwen": filled(QwenVAE([0.5] * 16, [2.0] * 16, base_dim=4)),
            "tiny": filled(TinyAutoencoder(16, (8, 8)))}


@pytest.mark.parametrize("kind", ["sd2", "qwen", "tiny"])
def test_latents_are_an_eighth_of_the_side_and_their_mode_needs_no_noise(kind):
    vosr, image = VOSR(None, small_vaes()[kind], None), torch.rand(1, 3, 24, 40) * 2 - 1
    z = vosr.encode(image)
    assert z.shape == (1, LATENT_CHANNELS[kind], 3, 5) and vosr.decode(z).shape == image.shape
    assert torch.equal(z, vosr.encode(image, torch.zeros_like(z)))


def test_the_tiny_latent_has_the_measured_mean_and_deviation_taken_out():
    vae, image = small_vaes()["tiny"], torch.rand(1, 3, 16, 16)
    raw, decoded = vae.encode(image), vae.decode(vae.encode(image))
    vae.latents_mean += 3
    vae.latents_std *= 2
    assert same(vae.encode(image), (raw - 3) / 2) and same(vae.decode(vae.encode(image)), decoded)


def test_a_grey_picture_reaches_dinov2_as_constants():
    seen = DINOv2(16, 1, 1, size=28).preprocess(torch.zeros(1, 3, 30, 50))
    wanted = (0.5 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert same(seen, wanted.view(1, 3, 1, 1).expand(1, 3, 28, 28))


def wave(*shape):
    return torch.sin(0.37 * torch.arange(torch.Size(shape).numel(), dtype=torch.float64)).view(shape).float()


PINNED = {  # root mean square and last element of outputs; the code agreed with all official fixtures
    "dinov2": (lambda: filled(DINOv2(32, 3, 2)).features(0.1 * wave(1, 3, 70, 42), 1), 4.7457113, 0.03103529),
    "sd_encoder": (lambda: small_vaes()["sd2"].encode(wave(1, 3, 24, 40)), 0.12981097, -0.18106264),
    "sd_decoder": (lambda: small_vaes()["sd2"].decode(wave(1, 4, 3, 5)), 0.98513591, -0.42622575),
    "light_decoder": (lambda: filled(sd_decoder([32] * 3, 1, 4))(wave(1, 4, 3, 5)), 0.33725142, -0.3459591),
}


@pytest.mark.parametrize("name", PINNED)
def test_networks_whose_fixtures_are_too_large_for_the_repository_compute_what_they_did(name):
    compute, size, last = PINNED[name]
    out = compute()
    assert out.square().mean().sqrt().item() == pytest.approx(size, rel=1e-5)
    assert out.flatten()[-1].item() == pytest.approx(last, abs=2e-5 * size)


# ---------------------------------------------------------------- published names and shapes
@pytest.mark.parametrize("name", PUBLISHED)
def test_names_shapes_and_counts_are_those_of_the_published_network(name):
    build, parameters, digest = PUBLISHED[name]
    with torch.device("meta"):
        net = build()
    shapes = {n: tuple(v.shape) for n, v in net.state_dict().items()}
    manifest = MANIFESTS / f"manifest_{name}.json"
    if manifest.is_file():
        listed = json.loads(manifest.read_text())["tensors"]
        assert shapes == {n: tuple(shape) for n, (shape, *_) in listed.items()}
        buffers = {n for n, (*_, last) in listed.items() if last == "buffer"}
        assert buffers == shapes.keys() & {n for n, _ in net.named_buffers()}
    assert sum(p.numel() for p in net.parameters()) == parameters
    text = "\n".join(f"{n} {shape}" for n, shape in sorted(shapes.items()))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest

"""Seconds and peak memory of sampling, stage by stage: how long a picture takes and what it needs.

    python tools/bench.py                                              # the bundled model, 512 and 1024 px
    python tools/bench.py --models 0.5B-os,2.0 --random --sizes 512    # full size, without published files
    python tools/bench.py --sizes 1024,2048,4096 --tiles 256,512,1024

A row is a process of its own: it loads the model, enlarges a picture by 4 to SIZE x SIZE, and repeats that.
--random writes files of random numbers in the layout of the published ones: the same work, but no picture.
Memory is what the process holds for itself, weights that are mapped from their file come on top (last
column); on a GPU it is what PyTorch has allocated there.
"""
import json
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sample
from config import cli, die, launch
from data import write_whole
from model import AutoencoderKL, DINOv2, DiT, ModelConfig, QwenVAE, sd_decoder

STAGES = ("load", "encode", "tokens", "DiT", "decode", "colour", "rest")
LARGE = {  # of the published models, by autoencoder
    "sd2": dict(dim=1024, depth=28, num_heads=16, enc_dim=768, layer_dinov2b_list=(8,)),
    "qwen": dict(dim=1536, depth=36, num_heads=24, enc_dim=1024, layer_dinov2b_list=(17,))}


@dataclass
class Config:
    models: str = "tiny"  # names as sample.py knows them, with commas between
    sizes: str = "512,1024"  # sides of the output in pixels
    tiles: str = "512"  # --tile of sample.py; 0: none
    steps: int = 0  # sampling steps; 0: the model's own
    repeat: int = 2  # times; the fastest counts, the first also warms up
    dtype: str = "auto"  # as in sample.py
    device: str = "auto"  # as in sample.py
    threads: int = 0  # of the CPU; 0: PyTorch's choice
    weights: str = "weights"  # folder of the weights
    random: bool = False  # write random weights below out/random first and take those
    row: bool = False  # print one row as JSON, for the call of a single process


# ---------------------------------------------------------------- random weights in the published layout
def fill(net, seed):
    """Nothing is zero, so nothing is skipped, and the values stay of ordinary size from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        if p.dim() > 1:
            p.data.normal_(std=p[0].numel() ** -0.5, generator=generator)
    return net.requires_grad_(False)


def random_parts(name):
    """{file: function that writes it to a path} for all files of a published model."""
    row = sample.DEFAULTS[name]
    shape = LARGE[row["ae_type"]] | dict(ae_type=row["ae_type"], auxiliary_time_cond=name.endswith("os"))
    cfg = ModelConfig(**shape)
    vae, config = {
        "sd2": (AutoencoderKL, dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2)),
        "qwen": (QwenVAE, dict(base_dim=96, latents_mean=[0.0] * 16, latents_std=[1.0] * 16))}[row["ae_type"]]
    light = dict(in_channels=4, out_channels=3, block_out_channels=(64, 128, 256, 256), layers_per_block=2)
    args = asdict(cfg) | ({"distill_type": "onestep"} if name == "2.0" else {})

    def text(content):
        return lambda path: path.write_text(json.dumps(content))

    def tensors(make, seed):
        return lambda path: save_file(fill(make(), seed).state_dict(), path)

    def decoder(path):
        net = fill(sd_decoder(light["block_out_channels"], light["layers_per_block"], 4), 2)
        torch.save({"config": light, "model_state_dict": net.state_dict()}, path)

    def encoder(path):
        net = DINOv2(cfg.enc_dim, {768: 12, 1024: 24}[cfg.enc_dim], cfg.enc_dim // 64)
        torch.save(fill(net, 3).state_dict(), path)

    writers = [text(args), tensors(lambda: DiT(cfg), 0), text(config), tensors(lambda: vae(**config), 1),
               *([decoder] if row["ae_type"] == "sd2" else []), encoder]
    return dict(zip(sample.published_files(name), writers, strict=True))


def write_random(name, root):
    """The files of a published model below root, as far as they are missing."""
    for file, writer in random_parts(name).items():
        if not (root / file).is_file():
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            print(f"writing {root / file}", file=sys.stderr)
            write_whole(root / file, writer)


# ---------------------------------------------------------------- the measurement
class Watch:
    """Seconds and peak MiB of the stage that is running; what is in none of them belongs to `rest`."""

    def __init__(self, device):
        self.device, self.now, self.since = torch.device(device), "rest", time.perf_counter()
        self.seconds, self.peak, self.resident = dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0.0), 0.0
        if self.device.type == "cpu" and sys.platform == "linux":
            threading.Thread(target=self.poll, daemon=True).start()

    def poll(self):
        while True:
            self.note()
            time.sleep(0.005)

    def note(self):
        if self.device.type == "cuda":
            held = torch.cuda.max_memory_allocated(self.device) / 2**20
        elif sys.platform == "linux":
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            held = int(status["RssAnon"].split()[0]) / 1024
            self.resident = max(self.resident, int(status["VmRSS"].split()[0]) / 1024)
        else:
            held = float("nan")
        self.peak[self.now] = max(self.peak[self.now], held)

    def switch(self, stage):
        """Begin another stage -> the one that ended."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.note()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        before, now = self.now, time.perf_counter()
        self.seconds[before] += now - self.since
        self.now, self.since = stage, now
        return before

    @contextmanager
    def stage(self, name):
        before = self.switch(name)
        yield
        self.switch(before)

    def wrap(self, name, function):
        def timed(*args, **options):
            with self.stage(name):
                return function(*args, **options)
        return timed


def measure(cfg):
    """One row: {stage: (seconds, MiB)}, of the load once and of the fastest picture."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    device = sample.choose_device(cfg.device)
    watch = Watch(device)
    with watch.stage("load"):
        vosr = sample.load(cfg.models, cfg.steps, cfg.weights, cfg.dtype, cfg.device)
    names = dict(encode="encode", tokens="semantic_tokens", DiT="velocity", decode="decode")
    for stage, method in names.items():
        setattr(vosr, method, watch.wrap(stage, getattr(vosr, method)))
    vosr.dit.semantics = watch.wrap("DiT", vosr.dit.semantics)
    sample.wavelet = watch.wrap("colour", sample.wavelet)
    size = int(cfg.sizes)
    with Image.open(Path(__file__).parent.parent / "assets" / "input.png") as picture:
        image = picture.convert("RGB").resize((size // 4, size // 4))
    best = None
    for _ in range(cfg.repeat):
        watch.switch("rest")
        watch.seconds = dict.fromkeys(STAGES, 0.0) | {"load": watch.seconds["load"]}
        steps = cfg.steps or vosr.defaults["steps"]
        sample.upscale(image, vosr, size=(size, size), steps=steps, tile=int(cfg.tiles))
        watch.switch("rest")
        total = sum(watch.seconds.values())
        best = watch.seconds if best is None or total < sum(best.values()) else best
    return dict(seconds=best, peak=watch.peak, resident=watch.resident, steps=steps, half=str(vosr.half))


def main():
    cfg = cli(Config)
    if cfg.row:
        print(json.dumps(measure(cfg)))
        return
    models = [sample.find_model(name, cfg.steps, cfg.weights)[1] or name for name in cfg.models.split(",")]
    if not all(n.isdigit() for n in f"{cfg.sizes},{cfg.tiles}".split(",")) or cfg.repeat < 1:
        die("--sizes and --tiles want numbers such as 512,1024, --repeat at least 1")
    if min(map(int, cfg.sizes.split(","))) < 4 or (cfg.random and any(n.startswith("tiny") for n in models)):
        die("--sizes start at 4; --random is for the published models, tiny has weights")
    if cfg.random:
        cfg.weights = "out/random"
        for name in models:
            write_random(name, Path(cfg.weights))
    print(f"torch {torch.__version__}, {sample.choose_device(cfg.device)}, "
          f"{cfg.threads or torch.get_num_threads()} threads; cells: seconds / peak MiB\n")
    print("| model | output | tile | steps |", " | ".join(STAGES), "| picture | with mapped weights |")
    print("|---" * (6 + len(STAGES)) + "|")
    for name in models:
        for size in cfg.sizes.split(","):
            for tile in cfg.tiles.split(","):
                one = asdict(cfg) | dict(models=name, sizes=size, tiles=tile, row=True, random=False)
                words = [f"--{f.name}={str(one[f.name]).lower() if f.type is bool else one[f.name]}"
                         for f in fields(Config)]
                done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True)
                if done.returncode:
                    sys.exit(done.returncode)
                row = json.loads(done.stdout)
                cells = [f"{row['seconds'][s]:.2f} / {row['peak'][s]:.0f}" for s in STAGES]
                total = sum(row["seconds"][s] for s in STAGES if s != "load")
                print(f"| {name} | {size} | {tile} | {row['steps']} |", " | ".join(cells),
                      f"| {total:.2f} s | {row['resident']:.0f} |", flush=True)


if __name__ == "__main__":
    launch(main)

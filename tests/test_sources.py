"""Where training pictures come from: files, tars, pairs, made ones, mixtures; order, workers, resume."""
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import train
from data import Crops, open_source, shuffled, write_shard

ROOT = Path(__file__).parent.parent


def png(seed, side=16):
    """Content of a picture file that is different for every seed."""
    levels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(levels).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def shards(folder, counts, index=True):
    """Tars of `counts` pictures -> folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, (count, first) in enumerate(zip(counts, np.cumsum([0, *counts]), strict=False)):
        members = [(f"{k:09d}.png", png(k)) for k in range(first, first + count)]
        write_shard(folder / f"{n:06d}.tar", members)
    if index:
        (folder / "index.json").write_text(json.dumps({f"{n:06d}.tar": k for n, k in enumerate(counts)}))
    return folder


def files(folder, count, side=16):
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        (folder / f"{k}.png").write_bytes(png(k, side))
    return folder


def seen(source, numbers, side=16):
    """Bytes of the crops with these numbers; whole pictures if they have `side`."""
    crops = Crops(source, side, 0)
    return [crops[n][0].numpy().tobytes() for n in numbers]


def test_shuffled_is_a_permutation_of_any_length_and_another_for_another_key():
    for n in [*range(1, 40), 257, 1000]:
        assert sorted(shuffled(i, n, "a") for i in range(n)) == list(range(n))
    assert len({shuffled(i, 10**11, key) for i in range(200) for key in "ab"}) == 400
    assert abs(np.corrcoef(np.arange(1000), [shuffled(i, 1000, 0) for i in range(1000)])[0, 1]) < 0.1


@pytest.mark.parametrize("kind", ["files", "list", "tar", "tars", "tars without index", "mixture"])
def test_an_epoch_of_any_source_shows_every_picture_once_and_the_next_one_in_another_order(tmp_path, kind):
    if kind in ("files", "list"):
        spec = files(tmp_path / "a", 11)
        if kind == "list":
            spec = tmp_path / "list.txt"
            spec.write_text("".join(f"a/{k}.png\n" for k in range(11)))
    else:
        spec = shards(tmp_path / "a", (4, 4, 3), kind != "tars without index")
        spec = spec / "000000.tar" if kind == "tar" else spec
        if kind == "mixture":
            spec = f"{files(tmp_path / 'b', 2, side=17)}:3, {tmp_path / 'a'}"
    source = open_source(spec)
    n = {"tar": 4, "mixture": 2 * 3 + 11}.get(kind, 11)
    assert source.count == n
    first, second = ([number for number in source.choose(epoch * n, 0)] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(n)) and first != second
    epochs = [seen(open_source(spec), range(epoch * n, epoch * n + n)) for epoch in (0, 1)]
    distinct = {"mixture": 11}.get(kind, n)
    pictures = {Image.open(io.BytesIO(png(k))).tobytes() for k in range(distinct)}
    planar = {np.frombuffer(p, np.uint8).reshape(16, 16, 3).transpose(2, 0, 1).tobytes() for p in pictures}
    assert all(planar <= set(epoch) and len(epoch) == n for epoch in epochs)


def test_reading_in_order_needs_few_tars_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "WINDOW", 3)
    source = open_source(shards(tmp_path, [5] * 12))
    order = [number // 5 for number in source.choose(0, 0)]
    for start in range(0, 60, 15):
        assert len(set(order[start:start + 15])) == 3
    assert order[:15] != sorted(order[:15])


def test_a_collection_of_100_million_is_opened_without_listing_or_reading_it(tmp_path, monkeypatch):
    (tmp_path / "index.json").write_text(json.dumps({f"{n:06d}.tar": 10_000 for n in range(10_000)}))
    for name in ("glob", "rglob", "iterdir"):
        monkeypatch.setattr(Path, name, None)
    monkeypatch.setattr(data, "shard_members", None)
    source = open_source(tmp_path)
    assert source.count == 10**8
    path, number = source.path(next(source.choose(123_456_789, 0)))
    assert Path(path).parent == tmp_path and 0 <= number < 10_000


def test_a_tar_with_code_links_devices_and_outside_names_is_inert(tmp_path):
    path, victim = tmp_path / "in" / "x.tar", tmp_path / "victim"
    path.parent.mkdir()

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {victim}",)

    import pickle
    with tarfile.open(path, "w") as tar:
        def add(name, content=b"", **fields):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(content))

        add("a.pickle", pickle.dumps(Evil()))
        add("a.pyd", pickle.dumps(Evil()))
        add("link.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add("hard.png", type=tarfile.LNKTYPE, linkname="a.pickle")
        add("null.png", type=tarfile.CHRTYPE, devmajor=1, devminor=3)
        add("../out.png", png(0))
        add("img.v2.png", png(1))
        add("sub/c.PNG", png(2))
    assert len(set(seen(open_source(path), range(3)))) == open_source(path).count == 3
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == ["in", "in/x.tar"]


def test_a_damaged_tar_is_named_and_what_is_whole_is_used(tmp_path, capsys):
    folder = shards(tmp_path, (6, 6))
    content = (folder / "000001.tar").read_bytes()
    (folder / "000001.tar").write_bytes(content[:len(content) // 2])
    source = open_source(folder)
    source.limit = 1.0
    assert len(set(seen(source, range(12)))) < 12
    assert capsys.readouterr().out.count("000001.tar is damaged after") == 1
    assert len(source.bad) == 1                                                 # the one that was cut


@pytest.mark.parametrize("index", ["[1, 2]", '{"000000.tar": "3"}', '{"000000.tar": -3}', "{broken", "3"])
def test_an_index_that_is_none_is_named(tmp_path, index):
    shards(tmp_path, (3,))
    (tmp_path / "index.json").write_text(index)
    with pytest.raises(ValueError, match=r"index\.json is not \{tar: number of its pictures\}"):
        open_source(tmp_path)


def test_large_members_of_a_tar_are_not_read(tmp_path, monkeypatch, capsys):
    source = open_source(shards(tmp_path, (3,)))
    monkeypatch.setattr(data, "MAX_BYTES", len(png(1)) - 1)
    with pytest.raises(ValueError, match="cannot be read"):
        seen(source, range(3))
    assert "at most" in capsys.readouterr().out


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_pairs_give_the_same_part_of_both_pictures(tmp_path, factor):
    """The LR crop is that of the LR picture enlarged as a whole, to a level (bicubic at another offset)."""
    for side, scale in (("HR", 1), ("LR", factor)):
        (tmp_path / side).mkdir()
        smooth = Image.open(io.BytesIO(png(7, 6))).resize((80, 60), Image.Resampling.BICUBIC)
        smooth.resize((80 // scale, 60 // scale), Image.Resampling.BOX).save(tmp_path / side / "x.png")
    source = open_source(tmp_path)
    hr, lr = (Image.open(tmp_path / side / "x.png") for side in ("HR", "LR"))
    whole = [torch.from_numpy(np.array(p.resize((80, 60), Image.Resampling.BICUBIC))).permute(2, 0, 1).int()
             for p in (hr, lr)]
    for number in range(5):
        hr, lr, paired = Crops(source, 32, 0)[number]
        places = [(y, x) for y in range(29) for x in range(49)
                  if torch.equal(whole[0][:, y:y + 32, x:x + 32], hr.int())]
        assert paired and len(places) == 1
        (y, x), = places
        assert (whole[1][:, y:y + 32, x:x + 32] - lr.int()).abs().max() <= 1


def test_pairs_that_do_not_fit_are_named(tmp_path, capsys):
    for side in ("HR", "LR"):
        files(tmp_path / side, 3)
    (tmp_path / "LR/1.png").write_bytes(png(1, 7))
    Image.new("RGB", (16, 4)).save(tmp_path / "LR/2.png")
    source = open_source(tmp_path)
    source.limit = 1.0
    seen(source, range(3))
    assert "LR/2.png is 16x4, its HR 16x16" in capsys.readouterr().out and len(source.bad) == 1
    again = open_source(tmp_path)
    again.limit = 1.0
    assert seen(again, range(5, 8), 12) == seen(source, range(5, 8), 12)  # the past of a process is no matter
    (tmp_path / "LR/0.png").unlink()
    with pytest.raises(ValueError, match="0 is not in both HR and LR"):
        open_source(tmp_path)


def config(spec, **options):
    options |= dict(data=str(spec), resolution=16, train_batch_size=4, cache=0, max_train_steps=6)
    return train.Config(**options)


def stream(cfg, start=0, rank=0, world=1):
    """Micro-batches of a run as bytes, each crop of hr with its lr."""
    parts = train.batches(cfg, lambda hr, lr: (hr, lr), start, rank, world, torch.device("cpu"))
    return [[hr.numpy().tobytes() + lr.numpy().tobytes() for hr, lr in zip(*part, strict=True)]
            for part in parts]


@pytest.mark.parametrize("kind", ["files", "tars", "pairs", "procedural", "mixture"])
def test_resumed_batches_are_those_of_the_whole_run_with_any_number_of_workers(tmp_path, kind):
    made = files(tmp_path / "f", 7, 20), shards(tmp_path / "t", (4, 3)), *(
        files(tmp_path / "p" / side, 5) for side in ("HR", "LR"))
    spec = dict(files=made[0], tars=made[1], pairs=tmp_path / "p", procedural="procedural",
                mixture=f"{made[0]},{made[1]}:2,procedural:5")[kind]
    whole = stream(config(spec))
    assert len(whole) == 6 and stream(config(spec), start=4) == whole[4:]
    assert stream(config(spec, num_workers=2), start=3) == whole[3:]


def test_two_ranks_with_two_workers_share_the_batches_and_never_the_draws(tmp_path):
    spec = files(tmp_path, 24, 20)
    ranks = [stream(config(spec, num_workers=2), rank=rank, world=2) for rank in (0, 1)]
    crops = [[crop[:3 * 16 * 16 * 4] for crop in batch] for batch in stream(config(spec))]
    for both, whole in zip(zip(*ranks, strict=True), crops, strict=True):
        assert [crop[:3 * 16 * 16 * 4] for crop in (*both[0], *both[1])] == whole
    degraded = [crop for rank in ranks for batch in rank for crop in batch]
    assert len(set(degraded)) == len(degraded) == 24


def test_twelve_hostile_files_among_three_good_ones(tmp_path):
    """`show` draws the three and names the twelve, once each."""
    files(tmp_path / "in", 3, 40)
    good, bad = png(0, 40), {}
    for n, content in enumerate([b"", b"text", good[:50], good[:-40], good[:8], b"GIF89a", b"\xff\xd8\xff",
                                 b"BM", b"RIFF0000WEBP", b"II*\0", b"P6 9 9 255\n", b"\0" * 99]):
        bad[f"bad{n}{('.png', '.jpg', '.webp', '.tif', '.gif', '.ppm')[n % 6]}"] = content
        (tmp_path / "in" / [*bad][-1]).write_bytes(content)
    words = [sys.executable, str(ROOT / "data.py"), "show", str(tmp_path / "in"), "--rows=15",
             "--resolution=32", f"--out={tmp_path / 'sheet.png'}"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("unreadable: ") == 12
    assert all(done.stdout.count(f"{name} is") == 1 for name in bad)
    assert Image.open(tmp_path / "sheet.png").size == (2 * 256 + 560, 15 * 260)


@pytest.mark.parametrize("words", [(), ("show",), ("show", "missing"), ("draw", "procedural")])
def test_a_wrong_call_of_data_ends_with_one_line_and_code_2(words):
    done = subprocess.run([sys.executable, str(ROOT / "data.py"), *words], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")

"""tools/pack.py on planted good, bad and doubled pictures: what stays, what is written, how it restarts."""
import contextlib
import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

import data
from config import launch
from tools import pack

ROOT = Path(__file__).parent.parent
SMALL = ("--side", "64", "--entropy", "1.2", "--shard", "4")  # for pictures of 128 px
HOOK = """
import multiprocessing, os, signal
from tools import pack
multiprocessing.set_start_method("fork")
left, examine, write_shard = dict(picture={pictures}, member={members}), pack.examine, pack.data.write_shard

def count(kind, done):
    left[kind] -= 1
    if left[kind] == 0:
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    return done

pack.examine = lambda source, k: count("picture", examine(source, k))
pack.data.write_shard = lambda path, members: write_shard(path, (count("member", m) for m in members))
pack.main()
"""


def leaves(seed, side=128):
    return data.to_pillow(data.dead_leaves(data.keyed_generator("cpu", "pack", seed), side) / 255)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of pictures of every kind, and {name: verdict}, where a duplicate names the better one."""
    folder, wanted = tmp_path_factory.mktemp("pack") / "photos", {}

    def save(name, picture, verdict="kept", **options):
        picture.save(folder / name, **options)
        wanted[name] = verdict

    folder.mkdir()
    for n in range(14):
        save(f'g{n:02d} "x", é.png' if n == 7 else f"g{n:02d}.png", leaves(n))
    save("copy.jpg", leaves(0), "duplicate of g00.png", quality=60)
    save("half.webp", leaves(1).resize((64, 64)), "duplicate of g01.png", quality=90)
    save("z large.jpg", leaves(14, 192), quality=95)
    save("a small.png", leaves(14, 192).reduce(2), "duplicate of z large.jpg")
    save("same a.png", leaves(15))
    save("same b.png", leaves(15), "duplicate of same a.png")
    save("blur.png", leaves(20, 256).filter(ImageFilter.GaussianBlur(3)), "blurred")
    save("enlarged.png", leaves(21, 96).resize((480, 480)), "blurred")
    bokeh = leaves(24, 256).filter(ImageFilter.GaussianBlur(5))
    bokeh.paste(leaves(24, 256).crop((64, 64, 192, 192)), (64, 64))  # only the middle quarter is sharp
    save("bokeh.png", bokeh)
    save("flat.png", Image.fromarray((np.indices((128, 128)).sum(axis=0) / 2).astype(np.uint8)), "flat")
    squares = np.kron(np.indices((8, 8)).sum(axis=0) % 2 * 255, np.ones((20, 20)))
    save("few.png", Image.fromarray(squares.astype(np.uint8)), "few levels")
    save("tiny.png", leaves(22).crop((0, 0, 128, 63)), "small")
    cut = (folder / "copy.jpg").read_bytes()[:2000]
    for name, body in (("cut.jpg", cut), ("empty.png", b""), ("text.png", b"no picture")):
        (folder / name).write_bytes(body)
        wanted[name] = "unreadable"
    return folder, wanted


@pytest.fixture(scope="module")
def packed(photos):
    """The folder of one undisturbed run, and what was printed."""
    out, text = photos[0].parent / "packed", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(text):
        call(patch, photos[0], out, "--workers", "2")
    return out, text.getvalue()


def call(monkeypatch, *words, code=0):
    """Run in this process; a wrong call ends with `code`."""
    monkeypatch.setattr(sys, "argv", ["pack.py", *SMALL, "--workers", "1", *map(str, words)])
    if not code:
        return launch(pack.main)
    with pytest.raises(SystemExit) as stop:
        launch(pack.main)
    assert stop.value.code == code


def contents(out):
    """{name: bytes} of what a run leaves behind, measures aside."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def rows(out):
    with open(out / "pack.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_planted_picture_is_out_for_its_reason_and_the_good_ones_stay(photos, packed):
    table, wanted, found = rows(packed[0]), photos[1], {}
    names = {row["key"]: Path(row["name"]).name for row in table}
    for key, name in names.items():
        verdict, _, better = table[int(key)]["verdict"].partition(" of ")
        found[name] = f"{verdict} of {names[better]}" if better else verdict.partition(":")[0]
    assert found == wanted and len(table) == len(wanted)
    counts = f"kept {list(wanted.values()).count('kept')} of {len(wanted)}; left out: 3 unreadable, 1 small, "
    assert f"{counts}1 flat, 2 blurred, 1 few levels, 4 duplicate" in packed[1]
    assert "per second and core; 100M like these: " in packed[1]
    assert Image.open(packed[0] / "pack.png").size == (1200, 540)


def test_shards_hold_the_original_bytes_under_keys_of_their_own(packed):
    source, kept = data.open_source(packed[0]), [row for row in rows(packed[0]) if row["verdict"] == "kept"]
    sizes = [len(kept[first : first + 4]) for first in range(0, len(kept), 4)]
    index = {f"{n:06d}.tar": size for n, size in enumerate(sizes)}
    assert json.loads((packed[0] / "index.json").read_text()) == index
    for k, row in enumerate(kept):
        path, n = source.path(k)
        name, start, size = data.shard_members(path)[n]
        assert name == f"{int(row['key']):09d}{row['type']}"
        assert Path(path).read_bytes()[start : start + size] == Path(row["name"]).read_bytes()
        assert torch.equal(source.image(k), data.read_levels(row["name"]))
    assert source.count == len(kept) == len({row["key"] for row in kept})


@pytest.mark.parametrize("pictures, members", [(20, 0), (0, 6)])  # in the second block, in the second shard
def test_a_run_that_is_killed_goes_on_and_ends_with_the_same_bytes(photos, packed, tmp_path, monkeypatch,
                                                                  pictures, members):
    out, words = tmp_path / "out", [photos[0], tmp_path / "out", *SMALL, "--workers", "1"]
    script = HOOK.format(pictures=pictures, members=members)
    done = subprocess.run([sys.executable, "-c", script, *map(str, words)], cwd=ROOT)
    finished = [*out.glob("measures/0*.csv"), *out.glob("0*.tar")]
    assert done.returncode == -9 and len(finished) == (3 if members else 1)
    before = [path.stat().st_ino for path in finished]
    call(monkeypatch, *words[:2])
    assert [path.stat().st_ino for path in finished] == before  # nothing is done twice
    assert contents(out) == contents(packed[0]) and not list(out.glob("measures/.*"))


@pytest.mark.slow
def test_two_ranks_end_with_the_bytes_of_one(photos, packed, tmp_path):
    words = [ROOT / "tools" / "pack.py", photos[0], tmp_path / "out", *SMALL, "--workers", "2"]
    ranks = [subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE,
                              env=os.environ | {"RANK": rank, "WORLD_SIZE": "2"}) for rank in "10"]
    texts = [process.communicate(timeout=100)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    assert contents(tmp_path / "out") == contents(packed[0]) and not texts[0] and b"kept" in texts[1]


@pytest.mark.slow
def test_torchrun_starts_the_ranks(photos, packed, tmp_path):
    words = [ROOT / "tools" / "pack.py", photos[0], tmp_path / "out", *SMALL]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert subprocess.run([*start, *words]).returncode == 0
    assert contents(tmp_path / "out") == contents(packed[0])


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_that_is_left_alone_gives_up(photos, tmp_path, monkeypatch, capsys, rank):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    call(monkeypatch, photos[0], tmp_path / "out", "--patience", "1", code=2)
    error = capsys.readouterr().err
    assert f"{('000000016.csv', 'pack.json')[int(rank)]} is missing, other ranks" in error


def test_a_folder_of_tars_and_a_list_give_the_shards_of_the_files(photos, packed, tmp_path, monkeypatch):
    files = data.pictures_in(photos[0])
    (tmp_path / "tars").mkdir()
    for n, some in enumerate((files[:9], files[9:])):
        data.write_shard(tmp_path / "tars" / f"{n}.tar", [(file.name, file.read_bytes()) for file in some])
    (tmp_path / "list").write_text("\n".join(map(str, files)))
    shards = {name: body for name, body in contents(packed[0]).items() if name[0] in "0i"}
    for source in ("tars", "list"):
        call(monkeypatch, tmp_path / source, tmp_path / f"{source} packed")
        assert shards.items() <= contents(tmp_path / f"{source} packed").items() and len(shards) > 4


def test_thresholds_may_change_until_there_are_shards(photos, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    for limit, count in (("9", 24), ("0.32", 2)):
        call(monkeypatch, photos[0], out, "--look", "--sharpness", limit, code=2 * (limit == "9"))
        assert f" {count} blurred" in capsys.readouterr().out and not list(out.glob("*.tar"))
    call(monkeypatch, photos[0], out)
    before = contents(out)
    for source, words, reason in ((photos[0], ("--gradient", "5"), "gradient 4.0 there, 5.0 now"),
                                  (photos[0].parent, (), "names "), (out, (), "inside each other")):
        call(monkeypatch, source, out, *words, code=2)
        assert reason in (error := capsys.readouterr().err) and error.count("\n") == 1
    assert contents(out) == before


def test_wrong_calls_end_with_one_line_and_code_2(photos, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    full, out = shutil.copytree(photos[0], tmp_path / "photos"), tmp_path / "out"
    for words, reason in (((), "usage:"), ((full,), "usage:"), ((full, out, "--shard", "0"), "--shard sta"),
                          ((full, out, "--distance", "17"), "--distance is"), ((full, tmp_path), "inside"),
                          ((tmp_path / "none", out), "does not"), ((tmp_path / "empty", out), "no pictures"),
                          ((full, full / "out"), "inside each"), (("procedural", out), "are not packed"),
                          ((photos[0], full), "not of this tool"), ((photos[0], full / "g00.png"), "used: "),
                          ((full, out, "--side", "9999"), "no picture is left")):
        call(monkeypatch, *words, code=2)
        error = capsys.readouterr().err
        assert error.startswith("error: ") and reason in error and error.count("\n") == 1, error


def test_measures_of_simple_pictures_are_known():
    """A slope of 1 level per pixel is 4 after averaging; of independent pixels a quarter is left."""
    ramp = Image.fromarray(np.tile(np.arange(128, dtype=np.uint8), (128, 1))).convert("RGB")
    assert pack.measure(ramp)[:3] == ("1.00", "0.250", "7.00")
    noise = torch.randint(256, (256, 256, 3), generator=data.keyed_generator("cpu", 0)).byte().numpy()
    assert 3.9 < float(pack.measure(Image.fromarray(noise))[1]) < 4.1
    edge = Image.new("RGB", (256, 256), (0, 0, 200))
    edge.paste((0, 0, 0), (0, 0, 128, 256))
    _, sharpness, entropy, _, look = pack.measure(edge)
    assert 0.45 < float(sharpness) < 0.75 and entropy == "1.00" and look == "blue-dark-plain"
    assert pack.measure(Image.new("RGB", (1, 3)))[:2] == ("0.00", "0.000")


@pytest.mark.parametrize("distance", [0, 4, 7])
def test_duplicates_are_those_that_a_search_through_all_pairs_finds(distance):
    generator = np.random.default_rng(0)
    hashes, wanted = generator.integers(2**64, size=60, dtype=np.uint64).repeat(8), []
    for bit in generator.integers(64, size=(4, len(hashes))).astype(np.uint64):  # up to 8 bits between copies
        hashes ^= np.uint64(1) << bit
    for n, h in enumerate(hashes := generator.permutation(np.append(hashes, hashes[:20]))):
        near = [k for k in range(n) if wanted[k] < 0 and int(h ^ hashes[k]).bit_count() <= distance]
        wanted.append(near[0] if near else -1)
    assert pack.duplicates(hashes, distance).tolist() == wanted and 20 <= sum(w >= 0 for w in wanted) < 480


def test_a_cluster_keeps_pictures_from_all_over_the_source():
    names = ("width", "height", "gradient", "sharpness", "entropy", "bytes", "good", "hash", "cluster")
    table = np.full(12, 300, [(name, dict(hash="u8", good="?").get(name, "i8")) for name in names])
    table["hash"], table["cluster"] = np.arange(12) * 0x0123456789ABCDEF, [0, 1] + [0] * 10
    verdict, _ = pack.decide(pack.Config(per_cluster=3, distance=0), table)
    assert np.flatnonzero(verdict == 0).tolist() == [0, 1, 4, 8]
    assert {pack.VERDICTS[v] for v in verdict if v} == {"cluster full"}

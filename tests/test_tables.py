"""tools/tables.py: numbers of the paper, of hand-made results, and of evaluate.py called directly."""
import csv
import json
import sys

import numpy as np
import pytest
from PIL import Image, ImageColor
from test_evaluate import call, pairs  # noqa: F401  fixtures
from test_sample import weights  # noqa: F401  a fixture: folder of a random tiny family

import evaluate as ev
from config import launch
from tools import tables
from tools.curves import COLOURS

BLUE = ImageColor.getrgb(COLOURS[0])
D = np.sin(1.7 * np.arange(40)) + 0.2  # mean 0.217372, 95 % interval [0.0034, 0.4365]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the tool as a command in an empty folder -> rows of cells of each table, all that was printed."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["tables.py", *map(str, words)])
        launch(tables.main)
        printed = capsys.readouterr().out
        found = [[[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines()]
                 for part in printed.split("\n\n") if part.startswith("|")]
        assert all(len({*map(len, table)}) == 1 for table in found)
        return found, printed

    return run


def summary(folder, model="0.5B", steps=1, protocol="realsr", **means):
    """summary.json as evaluate.py leaves it."""
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(dict(
        settings=dict(model=model, steps=steps, cfg_scale="", color="wavelet"), protocol=protocol, count=7,
        means={"bicubic": {"psnr_y": 0}, model: means})))
    return folder


def scored(folder, **columns):
    """per_image.csv with pictures 0, 1, ... that have these scores, after their bicubic rows."""
    folder.mkdir()
    rows = [["stem", "model", *columns]]
    for n, scores in enumerate(zip(*columns.values(), strict=True)):
        rows += [f"{n:02}", "bicubic", *[99] * len(scores)], [f"{n:02}", "tiny", *scores]
    (folder / "per_image.csv").write_text("".join(",".join(map(str, row)) + "\n" for row in rows))


def test_means_stand_beside_the_row_of_the_model(run, tmp_path):
    one = summary(tmp_path / "one", psnr_y=25.5, ssim_y=0.7, niqe=None)
    many = summary(tmp_path / "many", "1.4B", 25, "screensr", niqe=4.8)
    named = summary(tmp_path / "named", "0.5B-ms", 3, "folder", psnr_y=19.0)
    (first, second, third), printed = run("paper", one, many, named)
    assert [row[0].split(",")[0] for row in first[2:]] == tables.PAPER["table1"]["columns"]
    assert first[0][2] == "paper, VOSR-0.5B-os"                                 # of RealSR
    assert first[2] == ["psnr_y, higher is better", "25.5000", "25.4189", "+0.0811"]
    assert first[3][1:] == ["0.7000", "0.7220", "-0.0220"]
    assert {tuple(row[1::2]) for row in first[4:]} == {("not measured", "")}
    assert second[0][2] == "paper, VOSR-1.4B-ms" and second[7][1:] == ["4.8000", "4.7540", "+0.0460"]
    assert third[0][2] == "paper, VOSR-0.5B-ms" and third[2][1:] == ["19.0000", "19.5677", "-0.5677"]
    assert all(words in printed for words in ("realsr, 7 pictures, 0.5B, steps 1", "100 pictures of RealSR"))


def test_a_row_and_a_set_can_be_named(run, tmp_path):
    for model, steps, said in (("tiny", 1, ", steps 1, color wavelet"), ("results/", "", "")):
        folder = summary(tmp_path / model, model, steps, "pairs", psnr_y=20.0)
        (table,), printed = run("paper", folder, "--row", "SinSR", "--set", "lsdir")
        assert table[2][2:] == ["19.6740", "+0.3260"] and f"pairs, 7 pictures, {model}{said}\n" in printed


def test_without_folders_the_tables_of_the_paper_are_printed(run):
    found, printed = run("paper")
    assert [len(table) - 2 for table in found] == [12, 12, 12, 12, 3, 3, 5, 3] and "2604.03225" in printed
    assert found[4][4] == ["recursive_consistency", "0.2856", "69.78"]


# ---------------------------------------------------------------- compare
def test_differences_have_the_documented_mean_interval_and_signs(run, tmp_path):
    """rc - teacher is D + 0.5 in the first run, D - 0.5 in the second: D when averaged within a picture."""
    base = np.arange(40) / 10
    for n, shift in enumerate((0.5, -0.5)):
        scored(tmp_path / f"a{n}", psnr_y=20 + base + n, niqe=9 - base + n)
        scored(tmp_path / f"b{n}", psnr_y=20 + base + n + D + shift, niqe=8 - base + n)
    (means, differences), _ = run("compare", "teacher=a0,a1", "rc=b0,b1", "--metrics", "psnr_y,niqe")
    assert means[0] == ["", "runs", "psnr_y, higher is better", "niqe, lower is better"]
    assert means[2] == ["teacher", "2", "22.4500 ± 0.7071", "7.5500 ± 0.7071"]  # of 0 and 1: 1 / sqrt(2)
    psnr, niqe = differences[2:]
    assert psnr == ["rc - teacher", "psnr_y, higher is better", "+0.2174 *", "[+0.0034, +0.4365]",
                    "1 of 2 above", "40"]
    assert niqe[2:] == ["-1.0000 *", "[-1.0000, -1.0000]", "2 of 2 below", "40"]


def test_runs_are_paired_in_order_and_over_common_pictures(run, tmp_path, capsys):
    """Seeds differ by 10, the names by 1 of 0, 1, ... pictures; nan leaves a picture out of its metric."""
    scored(tmp_path / "a1", psnr_y=[1, 2, 3, 4], niqe=[1, 1, 1, 1])
    scored(tmp_path / "a2", psnr_y=[11, 12, 13], niqe=[1, 1, 1])
    scored(tmp_path / "b1", psnr_y=[2, 3, 4], niqe=[1, "", 2])
    scored(tmp_path / "b2", psnr_y=[12, 13, 14], niqe=[1, 1, 0])
    (means, differences), _ = run("compare", "a=a1,a2", "b=b1,b2", "--metrics", "psnr_y,niqe")
    assert [row[2] for row in means[2:]] == [f"{mean:.4f} ± 7.0711" for mean in (7, 8)]
    assert differences[2][2:] == ["+1.0000 *", "[+1.0000, +1.0000]", "2 of 2 above", "3"]
    assert differences[3][2] == "+0.0000" and differences[3][4:] == ["1 of 2 above", "2"]
    (_, single), _ = run("compare", "a=a1", "b=a1", "c=b1", "--metrics", "psnr_y")
    assert [row[0] for row in single[2:]] == ["b - a", "c - a"] and single[2][4] == "1 of 1 equal"


# ---------------------------------------------------------------- sweep
def test_a_sweep_is_evaluate_at_each_scale(run, call, pairs, request, monkeypatch):  # noqa: F811
    options = ["--model", "tiny-ms", "--steps", 2, "--limit", 2]
    means = [call(*options, "--cfg_scale", s, "--out", f"{s}")["means"]["tiny-ms"] for s in (-0.5, 1)]
    words = ["sweep", *options, *f"--protocol pairs --data {pairs} --device cpu --metrics psnr_y,coherence "
             f"--weights {request.getfixturevalue('weights')} --scales=1,-0.5 -o o/s".split()]
    (table,), printed = run(*words)
    with open("o/s/sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert ["-0.5", "1"] == [row["cfg_scale"] for row in rows] == [row[0] for row in table[2:]]
    assert means[0]["psnr_y"] != means[1]["psnr_y"]
    for row, direct in zip(rows, means, strict=True):
        scores = ev.read_scores(f"o/s/s_{row['cfg_scale']}/per_image.csv").values()
        for name in ("psnr_y", "coherence"):
            found = [float(row[name + end]) for end in ("", "_low", "_high")]
            assert found == pytest.approx(ev.bootstrap([x[name] for x in scores]), abs=1e-6)
            assert found[0] == pytest.approx(direct[name], abs=2e-6)
    assert "{:.4f} [{:.4f}, {:.4f}]".format(*found) == table[3][2]
    assert "tiny-ms, 2 steps, set, 2 pictures" in printed and "wrote o/s/sweep.csv and o/s/sweep.p" in printed
    image = np.asarray(Image.open("o/s/sweep.png").convert("RGB")).astype(int)
    near = np.abs(image - BLUE).max(-1) < 12
    assert image.shape[1] == 1800 and near[:, :900].sum() > 1000 < near[:, 900:].sum()
    monkeypatch.setattr(ev, "restore", None)                                    # all is taken from the disk
    assert run(*words)[0] == [table]


def test_the_line_goes_through_the_numbers_and_the_band_reaches_from_low_to_high():
    """A rising and a falling line by two units, the band half a unit up and down."""
    up = np.array([[1.0, 0.5, 1.5], [3.0, 2.5, 3.5]])
    image = np.asarray(tables.draw("", [0.0, 1.0], {"psnr_y": up, "niqe": up[::-1]})).astype(int)
    shade = [255 - (255 - c) * 0x38 / 255 for c in BLUE]
    for half, sign in ((image[:, :900], 1), (image[:, 900:], -1)):
        line, band = (np.abs(half - colour).max(-1) < 6 for colour in (BLUE, shade))
        rows, columns = np.nonzero(line)
        middle = (columns.min() + columns.max()) // 2
        centre, edges = np.nonzero(line[:, middle])[0].mean(), np.nonzero(band[:, middle])[0]
        assert sign * (rows[columns.argmin()] - rows[columns.argmax()]) > 100
        assert abs(centre - (rows.min() + rows.max()) / 2) < 2 > abs(centre - (edges[0] + edges[-1]) / 2)
        assert abs(np.ptp(edges) - (np.ptp(rows) - 18) / 2) < 5                 # 18: of the markers


@pytest.mark.parametrize("low, high, texts", [
    (22.1, 24.4, "22.5 23.0 23.5 24.0"), (0.6599, 0.7201, "0.66 0.67 0.68 0.69 0.70 0.71 0.72"),
    (-0.11, 0.31, "-0.1 0.0 0.1 0.2 0.3"), (-12, 430, "0 100 200 300 400")])
def test_ticks_are_round(low, high, texts):
    found = tables.ticks(low, high)
    assert " ".join(found.values()) == texts
    assert [*found] == pytest.approx([*map(float, texts.split())], abs=1e-12)


def test_niqe_of_ground_truth_stands_beside_table_4(run, pairs):  # noqa: F811
    scores = [ev.niqe(ev.read_pixels(pairs / "HR" / f"{name}.png"), ev.read_natural()) for name in "abc"]
    (table,), printed = run("gt", pairs / "HR", "--row", "ScreenSR")
    mean = np.mean(scores)
    assert f"niqe {mean:.4f}, mean of 3 pictures" in printed and table[3][1] == "not measured"
    assert table[2] == ["niqe, lower is better", f"{mean:.4f}", "3.7719", f"{mean - 3.7719:+.4f}"]
    assert run("gt", pairs / "HR", "--limit", 1) == (
        [], f"{pairs / 'HR'}: niqe {scores[0]:.4f}, mean of 1 pictures\n\n")


@pytest.mark.parametrize("words, part", [
    ("", "say paper, compare, sweep, gt first"), ("papers", "say paper"), ("paper b1", "no summary.json"),
    ("paper tiny", "no row 'VOSR-tiny-os'; --row takes: StableSR"), ("paper tiny --row x", "no row 'x'"),
    ("paper tiny --set x", "no set 'x'; --set takes: lsdir, screensr, realsr"),
    ("paper pairs", "no set 'pairs'"), ("compare", "two or more names"), ("compare a=b1", "two or more"),
    ("compare b1 b2", "two or more"), ("compare a=b1 a=b2", "each once"), ("compare a=b1,b2 c=b1", "as many"),
    ("compare a=b1 c=tiny", "tiny is not a result of evaluate.py"), ("compare a=b1 c=b3", "no picture is in"),
    ("compare a=b1 c=b2", "no picture has psnr_y"), ("compare a=b1 c=b1 --metrics x", "wants 1 to 12"),
    ("sweep --metrics psnr_y", "wants 2 to 5"), ("sweep --scales 1", "two or more numbers"),
    ("sweep --scales a,b", "like -0.5,0,0.5"), ("sweep --cfg_scale 1", "--scales)"), ("sweep x", "options"),
    ("sweep", "--data is needed"), ("sweep STUDENT", "one-step and has no guidance; try --steps 10"),
    ("gt", "wants folders"), ("gt nowhere", "nowhere"), ("gt SET", "SET/HR"), ("gt SET/LR", "96x192"),
    ("gt SET/HR --row x", "no row 'x'; --row takes: ScreenSR"), ("gt SET/HR --limit -1", "--limit starts")])
def test_a_wrong_call_is_one_line(run, pairs, tmp_path, capsys, request, words, part):  # noqa: F811
    summary(tmp_path / "tiny", "tiny", psnr_y=20.0)
    summary(tmp_path / "pairs", "0.5B", protocol="pairs", psnr_y=20.0)
    for name, scores in (("b1", [1, 2]), ("b2", ["", ""]), ("b3", [])):
        scored(tmp_path / name, psnr_y=scores)
    (tmp_path / "b3" / "per_image.csv").write_text("stem,model,psnr_y\nother,tiny,1\n")
    student = f"--data SET --protocol pairs --device cpu --weights {request.getfixturevalue('weights')}"
    with pytest.raises(SystemExit) as stop:
        run(*words.replace("STUDENT", student).replace("SET", str(pairs)).split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error:") and error.count("\n") == 1
    assert part.replace("SET", str(pairs)) in error
    assert not (tmp_path / "out").exists()                                      # ended before work started

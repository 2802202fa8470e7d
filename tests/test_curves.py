"""tools/curves.py on logs whose means, bands and places in the picture are known beforehand."""
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from model import settings
from tools import curves
from tools.curves import COLOURS, common, grouped, launch, log_ticks, main, points, read, smooth
from train import PRESETS, Config

STEPS = range(20, 1001, 20)


def make(folder, loss=1.0, steps=STEPS, val=None, quarters=None, **args):
    """A run folder as train.py leaves it. loss: a number, or a function of the step; val: {step: loss}."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    cfg = Config(**PRESETS["tiny"], max_train_steps=1000, out=str(folder), **args)
    Path(folder, "args.json").write_text(json.dumps(settings(cfg)))
    loss = loss if callable(loss) else lambda step, loss=loss: loss
    rows = [dict(step=step, loss=loss(step), images_per_s=10.0 + (step % 60)) for step in steps]
    rows = [row | {f"loss_t{n}": x for n, x in enumerate(quarters or ())} for row in rows]
    rows = [row | ({"val": val[row["step"]]} if val and row["step"] in val else {}) for row in rows]
    Path(folder, "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def draw(tmp_path, monkeypatch, capsys):
    """Run the tool as a command in an empty folder -> the picture, what was printed, and the warnings."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["curves.py", *map(str, words)])
        launch(main)
        image = np.asarray(Image.open("curves.png").convert("RGB")).astype(int)
        return image, *capsys.readouterr()

    return run


def cells(printed, group):
    (row,) = [line for line in printed.splitlines() if line.startswith(f"| {group} |")]
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


def where(image, colour, box):
    """Rows and columns of the pixels of a colour inside (left, top, right, bottom)."""
    left, top, right, bottom = box
    near = np.abs(image[top:bottom, left:right] - ImageColor.getrgb(colour)).max(-1) < 12
    return [part + start for part, start in zip(np.nonzero(near), (top, left), strict=True)]


def panels(image):
    """(left, top, right, bottom) inside the frame of every panel."""
    frame = np.abs(image - 0x88).max(-1) < 3
    rows = np.nonzero(frame.mean(1) > 0.5)[0]
    columns = np.nonzero(frame[rows.min():rows.max()].mean(0) > 0.9)[0]
    edges = [x for x in columns if x - 1 not in columns]
    sides = zip(edges[::2], edges[1::2], strict=True)
    return [(left + 3, rows.min() + 3, right - 1, rows.max() - 3) for left, right in sides]


def test_folders_that_differ_in_a_trailing_number_are_one_group():
    folders = [Path(x) for x in ("o/full-1", "o/0.5B", "o/full-2", "o/0.5B-512", "o/full-x-1", "o/full-10")]
    assert grouped(folders) == {"full": [folders[0], folders[2], folders[5]], "0.5B": [folders[1]],
                                "0.5B-512": [folders[3]], "full-x-1": [folders[4]]}
    folders = [Path(x) for x in ("a/m-1", "a/m-2", "b/m-1", "b/m-2", "b/m")]
    assert grouped(folders) == {"a/m-*": folders[:2], "b/m-*": folders[2:4], "b/m": folders[4:]}


def test_curves_of_a_group_meet_where_all_have_a_point():
    x, y = common([{20: 1.0, 40: 2.0, 60: 3.0}, {20: 5.0, 30: 0.0, 60: 4.0, 80: 0.0}])
    assert x.tolist() == [20, 60] and y.tolist() == [[1, 3], [5, 4]]


def test_smoothing_keeps_a_straight_line_but_at_its_end_and_averages_noise_away():
    line = [{"step": step, "train": 3 - step / 1000} for step in STEPS]
    smoothed = smooth(line, 200)
    for step, value in points(line, "train").items():
        assert step > 900 or abs(smoothed[step] - value) < 0.011        # a step of the log at most
    noisy = smooth([{"step": step, "train": 1 + 0.5 * (-1) ** (step // 20)} for step in STEPS], 200)
    assert all(abs(noisy[step] - 1) < 0.08 for step in STEPS if step > 100)
    assert smooth([{"step": 7, "train": 2.0}], 50) == {7: 2.0}


def test_a_row_counts_as_the_steps_that_it_stands_for():
    rows = [dict(step=step, train=loss) for step, loss in ((20, 1.0), (40, 1.0), (41, 9.0), (60, 1.0))]
    assert math.isclose(smooth(rows, 1000)[60], (20 + 20 + 9 + 19) / 60)


def test_training_loss_is_the_mean_over_t_where_that_was_logged(tmp_path):
    make(tmp_path / "a", loss=9.0, quarters=(1.0, 2.0, 3.0, 6.0))
    make(tmp_path / "b", loss=9.0)
    assert set(points(read(tmp_path / "a")[1], "train").values()) == {3.0}
    assert set(points(read(tmp_path / "b")[1], "train").values()) == {9.0}


@pytest.mark.parametrize("low, high, want", [
    (0.79, 1.06, [0.8, 0.85, 0.9, 0.95, 1, 1.05]), (0.67, 1.23, [0.7, 0.8, 0.9, 1, 1.1, 1.2]),
    (0.09, 1.5, [0.1, 0.2, 0.3, 0.5, 0.7, 1]), (0.8, 0.804, [0.8, 0.801, 0.802, 0.803, 0.804]),
    (1e-4, 2, [1e-4, 1e-3, 1e-2, 0.1, 1])])
def test_ticks_of_the_loss_are_round_and_apart(low, high, want):
    ticks = log_ticks(low, high, 0.096 * math.log(high / low))
    assert np.allclose(ticks, want, rtol=1e-9), ticks


def test_lines_band_and_points_stand_where_the_numbers_are(draw):
    """Two runs with known losses, 1.6 and 0.4, are the ruler for a group with the losses 1.0 and 0.5."""
    make("high", 1.6, val={500: 1.6, 1000: 1.6}, alpha=(0.0, 0.0))
    make("low", 0.4, val={500: 0.4, 1000: 0.4})
    make("pair-1", 1.0, val={500: 1.0, 1000: 1.0}, seed=1)
    make("pair-2", 0.5, val={500: 0.5, 1000: 0.5}, seed=2)
    image, _, warned = draw("high", "low", "pair-1", "pair-2")
    assert image.shape[1] == 1800 and not warned
    first, second = panels(image)                     # without loss_t there is no third
    for left, top, right, bottom in (first, second):
        middle = left + (right - left) // 3            # no marker and no thin line stands there
        if (left, top, right, bottom) == second:
            middle = left + int((right - left) * 0.75 / 1.03)
        column = (middle, top, middle + 1, bottom)
        at = {loss: where(image, COLOURS[n], column)[0].mean() for n, loss in enumerate((1.6, 0.4, 0.75))}
        def expected(loss, at=at):
            return at[1.6] + (at[0.4] - at[1.6]) * math.log(1.6 / loss) / math.log(4)
        assert abs(at[0.75] - expected(0.75)) < 1.5    # the mean of 1.0 and 0.5
        shade = [255 - (255 - c) * 0x38 / 255 for c in ImageColor.getrgb(COLOURS[2])]
        band = np.nonzero(np.abs(image[top:bottom, middle] - shade).max(-1) < 4)[0] + top
        assert abs(band.min() - expected(1.0)) < 3 and abs(band.max() - expected(0.5)) < 3
    left, top, right, bottom = second
    rows, columns = where(image, COLOURS[1], second)
    lowest = columns[rows >= rows.max() - 1]           # of the square markers
    for step in (500, 1000):
        place = left + (right - left) * step / 1030
        near = lowest[abs(lowest - place) < 60]
        assert len(near) and abs(near.mean() - place) < 3


def test_a_run_that_is_ahead_goes_on_as_a_thin_line(draw):
    make("a-1", 1.0, val={500: 1.0, 1000: 1.0})
    make("a-2", 1.0, steps=range(20, 501, 20), seed=1, val={500: 1.1})
    make("b", 2.0)
    image, printed, _ = draw("a-1", "a-2", "b")
    left, top, right, bottom = panels(image)[0]
    def thick(step):
        x = left + int((right - left) * step / 1030)
        return (image[top:bottom, x, 2] - image[top:bottom, x, 0] > 60).sum()
    assert 3 <= thick(300) <= 5 and 1 <= thick(800) <= 2
    assert cells(printed, "a")[:2] == ["2", "500 to 1000 of 1000"]
    assert cells(printed, "a")[3] == "1.0500 ± 0.0707 (step 500)"


def test_the_table_has_means_and_deviations_over_seeds(draw):
    for seed, loss in enumerate((0.7, 0.8, 1.2)):
        make(f"out/a-{seed}", lambda step, loss=loss: 5.0 if step <= 900 else loss, seed=seed,
             val={500: 3.0, 1000: loss + 0.1})
    make("out/b", lambda step: step / 1000)
    _, printed, warned = draw("out/a-0", "out/a-1", "out/a-2", "out/b")
    deviation = np.std([0.7, 0.8, 1.2], ddof=1)
    train, val = f"0.9000 ± {deviation:.4f}", f"1.0000 ± {deviation:.4f}"
    assert cells(printed, "a") == ["3", "1000 of 1000", train, val, "30.0"]
    assert cells(printed, "b") == ["1", "1000 of 1000", "0.9600", "", "30.0"]    # 920, 940, ... 1000
    assert printed.endswith("wrote curves.png\n") and not warned


def test_the_legend_says_what_groups_share_and_how_they_differ():
    def runs(count, **args):
        stored = [settings(Config(**PRESETS["tiny"], seed=seed, **args)) for seed in range(count)]
        return [(json.loads(json.dumps(part)), []) for part in stored]

    shared, own = curves.describe({"partial": runs(3), "uncond": runs(3, alpha=(0.0, 0.0))})
    assert shared == "3 seeds, 4.31 M parameters"     # as train.py prints it
    assert own == ["partial   alpha 0.05, 0.25", "uncond   alpha 0.0, 0.0"]
    shared, own = curves.describe({"a": runs(1), "b": runs(2, max_train_steps=50)})
    assert shared == "4.31 M parameters" and own == [
        "a   1 seed, max_train_steps 600", "b   2 seeds, max_train_steps 50"]


def test_quarters_of_t_have_a_panel(draw):
    make("a", quarters=(1.5, 1.2, 1.0, 0.8))
    image, *_ = draw("a")
    left, top, right, bottom = panels(image)[1]
    rows, columns = where(image, COLOURS[0], (left, top, right, bottom))
    ends = [rows[abs(columns - (left + (right - left) * t)) < 4].mean() for t in (0.125, 0.375, 0.625, 0.875)]
    steps = np.diff(ends) / np.diff(np.log([1.5, 1.2, 1.0, 0.8]))
    assert steps.std() < 0.02 * abs(steps.mean()) and steps.mean() < 0


def test_wrong_folders_end_in_one_line_that_names_them(draw, capsys):
    make("good")
    Path("empty").mkdir()
    make("no_args")
    Path("no_args/args.json").unlink()
    make("broken")
    with open("broken/log.jsonl", "a") as file:
        file.write('{"step": 1020}\n{"step": 1040, "loss": 1.0}\n')
    for n in range(8):
        make(f"many{n}")
    Path("nothing").mkdir()
    make("started", steps=())
    for words, part in [
            ((), "usage"), (("good", "--window", -1), "usage"), (("good", "empty"), "empty has no log.jsonl"),
            (("missing",), "missing has no log.jsonl"), (("no_args",), "no_args/args.json"),
            (("broken",), 'broken/log.jsonl: line 51 is no log line: {"step": 1020}'),
            ([f"many{n}" for n in range(8)], "8 groups"), (("started",), "0 groups")]:
        with pytest.raises(SystemExit) as end:
            draw(*words)
        out, err = capsys.readouterr()
        assert end.value.code == 2 and not out and part in err and not Path("curves.png").exists(), err
        assert err.splitlines()[-1].startswith("error: ") and err.count("\n") == 1 + ("started" in words), err
    _, printed, warned = draw("good", "started")
    assert warned == "warning: started has no loss in its log yet; left out\n" and "| good |" in printed


def test_a_half_written_line_is_dropped_and_values_that_are_no_number_are_named(draw):
    make("a", lambda step: math.nan if step in (40, 60) else 1.0, val={500: math.inf, 1000: 2.0})
    with open("a/log.jsonl", "a") as file:
        file.write('{"step": 1020, "lo')
    _, printed, warned = draw("a", "--window", 100)
    assert warned == ("warning: a/log.jsonl: loss is no positive number at step 40, 60\n"
                      "warning: a/log.jsonl: val is no positive number at step 500\n")
    assert cells(printed, "a")[1:4] == ["1000 of 1000", "1.0000", "2.0000"]


def test_runs_of_a_group_that_differ_in_more_than_the_seed_are_named(draw):
    make("a-1", learning_rate=1e-3)
    make("a-2", learning_rate=1e-4)
    assert draw("a-1", "a-2")[2] == "warning: the runs of a differ in learning_rate\n"

"""Photographs of a screen, rendered with known geometry, and what tools/screensr.py makes of them."""
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from config import launch
from data import dead_leaves, keyed_generator, to_pillow
from sample import low_band, wavelet
from tools import screensr

View = namedtuple("View", "source shape turn lens gain blur noise")  # shape (H, W), turn in degrees
VIEWS = {
    "upright": View("face", (600, 800), 0, 0.0, (0.9, 0.85, 0.7), 0.7, 2),
    "turned by 90": View("leaves", (800, 600), 90, 0.0, (0.9, 0.9, 0.6), 0.7, 2),
    "upside down": View("face", (600, 800), 180, 0.004, (0.7, 0.8, 0.9), 0.8, 3),
    "exif": View("leaves", (800, 600), 12, 0.0, (0.8, 0.9, 0.8), 0.8, 2),
    "lens": View("face", (700, 800), -20, -0.01, (0.9, 0.8, 0.8), 0.7, 2),
    "too bright": View("face", (600, 800), 5, 0.0, (1.2, 1.1, 1.0), 1.0, 2),
    "dark, soft and noisy": View("leaves", (800, 800), 45, -0.005, (0.35, 0.35, 0.3), 1.5, 5),
}


# ---------------------------------------------------------------- the camera
def homography(start, end):
    """3 x 3 matrix that takes four points (4, 2) to four others."""
    rows = [row for (x, y), (u, v) in zip(start, end, strict=True)
            for row in ([x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y])]
    return np.append(np.linalg.solve(np.array(rows, float), np.ravel(end)), 1).reshape(3, 3)


def aim(page, view, key):
    """Function that takes places x, y in the photo to places on a page of this size (width, height)."""
    (h, w), turn = view.shape, np.deg2rad(view.turn)
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * page
    turned = (corners - np.array(page) / 2) @ [[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]
    room = 0.82 * min(w / np.ptp(turned[:, 0]), h / np.ptp(turned[:, 1]))
    jitter = 0.12 * min(h, w) * (torch.rand(4, 2, generator=keyed_generator("cpu", "aim", key)).numpy() - 0.5)
    matrix, r = homography(room * turned + jitter, corners), np.hypot(h, w) / 2

    def back(x, y):
        x, y = x - w / 2, y - h / 2  # from the middle of the photo, where the lens changes nothing
        u, v = x, y
        for _ in range(5 if view.lens else 0):  # x = u (1 + lens (u^2 + v^2) / r^2)
            bend = 1 + view.lens / r**2 * (u * u + v * v)
            u, v = x / bend, y / bend
        a, b, c = (row[0] * u + row[1] * v + row[2] for row in matrix)
        return a / c, b / c
    return back


def photograph(page, view, key):
    """A page (3, h, w) on a screen with striped pixels -> photo, with moire, and with light beyond edges."""
    (H, W), sharp, size = view.shape, 4, page.shape[:0:-1]  # sharp: samples per pixel of the screen
    screen = page.repeat_interleave(sharp, 1).repeat_interleave(sharp, 2) ** 2.2
    x, y = ((torch.arange(n * sharp) + 0.5) / sharp * 2 * torch.pi for n in size)
    stripes = torch.stack([torch.cos(x - 2 * torch.pi * c / 3) for c in range(3)])
    screen = screen * (1 + 0.25 * stripes[:, None] + 0.25 * torch.cos(y)[:, None])
    y, x = (torch.arange(2 * n, dtype=torch.float64) / 2 + 0.25 for n in (H, W))
    at = [2 * a / n - 1 for a, n in zip(aim(size, view, key)(x[None], y[:, None]), size, strict=True)]
    light = F.grid_sample(screen[None], torch.stack(at, -1).float()[None], align_corners=False)
    light = low_band(F.avg_pool2d(light, 2)[0] + 0.01, view.blur, reach=6)
    photo = (light * torch.tensor(view.gain)[:, None, None]).clamp(0, 1) ** (1 / 2.2)
    noise = torch.randn(photo.shape, generator=keyed_generator("cpu", "noise", key))
    return to_pillow(photo + noise * view.noise / 255)


opencv = pytest.fixture(lambda: pytest.importorskip("cv2"), scope="module")


@pytest.fixture(scope="module")
def photos(opencv, tmp_path_factory):
    """Folder with two sources, one of odd sides, their pages, and a photo NAME.jpg of every view."""
    path = tmp_path_factory.mktemp("screen")
    with Image.open(Path(__file__).parent.parent / "assets" / "original.png") as face:
        face.convert("RGB").crop((120, 0, 376, 256)).save(path / "face.png")
    to_pillow(dead_leaves(keyed_generator("cpu", 3), 301)[:, :211] / 255).save(path / "leaves.png")
    for name in ("face", "leaves"):
        screensr.make(path / f"{name}.png", path / f"{name}_screen.png", screensr.Config())
    for name, view in VIEWS.items():
        page = tensor(Image.open(path / f"{view.source}_screen.png"))
        picture, exif = photograph(page, view, name), Image.Exif()
        if name == "exif":
            picture, exif[0x0112] = picture.transpose(Image.Transpose.ROTATE_90), 6  # 6: to be turned back
        picture.save(path / f"{name}.jpg", quality=92, exif=exif)
    return path


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    """Run the tool in a folder of its own -> exit code, standard output, standard error."""
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["screensr.py", *map(str, words)])
        try:
            code = launch(screensr.main) or 0
        except SystemExit as end:  # a text is printed by the interpreter, which then exits with 1
            code = end.code if isinstance(end.code, int) else print(end.code, file=sys.stderr) or 1
        return code, *capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    return run


def random_picture(w, h, seed=0):
    return to_pillow(0.3 + 0.4 * torch.rand(3, h, w, generator=keyed_generator("cpu", "random", seed)))


def tensor(picture):
    return torch.tensor(np.array(picture)).permute(2, 0, 1) / 255


def written(name):
    return [tensor(Image.open(f"ScreenSR/{kind}/{name}.png")) for kind in ("HR", "LR")]


def test_the_picture_and_four_markers_stand_on_white(opencv, call):
    """100 x 60 px have cells of 8 px: markers of 48 px, 16 px from the edge, 8 px off the picture."""
    random_picture(100, 60).save("a.png")
    assert call("make", "a.png")[:2] == (0, "a.png  100x60 -> 244x204  a_screen.png\n")
    call("make", "a.png", "--canvas", "400x301", "-o", "large")
    page, large = (np.array(Image.open(Path(folder, "a_screen.png"))) for folder in (".", "large"))
    assert large.shape == (301, 400, 3) and np.array_equal(large[48:252, 78:322], page)
    assert np.array_equal(page[72:132, 72:172], np.array(random_picture(100, 60)))
    page[72:132, 72:172] = 255
    dictionary = opencv.aruco.getPredefinedDictionary(opencv.aruco.DICT_4X4_50)
    for n, (y, x) in enumerate(((16, 16), (16, 180), (140, 180), (140, 16))):
        marker = opencv.aruco.generateImageMarker(dictionary, n, 48)[..., None]
        assert not (page[y:y + 48, x:x + 48] - marker).any()
        page[y:y + 48, x:x + 48] = 255
    assert page.min() == 255


def test_a_page_that_was_not_photographed_gives_back_the_picture(opencv, call):
    """To the level, in any size and position: positions are not off by half a pixel."""
    for turns, size in enumerate([(64, 64), (33, 57), (101, 40), (1, 1), (40, 3)]):
        random_picture(*size).save("a.png")
        call("make", "a.png", "--canvas", "300x301")
        Image.open("a_screen.png").rotate(90 * turns, expand=True).save("photo.png")
        assert " from 1.0 px per px  corners off by 0.00" in call("align", "photo.png", "a.png")[1]
        hr, lr = written("a")
        assert torch.equal(hr, tensor(random_picture(*size))) and (hr - lr).abs().max() < 1.5 / 255


# ---------------------------------------------------------------- the photo
@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_found_within_a_tenth_of_a_pixel_and_makes_a_pair(photos, call, name):
    """Over a grid of points, in pixels of the picture, against their true places; none is 0.2 px off.

    The pair beats the best upright cut of the photo by 6 dB, by 2 with the low frequencies of the source. Its
    own are those of the source: means over 32 x 32 px to 3 levels, that of all to 1.
    """
    photo, source = photos / f"{name}.jpg", photos / f"{VIEWS[name].source}.png"
    (shot, _), size = screensr.read(photo, screensr.Config()), Image.open(source).size
    place, miss = screensr.fit(screensr.find_markers(np.array(shot)), size, shot.size)
    known = np.stack(np.meshgrid(*(np.linspace(0, side, 9) for side in size)), -1).reshape(-1, 2)
    page = np.array(Image.open(photos / f"{source.stem}_screen.png").size)
    found = np.stack(aim(page, VIEWS[name], name)(*place(known).T), 1) - (page - size) / 2
    error = np.linalg.norm(found - known, axis=1)
    assert error.mean() < 0.1 and error.max() < 0.2 and miss < 0.2
    code, out, err = call("align", photo, source)
    assert code == 0 and f" corners off by {miss:.3f} px  colours moved by " in out, err
    hr, lr = written(source.stem)
    assert torch.equal(hr, tensor(Image.open(source)))
    assert (hr - lr).mean((1, 2)).abs().max() < 1 / 255 > F.avg_pool2d(hr - lr, 32).abs().max() / 3
    shot = shot.rotate(VIEWS[name].turn, Image.Resampling.BICUBIC, expand=True)
    place, _ = screensr.fit(screensr.find_markers(np.array(shot)), size, shot.size)
    corners = place(known)
    cut = tensor(shot.resize(size, Image.Resampling.LANCZOS, (*corners.min(0), *corners.max(0))))
    ours, raw, fair = (-10 * (x - hr).square().mean().log10().item() for x in (lr, cut, wavelet(cut, hr)))
    assert ours > max(raw + 6, fair + 2), (ours, raw, fair)


def test_lens_and_spilled_light_are_told_apart(opencv):
    """Corners made by the model itself, with edges moved by 0.7 px, are explained exactly."""
    p = np.array([0.7, 0.1, -0.4, -0.1, 0.8, -0.3, 0.05, -0.04, -0.02, -0.7])
    known, centre = screensr.marker_corners(300, 200)[1].reshape(-1, 2), np.array([500, 400])
    seen = screensr.project(p, 300, centre, known, np.tile(screensr.OUTWARD, (4, 1)))
    place, miss = screensr.fit(seen.reshape(4, 4, 2), (300, 200), (1000, 800))
    assert miss < 1e-6 and np.allclose(place(known), screensr.project(p, 300, centre, known), atol=1e-4)


def test_no_pixel_of_the_photo_is_skipped(opencv, call):
    """Stripes that are finer than the pixels of the picture, 4 of the photo's, average out."""
    random_picture(64, 64).save("a.png")
    call("make", "a.png")
    page = np.array(Image.open("a_screen.png")).repeat(4, 0).repeat(4, 1)
    stripes = np.tile([40, -40, -40, 40, -40, 40, 40, -40], 32).astype(np.uint8)  # -40 is added as 216
    page[288:544, 288:544] += stripes[:, None]
    Image.fromarray(page).save("photo.png")
    assert " from 4.0 px per px" in call("align", "photo.png", "a.png")[1]
    assert torch.sub(*written("a")).abs().max() < 1.5 / 255


def test_the_command_reduces_the_central_square_to_size(opencv, call):
    random_picture(100, 61).save("a.png")
    call("make", "a.png")
    words = ["align", "a_screen.png", "a.png", "--size", "32"]
    done = subprocess.run([sys.executable, screensr.__file__, *words], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("\n") == 1 and not done.stderr, done.stderr
    hr, lr = written("a")
    square = random_picture(100, 61).crop((19, 0, 80, 61)).resize((32, 32), Image.Resampling.LANCZOS)
    assert torch.equal(hr, tensor(square)) and np.corrcoef(hr.ravel(), lr.ravel())[0, 1] > 0.9


def test_photos_that_do_not_show_the_page_are_refused_and_the_others_finished(opencv, call):
    for seed, (name, size) in enumerate(dict(a=(99, 64), b=(99, 64), c=(64, 99)).items()):
        random_picture(*size, seed).save(f"{name}.png")
        assert call("make", f"{name}.png")[0] == 0
    page = np.array(Image.open("a_screen.png"))
    Image.fromarray(np.hstack([page, page])).save("two.png")
    page[:72, -72:] = 255
    Image.fromarray(page).save("glare.png")
    cases = {"glare.png": "glare.png: 3 of 4 markers found (missing: top right); ", "two.png": "two top left",
             "b_screen.png": "no trace of a.png", "c_screen.png": "miss by", "none.png": "does not exist",
             "a.png": "0 of 4 markers found (missing: top left, top right,"}
    for photo, words in cases.items():
        code, out, err = call("align", photo, "a.png")
        assert (code, out, err[:7], err.count("\n")) == (2, "", "error: ", 1) and words in err, err
    assert not Path("ScreenSR").exists()
    code, out, err = call("align", "glare.png", "a.png", "b_screen.png", "b.png", "c_screen.png", "none.png")
    assert code == 1 and out.startswith("b_screen.png") and len(written("b")) == 2
    assert err.endswith("\nerror: 2 of 3 failed: glare.png, c_screen.png\n") and err.count("\n") == 3


@pytest.mark.parametrize("words, message", [
    ("", "usage: "), ("mak a.png", "usage: "), ("make", "usage: "), ("align a.png", "usage: "),
    ("make a.png --canvas 40", "--canvas wants WIDTHx"), ("make a.png -o b.png", "--out wants a folder"),
    ("make a.png --canvas 40x40", "a.png: its page takes 208x208 px"), ("make b.png", "b.png does not exist"),
    ("make a.png --size -1", "--size starts at 0"), ("make a.png a_screen.png", "which is an input"),
    ("make a.png x/a.png -o y", "x/a.png would be written to y/a_screen.png, as would a.png"),
    ("make a.png --max_pixels 9", "--max_pixels"), ("make a.png --canvs 9x9", "did you mean --canvas")])
def test_a_wrong_call_ends_with_one_line_and_code_2(call, words, message):
    random_picture(64, 64).save("a.png")
    code, out, err = call(*words.split())
    assert (code, out, err[:7], err.count("\n")) == (2, "", "error: ", 1) and message in err, err
    assert np.array_equal(np.array(Image.open("a.png")), np.array(random_picture(64, 64)))


def test_without_opencv_pages_are_made_and_align_names_the_package(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    random_picture(64, 64).save("a.png")
    assert call("make", "a.png")[0] == 0
    code, out, err = call("align", "a_screen.png", "a.png")
    assert (code, out, err.partition(": pip")[0]) == (2, "", "error: align needs OpenCV, 4.7 or newer")
    assert err.endswith(": pip install opencv-python-headless\n") and err.count("\n") == 1

"""tools/download.py against a server on the loopback interface: what is resumed, begun anew, refused."""
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

import sample
import tools.download as tool
from config import launch

TOOL = Path(__file__).parent.parent / "tools" / "download.py"
BODY = bytes(range(256)) * 1000  # several pieces
NAME = "VOSR2/checkpoints/ema_model.safetensors"


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        """BODY for every path, in ranges; server.steps, one per request, say how an answer differs."""
        server, start, wanted = self.server, 0, self.headers["Range"]
        server.seen.append((self.path, self.headers))
        step = server.steps.pop(0) if server.steps else {}
        if wanted and not step.get("deaf") and self.headers["If-Range"] == '"one"':
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        status = step.get("status") or (416 if start >= len(BODY) else 206 if start else 200)
        body, headers = BODY[start:] if status < 300 else b"", {"ETag": '"one"', "Content-Type": "binary/x"}
        if start:
            headers["Content-Range"] = f"bytes {start if body else '*'}-{len(BODY) - 1}/{len(BODY)}"
        self.send_response(status)
        for key, value in ({"Content-Length": len(body)} | headers | step.get("headers", {})).items():
            if value is not None:
                self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[:step.get("cut")])
        if "stall" in step:
            step["stall"].wait(10)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        server.steps, server.seen, server.url = [], [], f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


other_hub = hub


@pytest.fixture
def get(hub, tmp_path, monkeypatch, capsys):
    """Run the command in this process -> its exit code, what it printed, the target and its part."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(tool, "WAITS", (0, 0))
    monkeypatch.setattr(tool, "published_files", lambda model: (NAME,))

    def run(source=hub.url, words=("2.0",)):
        monkeypatch.setattr(sys, "argv", ["", "--weights", str(tmp_path), "--source", source, *words])
        try:
            code = launch(tool.main) or 0
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        assert err.count("\n") == (code != 0) and err.startswith("error: " * (code != 0)), err
        return SimpleNamespace(code=code, out=out, err=err, target=tmp_path / NAME,
                               part=tmp_path / f"{NAME}.part")
    return run


def ranges(hub):
    return [headers["Range"] for _, headers in hub.seen]


def begun(folder, content, etag='"one"'):
    """Leave a part as an interrupted call does."""
    part = folder / f"{NAME}.part"
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(content)
    part.with_name(f"{part.name}.etag").write_text(etag)


def test_a_file_arrives_whole_under_its_name_and_is_not_fetched_twice(hub, get):
    done = get()
    assert done.code == 0 and done.target.read_bytes() == BODY and f"{NAME}  256kB" in done.out
    assert list(done.target.parent.iterdir()) == [done.target]
    (path, headers), = hub.seen
    assert path == f"/{NAME}" and headers["Range"] is None and headers["Accept-Encoding"] == "identity"
    assert "there already" in get().out and len(hub.seen) == 1


def test_cut_connections_are_continued_from_the_last_byte_as_long_as_the_part_grows(hub, get):
    hub.steps = [{"cut": 100_001}, {"cut": 50_000}, {"cut": 2}, {"cut": 2}]
    assert get().target.read_bytes() == BODY
    assert ranges(hub) == [None, *(f"bytes={n}-" for n in (100_000, 149_999, 150_000, 150_001))]
    assert hub.seen[1][1]["If-Range"] == '"one"'


def test_patience_ends_when_nothing_more_arrives_and_the_part_is_kept(hub, get):
    hub.steps = [{"cut": 70_000}, {"status": 503}, {"status": 503}]
    done = get()
    assert done.code == 1 and "503" in done.err and f"{done.part} is kept" in done.err
    assert done.part.read_bytes() == BODY[:70_000] and not done.target.exists() and len(hub.seen) == 3
    assert get().target.read_bytes() == BODY and ranges(hub)[-1] == "bytes=69999-"


@pytest.mark.parametrize("etag, wanted", [('"one"', "bytes=69999-"), ('W/"one"', None), (None, None)])
def test_a_server_that_ignores_ranges_or_marks_no_version_sends_all_again(hub, get, etag, wanted):
    hub.steps = [{"cut": 70_000, "headers": {"ETag": etag}}, {"deaf": True}]
    assert get().target.read_bytes() == BODY and ranges(hub) == [None, wanted]


def test_bytes_of_two_versions_are_not_glued_together(hub, get, tmp_path):
    begun(tmp_path, b"x" * 70_000, '"old"')
    assert get().target.read_bytes() == BODY and hub.seen[0][1]["If-Range"] == '"old"'
    (tmp_path / NAME).unlink()
    begun(tmp_path, b"x" * 70_000)
    hub.steps = [{"headers": {"ETag": '"two"'}}]  # and sends the range nevertheless
    assert get().target.read_bytes() == BODY and ranges(hub)[1:] == ["bytes=69999-", None]


def test_a_part_as_long_as_the_file_or_longer_ends_well(hub, get, tmp_path):
    begun(tmp_path, BODY)
    get().target.unlink()
    begun(tmp_path, BODY + b"x")
    assert get().target.read_bytes() == BODY and ranges(hub) == ["bytes=255999-", "bytes=256000-", None]


def test_a_body_shorter_or_longer_than_announced_never_gets_the_name(hub, get, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "WAITS", ())
    hub.steps = [{"headers": {"Content-Length": len(BODY) + 4}},
                 {"headers": {"Content-Range": "bytes 255999-255999/20"}}]
    for announced in ("256,004", "20"):
        assert f"256,000 of {announced} bytes" in get().err and not (tmp_path / NAME).exists()
    assert get().target.read_bytes() == BODY and ranges(hub) == [None, "bytes=255999-", None]


def test_a_redirect_to_another_host_keeps_the_range(hub, other_hub, get, tmp_path):
    begun(tmp_path, BODY[:1000])
    other_hub.steps = [{"status": 302, "headers": {"Location": f"{hub.url}/blob?key=1"}}]
    assert get(other_hub.url).target.read_bytes() == BODY
    (path, headers), = hub.seen
    assert path == "/blob?key=1" and headers["Range"] == "bytes=999-" and headers["If-Range"] == '"one"'


@pytest.mark.parametrize("step, words", [
    ({"status": 404}, ("404", "model 2.0", tool.PAGE)),
    ({"status": 403}, ("403", "model 2.0", tool.PAGE)),
    ({"headers": {"Content-Type": "text/html; charset=utf-8"}}, ("web page",)),
    ({"headers": {"Content-Encoding": "gzip"}}, ("compressed",)),
    ({"headers": {"Content-Length": None}}, ("without a size",)),
    ({"status": 302, "headers": {"Location": "file:///etc/hostname"}}, ("302", "not allowed")),
])
def test_an_answer_that_is_not_the_file_ends_in_one_line(hub, get, step, words):
    hub.steps = [step]
    done = get()
    assert done.code == 2 and all(word in done.err for word in (*words, hub.url)), done.err
    assert len(hub.seen) == 1 and not list(done.target.parent.iterdir())


def test_https_does_not_lead_to_http():
    answer = SimpleNamespace(headers=Message(), url="http://other/file")
    with pytest.raises(ValueError, match="away from https"):
        tool.check(answer, "https://hub/file")


def test_nobody_listening_is_one_line_and_no_wrong_call(get):
    done = get("http://127.0.0.1:1")
    assert done.code == 1 and "refused" in done.err and not done.part.exists()


@pytest.mark.parametrize("words, reason", [
    (["2.0", "--source=file:///etc"], "--source"), (["2.0", "--source=http://hub:x"], "--source"),
    (["2.0", "--source=hub"], "--source"), ([], "name a model"), (["3.0"], "3.0"), (["--lits"], "--list"),
])
def test_a_wrong_call_ends_before_anything_is_asked_for(hub, get, monkeypatch, words, reason):
    monkeypatch.setattr(tool, "published_files", sample.published_files)
    done = get(words=words)
    assert done.code == 2 and reason in done.err and not hub.seen


def test_no_file_leaves_the_folder(hub, get, monkeypatch):
    for name in ("../out.pth", "/etc/out.pth", "a/../../out.pth"):
        monkeypatch.setattr(tool, "published_files", lambda model, name=name: (name,))
        assert "outside" in get().err and not hub.seen


def test_a_place_that_cannot_be_written_is_found_before_anything_is_asked_for(hub, get, tmp_path):
    (tmp_path / "VOSR2").write_text("a file where a folder belongs")
    assert "cannot be made" in get().err
    (tmp_path / "VOSR2").unlink()
    (tmp_path / NAME).mkdir(parents=True)
    assert "is a folder" in get().err
    if hasattr(os, "geteuid") and os.geteuid():  # root may write everywhere
        (tmp_path / NAME).parent.chmod(0o500)
        assert "not writable" in get().err
    assert not hub.seen


def test_a_full_disk_and_a_second_download_of_the_file_are_refused(get, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tool.shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
        done = get()
    assert done.code == 2 and "needs 256kB more, 100kB are free" in done.err
    if tool.fcntl:
        with open(done.part, "ab") as file:
            tool.claim(file)
            assert "another download" in get().err
    assert get().target.read_bytes() == BODY


def test_import_and_list_touch_neither_network_nor_disk(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "socket", None)
    runpy.run_path(str(TOOL), run_name="imported")
    monkeypatch.setattr(sys, "argv", ["", "--list", "2.0", "1.4B-os", "tiny"])
    tool.main()
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("tiny is") and f"{tool.HUB}/{NAME} -> {Path('weights', NAME)}" in lines
    assert len(lines) == len(set(lines)) == 7 and not list(tmp_path.iterdir())  # shared files once


def test_ctrl_c_leaves_a_part_that_the_next_call_continues(hub, get, tmp_path, monkeypatch):
    hub.steps = [{"cut": 150_000, "stall": (go := threading.Event())}]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a child inherits that it is ignored
    call = subprocess.Popen([sys.executable, TOOL, "2.0", "--source", hub.url, "--weights", tmp_path],
                            stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    while not (parts := [p for p in tmp_path.rglob("*.part") if p.stat().st_size]):
        assert call.poll() is None
        time.sleep(0.01)
    call.send_signal(signal.SIGINT)
    err, size = call.communicate(timeout=10)[1], parts[0].stat().st_size
    go.set()
    assert call.returncode == 130 and err.startswith("error: ") and err.count("\n") == 1
    monkeypatch.setattr(tool, "published_files", sample.published_files)
    assert get().code == 0 and ranges(hub) == [None, f"bytes={size - 1}-", None, None, None, None]
    assert all((tmp_path / name).read_bytes() == BODY for name in sample.published_files("2.0"))

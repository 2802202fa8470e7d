"""Fetch the authors' published files into weights/, in their layout. An interrupted download goes on.

    python tools/download.py 2.0                      # also 0.5B, 1.4B; 0.5B-ms, 0.5B-os, ... for one network
    python tools/download.py 0.5B 1.4B --weights /disk/weights
    python tools/download.py 2.0 --list               # only prints which file would go where

A file is written as NAME.part and gets its name when it has the announced size. NAME.part.etag keeps the
server's mark of the version: a part is continued with bytes of that version only, otherwise begun anew.
"""
import http.client
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen

from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: two downloads of one file at once are not noticed
    fcntl = None

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import cli, die, launch
from sample import HUB, published_files

PAGE = HUB.partition("/resolve/")[0]  # shows what is there
WAITS = (1, 3, 10, 30)  # seconds before another try; counted anew whenever a part has grown
TIMEOUT = 30            # seconds without a byte that count as a lost connection
CHUNK = 2**16           # bytes per write


@dataclass
class Config:
    weights: str = "weights"  # folder that gets the files
    source: str = HUB  # address before the paths of the files, such as a mirror's
    list: bool = False  # print addresses and targets, fetch nothing
    inputs: tuple = ()  # models: 0.5B, 1.4B, 2.0, or 0.5B-ms, 0.5B-os, ... for one network


def plan(cfg):
    """The call as {target: (address, model)}, a shared file once; wrong calls end here."""
    root = os.path.abspath(cfg.weights)
    if not re.fullmatch(r"https?://(\[\S+\]|[^\s/:]+)(:\d+)?(/\S*)?", cfg.source):
        die(f"--source wants an address that begins with http:// or https://, got {cfg.source!r}")
    if not cfg.inputs:
        die("name a model, as in python tools/download.py 2.0; --help lists the options")
    jobs = {}
    for model in cfg.inputs:
        names = [name for name in published_files(model) if not name.startswith("tiny/")]
        if not names:
            print(f"{model} is part of the repository, nothing to fetch")
        for name in names:
            if not Path(os.path.abspath(Path(root, name))).is_relative_to(root):
                die(f"{name} would lie outside of {cfg.weights}")
            jobs.setdefault(Path(cfg.weights, name), (f"{cfg.source.rstrip('/')}/{quote(name)}", model))
    return jobs


def prepare(targets):
    """Make the folders. What cannot be written is found before anything is asked for."""
    for path in targets:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as reason:
            die(f"{path.parent} cannot be made: {reason.strerror}; --weights names another folder")
        if not os.access(path.parent, os.W_OK):
            die(f"{path.parent} is not writable; --weights names another folder")
        if path.is_dir():
            die(f"{path} is a folder, but a file belongs there")


# ---------------------------------------------------------------- network: what may pass is a ConnectionError
def ask(url, start, etag, model):
    """Response to a request for url from byte `start` on, of version `etag`; redirects keep these headers."""
    headers = {"User-Agent": "vosr", "Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": etag}
    try:
        return urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as answer:
        if answer.code == 416:  # the file is shorter than the part
            return answer
        if answer.code in (408, 429) or answer.code >= 500:
            raise ConnectionError(f"the server answers {answer.code} {answer.reason}") from None
        what = {401: "wants a login", 403: "is not open", 404: "does not exist"}.get(answer.code, "fails")
        raise ValueError(f"{url}, part of model {model}, {what} ({answer.code} {answer.reason}); "
                         f"{PAGE} shows the files, --source names a mirror") from None
    except (OSError, http.client.HTTPException) as reason:  # no such host, no answer, no certificate
        raise ConnectionError(getattr(reason, "reason", reason)) from None


def extent(response, start, etag):
    """(first byte, size of the whole file or None) as announced; None if it does not continue the part."""
    if response.status == 200:
        return 0, response.length
    span = re.fullmatch(rf"bytes {start}-\d+/(\d+)", response.headers.get("Content-Range", ""))
    fits = response.status == 206 and span and response.headers["ETag"] == etag
    return (start, int(span[1])) if fits else None


def check(response, url):
    """Refuse what is not the file: a login page, compressed bytes, a body of which nobody knows the end."""
    if response.headers.get_content_type() == "text/html":
        raise ValueError(f"{url} brings a web page instead of the file: a login page or a proxy in between?")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise ValueError(f"{url} comes compressed, which was not asked for; --source names a mirror")
    if urlsplit(response.url).scheme not in ("https", urlsplit(url).scheme):
        raise ValueError(f"{url} leads away from https, to {response.url}")
    if not response.length and not response.chunked:
        raise ValueError(f"{url} comes without a size and cannot be checked; --source names a mirror")


def pieces(response):
    """The body. A failure of the disk, in the caller, keeps its own class."""
    try:
        while piece := response.read(CHUNK):
            yield piece
    except (OSError, http.client.HTTPException) as reason:
        raise ConnectionError(reason) from None


# ---------------------------------------------------------------- one file
def strong(etag):
    """The mark if it stands for exact bytes, else ''; weak ones begin with W/."""
    return etag if re.fullmatch(r'"[!#-~]+"', etag or "") else ""


def claim(file):
    """Keep a second download out of this part until it is closed."""
    try:
        fcntl and fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another download is writing {file.name}; wait until it is done") from None
    except OSError as reason:
        print(f"{file.name} cannot be locked ({reason.strerror}): run one download at a time")


def store(response, part, note, start, total):
    """Write the body into the part from byte `start` on -> bytes of the part."""
    with open(part, "ab") as file:
        claim(file)
        if start and os.fstat(file.fileno()).st_size != start + 1:
            raise ConnectionError(f"{part} changed meanwhile")
        file.truncate(start)
        if not start:  # a mark is written when no bytes of another version are left
            note.write_text(strong(response.headers["ETag"]))
        left, free = (total or 0) - start, shutil.disk_usage(part.parent).free
        if left > free:
            left, free = (tqdm.format_sizeof(size, "B") for size in (left, free))
            raise ValueError(f"{part} needs {left} more, {free} are free; --weights names another folder")
        with tqdm(total=total, initial=start, desc=part.stem, unit="B", unit_scale=True, disable=None,
                  leave=False) as bar:
            for piece in pieces(response):
                file.write(piece)
                bar.update(len(piece))
        file.flush()
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def attempt(url, path, model):
    """One request: begin or continue the part, and rename it when complete -> bytes of the file.

    The last byte of a part is asked for again, so a complete one needs no case of its own.
    """
    part, note = (path.with_name(path.name + ending) for ending in (".part", ".part.etag"))
    etag = strong(note.read_text(errors="replace")) if note.is_file() else ""
    start = max(part.stat().st_size - 1, 0) if etag and part.is_file() else 0
    with ask(url, start, etag, model) as response:
        span = extent(response, start, etag)
        if span is None:
            note.unlink(missing_ok=True)
            raise ConnectionError("the server's file does not continue the part, which is begun anew")
        check(response, url)
        size = store(response, part, note, *span)
    total = size if span[1] is None else span[1]
    if size > total:
        note.unlink()
    if size != total or not size:
        raise ConnectionError(f"the connection ended at {size:,} of {total:,} bytes")
    os.replace(part, path)
    note.unlink()
    return size


def fetch(url, path, model):
    """Bring url to path -> its bytes. Raises ConnectionError when no try of WAITS made the part longer."""
    part, longest, waits = path.with_name(path.name + ".part"), 0, iter(WAITS)
    while True:
        try:
            return attempt(url, path, model)
        except ConnectionError as reason:
            size = part.stat().st_size if part.is_file() else 0
            if size > longest:
                longest, waits = size, iter(WAITS)
            wait = next(waits, None)
            if wait is None:
                kept = f"{part} is kept, " if size else ""
                raise ConnectionError(f"{url}: {reason}; {kept}the same command goes on") from None
            print(f"{path}  {reason}; next try in {wait} s", flush=True)
            time.sleep(wait)


def main():
    cfg = cli(Config)
    jobs = plan(cfg)
    if cfg.list:
        for path, (url, _) in jobs.items():
            print(f"{url} -> {path}")
        return
    try:
        there = [path for path in jobs if path.is_file() and path.stat().st_size]
        prepare([path for path in jobs if path not in there])
        for path, (url, model) in jobs.items():
            state = "there already" if path in there else tqdm.format_sizeof(fetch(url, path, model), "B")
            print(f"{path}  {state}", flush=True)
    except ConnectionError as reason:
        print("error:", reason, file=sys.stderr)
        sys.exit(1)
    except OSError as reason:
        die(f"{reason.filename or cfg.weights} cannot be used: {reason.strerror}")


if __name__ == "__main__":
    launch(main)

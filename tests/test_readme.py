"""The README: its commands are understood, what it links to exists, its set-up is what CI does."""
import importlib
import re
import shlex
from pathlib import Path

import pytest

from config import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^    (.+)$", README, re.M)
CALLS = [part.strip() for line in BLOCKS for part in line.split("  #")[0].split("&&")
         if re.match(r"(python|torchrun .*?)\s+\S+\.py", part.strip())]


def test_there_are_commands_to_check():
    assert len(CALLS) > 10


@pytest.mark.parametrize("call", sorted(set(CALLS)))
def test_a_command_of_the_readme_is_understood(call):
    words = shlex.split(call)
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert (ROOT / words[script]).is_file()
    if words[script].startswith("tests/"):
        return
    module = importlib.import_module(words[script].removesuffix(".py").replace("/", "."))
    presets = getattr(module, "PRESETS", {})
    if words[script] == "distill.py":
        method = words[words.index("--method") + 1] if "--method" in words else "rc"
        presets = presets[method]
    cli(module.Config, presets, words[script + 1:])


def test_links_lead_to_files_and_to_names_that_are_in_them():
    for name, path in re.findall(r"\[`?([^`\]]+)`?\]\((?!http)([^)]+)\)", README):
        assert (ROOT / path).exists(), path
        if path.endswith(".py"):
            wanted = rf"^(    )?(def|class) {name.split('.')[-1]}\b"
            assert re.search(wanted, (ROOT / path).read_text(), re.M), name


def test_the_set_up_commands_are_those_of_ci():
    ci = (ROOT / ".ci" / "run").read_text()
    assert "pip install -r requirements.txt && python sample.py --steps 1 assets/input.png" in README
    assert "pip install -r requirements-dev.txt && python -m pytest -q" in README
    for words in ("-r requirements.txt", "-r requirements-dev.txt", "python -m pytest -q",
                  "python sample.py --steps 1 assets/input.png"):
        assert words in ci

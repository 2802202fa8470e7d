"""The house: who imports whom, how long a file may be, and that nothing random is global."""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ABOVE = {  # what each file may import of ours
    "config": set(),
    "model": {"config", "kernels"},
    "data": {"config"},
    "train": {"config", "model", "data"},
    "distill": {"config", "model", "data", "train"},
    "sample": {"config", "model", "data"},
    "evaluate": {"config", "model", "data", "sample"},
}
LINES = {"config": 90, "model": 850, "data": 750, "train": 450, "distill": 350, "sample": 600,
         "evaluate": 600}
SMALL = {path: 400 if path.stem in ("attention", "pack", "parity") else 250
         for folder in ("kernels", "tools", "tests") for path in (ROOT / folder).glob("*.py")}


def imported(path):
    """First words of the modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("name", ABOVE)
def test_a_file_imports_only_what_stands_above_it(name):
    ours = set(ABOVE) | {"kernels", "tools", "tests"}
    assert set(imported(ROOT / f"{name}.py")) & ours <= ABOVE[name]


def test_kernels_import_nothing_of_ours_but_kernels():
    for path in (ROOT / "kernels").glob("*.py"):
        assert not set(imported(path)) & set(ABOVE)


@pytest.mark.parametrize("path", [*(ROOT / f"{name}.py" for name in LINES), *SMALL], ids=lambda p: p.name)
def test_a_file_stays_within_its_budget(path):
    limit = LINES[path.stem] if path.parent == ROOT else SMALL[path]
    lines = len(path.read_text().splitlines())
    assert lines <= limit, f"{lines} lines, planned for {limit}"


@pytest.mark.parametrize("name", sorted(set(ABOVE) - {"model"}))  # initial weights follow torch.manual_seed
def test_random_numbers_come_from_a_generator_or_an_argument(name):
    source = (ROOT / f"{name}.py").read_text()
    assert not re.findall(r"np\.random\.(?!default_rng)\w+|(?<![\w.])random\.(?!Random)\w+\(", source)
    draws = r"torch\.(?:rand|randn|randint|randperm|poisson)\((?:[^()]|\([^()]*\))*\)"
    for call in re.findall(draws, source):
        assert "generator" in call, call


def test_every_equation_of_the_paper_is_named_where_it_is_computed():
    text = "".join((ROOT / f"{n}.py").read_text() for n in ABOVE)
    found = set()
    for first, last in re.findall(r"Eq\. (\d+)(?:-(\d+))?", text):
        found |= set(range(int(first), int(last or first) + 1))
    assert found >= set(range(1, 18)) - {3}     # Eq. 3 is the guidance of text-to-image models, for contrast


def test_importing_a_script_has_no_side_effects():
    for name in ABOVE:
        body = ast.parse((ROOT / f"{name}.py").read_text()).body
        assert not [n for n in body if isinstance(n, ast.Expr) and not isinstance(n.value, ast.Constant)]

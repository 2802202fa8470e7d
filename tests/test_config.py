"""The settings mechanism: order of precedence, and one clear line for every kind of mistake."""
import inspect
import re
from dataclasses import dataclass, fields

import pytest

import distill
import evaluate
import sample
import train
from config import cli
from tools import sheet


@dataclass
class Config:
    """Example."""

    preset: str = "small"  # row of the table
    dim: int = 1  # width
    rate: float = 0.5  # rate
    fast: bool = False  # switch
    alpha: tuple = (0.05, 0.25)  # range
    from_: str = ""  # a Python keyword
    inputs: tuple = ()  # files


PRESETS = {"small": {}, "large": {"dim": 7, "rate": 0.1}}
SCRIPTS = {train: [train.PRESETS], distill: distill.PRESETS.values(), sheet: [{}], sample: [{}],
           evaluate: [{}]}


def test_typed_options_beat_the_preset_which_beats_the_default():
    cfg = cli(Config, PRESETS, ["--preset", "large", "--rate=0.3"])
    assert (cfg.dim, cfg.rate, cfg.fast) == (7, 0.3, False)
    assert cli(Config, PRESETS, []).dim == 1


def test_values_take_the_type_of_their_default():
    typed = ["--fast", "--alpha", "0,1", "--from", "x", "--rate", "-2", "a.png", "--", "-b.png"]
    wanted = Config(fast=True, alpha=(0.0, 1.0), from_="x", rate=-2.0, inputs=("a.png", "-b.png"))
    assert cli(Config, PRESETS, typed) == wanted


@pytest.mark.parametrize("argv, words", [
    (["--dmi", "3"], "unknown option --dmi, did you mean --dim?"),
    (["--dim", "wide"], "--dim wants int like 1, got 'wide'"),
    (["--fast=maybe"], "--fast wants bool like False, got 'maybe'"),
    (["--alpha", "1"], "--alpha wants tuple"),
    (["--dim"], "--dim needs a value"),
    (["--preset", "huge"], "unknown preset 'huge', choose one of: small, large"),
])
def test_a_wrong_call_is_one_line_and_exit_code_2(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli(Config, PRESETS, argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(f"error: {words}") and error.count("\n") == 1


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda m: m.__name__)
def test_every_setting_has_a_comment_and_no_name_that_torchrun_takes(script):
    for f in fields(script.Config):
        assert f.name not in ("run", "log", "logs", "max", "master", "node", "no", "start", "local", "rdzv")
    for cls in script.Config.__mro__[:-1]:
        lines = re.findall(r"^    \w+: .*= .*$", inspect.getsource(cls), re.M)
        assert all("  # " in line for line in lines), [line for line in lines if "  # " not in line]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda m: m.__name__)
def test_every_preset_value_has_the_type_of_its_field(script):
    types = {f.name: type(f.default) for f in fields(script.Config)}
    for presets in SCRIPTS[script]:
        for row in presets.values():
            for name, value in row.items():
                assert type(value) is types[name], (name, value)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda m: m.__name__)
def test_help_lists_every_option(script, capsys):
    with pytest.raises(SystemExit) as stop:
        cli(script.Config, {}, ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for f in fields(script.Config):
        assert (f"--{f.name.rstrip('_')} " in text) == (f.name != "inputs")  # inputs have no name

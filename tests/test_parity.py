"""The official numbers: this repository agrees with them, and parity.py notices when something is off."""
import json
import shutil
from pathlib import Path

import parity
import pytest
import torch
from safetensors.torch import load_file, save_file

FIXTURES = Path(__file__).parent / "fixtures"
COMPLETE = Path(__file__).parents[2] / "shared" / "fixtures"  # all kinds, 15 MB, outside the repository
STUDENT = ("loss_weights_student", "loss_weights_teacher", "loss_rc_edges", "sampler_onestep_othersize")


def copy(folder, names):
    folder.mkdir(exist_ok=True)
    for name in names:
        for suffix in (".json", ".safetensors"):
            shutil.copy(FIXTURES / (name + suffix), folder)
    return folder


def alter(path, name, change):
    """Apply `change` in place to one tensor of a safetensors file."""
    tensors = load_file(path)
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, path)


def failed(folder):
    return {name for _, name, *_, ok in parity.check(folder, report=lambda line: None) if not ok}


def test_the_fixtures_of_the_repository_agree():
    rows = parity.check(FIXTURES)
    assert rows and all(row[-1] for row in rows)
    assert {"loss_multistep", "loss_shortcut", "loss_rc", "sampler_tiled"} <= {row[0] for row in rows}


@pytest.mark.slow
@pytest.mark.skipif(not COMPLETE.is_dir(), reason="the complete set does not lie beside this checkout")
def test_the_complete_set_agrees():
    rows = parity.check(COMPLETE)
    assert rows and all(row[-1] for row in rows)
    assert {row[0] for row in rows} == set(parity.KINDS)


def beyond(want, bound):
    """The tensor with one element that is wrong by little more than the bound."""
    wrong = want.clone().flatten()
    at = wrong.double().abs().argmin()
    if want.dtype == torch.uint8:
        wrong[at] = wrong[at].int() + 2 if wrong[at] < 254 else 0
    else:
        wrong[at] += wrong.new_tensor(2.2 * bound + 1e-9)
    return wrong.view(want.shape)


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.json")), ids=lambda path: path.stem)
def test_a_change_of_any_output_is_noticed(path):
    case = parity.read_case(path)
    if case.kind in parity.DATA_ONLY:
        pytest.skip("holds data only")
    got = parity.KINDS[case.kind](case)
    for name, want in case.outputs.items():
        value = got[name][0] if isinstance(got[name], list) else got[name]
        _, bound = parity.compare(case, name, value)
        wrong = case._replace(outputs=case.outputs | {name: beyond(want, bound)})
        assert parity.used(*parity.compare(wrong, name, value)) > 1, name


@pytest.mark.parametrize("weight", ["blocks.1.attn.k_norm.weight", "r_embedder.mlp.0.weight",
                                    "blocks.0.cross_attn.v_linear.bias", "layer_norm.bias"])
def test_a_change_of_a_weight_is_noticed(tmp_path, weight):
    folder = copy(tmp_path, STUDENT)
    alter(folder / "loss_weights_student.safetensors", f"weights/{weight}", lambda w: w * 1.02 + 0.01)
    assert failed(folder) == {"loss_rc_edges", "sampler_onestep_othersize"}


def test_folders_are_walked_and_weights_come_from_the_same_folder(tmp_path):
    good, bad = copy(tmp_path / "good", STUDENT), copy(tmp_path / "bad", STUDENT)
    alter(bad / "loss_weights_teacher.safetensors", "weights/t_block.1.bias", lambda w: w + 0.1)
    rows = parity.check(tmp_path, report=lambda line: None)
    assert len(rows) == 4 and failed(good) == set()
    assert failed(bad) == {"loss_rc_edges"}                     # the sampler case has no teacher


@pytest.mark.parametrize("change", [dict(kind="new"), dict(kind=None), dict(weights_from="absent"),
                                    dict(config={}), dict(tensor_atol={}, atol=0, rtol=0)])
def test_what_cannot_be_compared_counts_as_failed(tmp_path, change):
    folder = copy(tmp_path, STUDENT)
    path = folder / "loss_rc_edges.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert failed(folder) == {"loss_rc_edges"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_fail(tmp_path, value):
    folder = copy(tmp_path, STUDENT)
    alter(folder / "loss_rc_edges.safetensors", "out/corr", lambda x: x.fill_(value))
    assert failed(folder) == {"loss_rc_edges"}


def test_an_output_that_nothing_computes_fails(tmp_path):
    folder = copy(tmp_path, STUDENT)
    tensors = load_file(folder / "loss_rc_edges.safetensors")
    save_file(tensors | {"out/unheard": torch.zeros(1)}, folder / "loss_rc_edges.safetensors")
    assert failed(folder) == {"loss_rc_edges"}


def test_one_grey_level_may_differ_on_one_percent_of_a_picture():
    case = parity.read_case(FIXTURES / "color_adain_30x34.json")
    want, few = case.outputs["image"], case.outputs["image"].numel() // 100
    for step, count, ok in ((1, few, True), (1, few + 1, False), (2, 1, False)):
        other = want.clone().flatten()
        other[:count] = torch.where(other[:count] < 128, other[:count] + step, other[:count] - step)
        assert (parity.used(*parity.compare(case, "image", other.view(want.shape))) <= 1) == ok


def test_the_command_prints_a_row_per_case_and_says_how_many_failed(tmp_path, capsys):
    folder = copy(tmp_path, ["color_adain_30x34", "color_wavelet_30x34"])
    for change, code in ((lambda x: x, 0), (lambda x: 255 - x, 1)):
        alter(folder / "color_adain_30x34.safetensors", "out/image", change)
        with pytest.raises(SystemExit) as stop:
            parity.main([str(folder)])
        lines = capsys.readouterr().out.splitlines()
        assert stop.value.code == code and lines[-1] == f"2 cases, {code} failed" and len(lines) == 4


@pytest.mark.parametrize("argv", [[], ["nowhere"], ["EMPTY"]])
def test_a_wrong_call_ends_with_one_line_and_code_2(tmp_path, capsys, argv):
    with pytest.raises(SystemExit) as stop:
        parity.main([str(tmp_path) if word == "EMPTY" else word for word in argv])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: ")

"""The command line: help, arguments that reach the functions, errors as one line."""

import sys

import pytest
from typer.testing import CliRunner

import hf_vlp.conversion.xvlm
import hf_vlp.quickstart
from hf_vlp.cli import app, main
from hf_vlp.conversion.keys import KeyReport


def run_main(monkeypatch, *arguments: str):
    monkeypatch.setattr(sys, "argv", ["hf-vlp", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code


@pytest.fixture
def calls(monkeypatch):
    """What the commands hand on, instead of the work itself."""
    received = []
    for module, name in [(hf_vlp.quickstart, "run"), (hf_vlp.conversion.xvlm, "convert_checkpoint")]:
        monkeypatch.setattr(
            module, name, lambda *args, **kwargs: received.append((args, kwargs)) or KeyReport()
        )
    return received


def test_help_names_the_commands():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert all(name in result.output for name in ("quickstart", "predict", "train", "evaluate", "convert"))
    assert "xvlm" in CliRunner().invoke(app, ["convert", "--help"]).output


def test_quickstart_hands_its_arguments_on(calls, monkeypatch, tmp_path):
    arguments = ["quickstart", "--out", str(tmp_path), "--seed", "3", "--data", "nlvr", "some/folder"]
    assert run_main(monkeypatch, *arguments) == 0
    [(args, kwargs)] = calls
    assert [str(value) for value in args] == [str(tmp_path)]
    assert (kwargs["seed"], kwargs["data"], str(kwargs["path"])) == (3, "nlvr", "some/folder")


def test_convert_hands_its_arguments_on(calls, monkeypatch):
    arguments = ["convert", "xvlm", "in.th", "out", "--image-size", "384", "--num-attention-heads", "4"]
    assert run_main(monkeypatch, *arguments) == 0
    [(args, kwargs)] = calls
    assert [str(value) for value in args] == ["in.th", "out"]
    assert (kwargs["image_size"], kwargs["num_attention_heads"], kwargs["tokenizer"]) == (
        384,
        4,
        "bert-base-uncased",
    )


@pytest.mark.parametrize(
    "error", [ValueError("text is empty; give a word"), OSError("no such file:\n  in.th")]
)
def test_what_the_package_refuses_is_one_line(error, monkeypatch):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(hf_vlp.conversion.xvlm, "convert_checkpoint", refuse)
    assert run_main(monkeypatch, "convert", "xvlm", "in.th", "out") == "error: " + " ".join(
        str(error).split()
    )


def test_missing_checkpoint_ends_with_one_line_and_no_output(monkeypatch, tmp_path):
    code = run_main(monkeypatch, "convert", "xvlm", str(tmp_path / "none.th"), str(tmp_path / "out"))
    assert isinstance(code, str) and code.startswith("error: ") and "none.th" in code
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["--data", "nlvr"], "folder"), (["somewhere"], "nlvr"), (["--data", "nlvr", "nowhere"], "nowhere")],
)
def test_quickstart_refuses_what_does_not_fit(arguments, word, monkeypatch, tmp_path):
    code = run_main(monkeypatch, "quickstart", "--out", str(tmp_path / "out"), *arguments)
    assert isinstance(code, str) and word in code


def test_unknown_data_is_a_usage_error(monkeypatch):
    assert run_main(monkeypatch, "quickstart", "--data", "coco") == 2

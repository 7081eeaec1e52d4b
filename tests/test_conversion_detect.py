"""One command for every paper's files: what it recognises, writes, pushes and refuses."""

import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from butd_reference import tiny_butd
from parity_cases import read_official
from test_conversion_butd import caffe_layers, caffemodel, fork_state
from tiny import tiny_config, tiny_tokenizer
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
)
from typer.testing import CliRunner

import hf_vlp
import hf_vlp.folders
from hf_vlp.cli import app, main
from hf_vlp.conversion.detect import PAPERS, find_converter, refuse_other_papers

CLASSES = {
    "albef_grounding": hf_vlp.ALBEFForRetrieval,  # its keys are those of retrieval
    "albef_nlvr": hf_vlp.ALBEFForVisualReasoning,
    "albef_pretrain": hf_vlp.ALBEFForPreTraining,
    "albef_retrieval": hf_vlp.ALBEFForRetrieval,
    "albef_ve": hf_vlp.ALBEFForVisualEntailment,
    "albef_vqa": hf_vlp.ALBEFForQuestionAnswering,
    "lxmert_nlvr": hf_vlp.LXMERTForVisualReasoning,
    "lxmert_pretrain": hf_vlp.LXMERTForPreTraining,
    "lxmert_vqa": hf_vlp.LXMERTForQuestionAnswering,
    "soho_pretrain_add": hf_vlp.SOHOForPreTraining,
    "soho_pretrain_gate": hf_vlp.SOHOForPreTraining,
    "soho_vqa": hf_vlp.SOHOForQuestionAnswering,
    "xvlm_grounding": hf_vlp.XVLMForGrounding,
    "xvlm_nlvr": hf_vlp.XVLMForVisualReasoning,
    "xvlm_pretrain_image": hf_vlp.XVLMForPreTraining,
    "xvlm_retrieval": hf_vlp.XVLMForRetrieval,
    "xvlm_vqa": hf_vlp.XVLMForQuestionAnswering,
}


@pytest.fixture
def official(request):
    folder = Path(request.config.getoption("--parity-dir"))
    return lambda name: read_official(folder / name)


@pytest.mark.parametrize("name", CLASSES)
def test_a_file_says_what_it_is(name, official, tmp_path):
    state, heads = official(name)
    torch.save({"model": state}, tmp_path / "official.pth")
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    files = [str(tmp_path / "official.pth"), str(tmp_path / "out")]
    options = ["--num-attention-heads", str(heads), "--tokenizer", str(tmp_path / "tokenizer")]
    result = CliRunner().invoke(app, ["convert", *files, *options])
    assert result.exit_code == 0, result.exception
    assert "0 missing" in result.output and f"{CLASSES[name].__name__} written to" in result.output
    assert type(AutoModel.from_pretrained(tmp_path / "out")) is CLASSES[name]
    paper = find_converter(files[0])
    assert paper == name.partition("_")[0]
    for other, title in PAPERS.items():
        if other != paper:
            with pytest.raises(ValueError, match=PAPERS[paper]):
                refuse_other_papers(state, title)


@pytest.mark.parametrize("kind", ["caffemodel", "pth", "pkl"])
def test_files_of_the_detector(kind, tmp_path):
    detector = tiny_butd()
    file = tmp_path / f"net.{kind}"
    if kind == "caffemodel":
        file.write_bytes(caffemodel(caffe_layers(detector)))
    elif kind == "pkl":
        file.write_bytes(pickle.dumps({name: value.numpy() for name, value in fork_state(detector).items()}))
    else:
        torch.save(fork_state(detector), file)
    result = CliRunner().invoke(app, ["convert", str(file), str(tmp_path / "out")])
    assert result.exit_code == 0 and "BUTDDetector written to" in result.output


def _bert():
    sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return BertForMaskedLM(BertConfig(**sizes, intermediate_size=8)).state_dict()


UNKNOWN = {  # what is none of the papers' files, and what is said of it
    "bert": (_bert, "recognised as a BERT"),
    "swin": (lambda: {"layers.0.blocks.0.attn.qkv.bias": torch.zeros(3)}, "recognised as a Swin"),
    "deit": (lambda: {"blocks.0.attn.qkv.bias": torch.zeros(3)}, "recognised as a ViT"),
    "blip": (
        lambda: {
            "visual_encoder.cls_token": torch.zeros(1),
            "text_encoder.encoder.layer.0.crossattention.self.key.bias": torch.zeros(1),
        },
        "recognised as ALBEF and BLIP",
    ),
    "converted": (lambda: hf_vlp.XVLMForRetrieval(tiny_config()).state_dict(), "from_pretrained reads"),
    "resnet": (lambda: {"conv1.weight": torch.zeros(1)}, r"nothing known, its first keys are \['conv1"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_file_is_named_and_leaves_nothing(name, tmp_path, monkeypatch):
    state, said = UNKNOWN[name]
    torch.save(state(), tmp_path / "file.pth")
    with pytest.raises(ValueError, match=said):
        find_converter(tmp_path / "file.pth")
    monkeypatch.setattr(sys, "argv", ["hf-vlp", "convert", str(tmp_path / "file.pth"), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert str(stop.value.code).startswith("error: ") and "recognised as" in stop.value.code
    assert [path.name for path in tmp_path.iterdir()] == ["file.pth"]


def test_push(official, tmp_path, monkeypatch):
    """The folder goes to the Hub as it lies on disk."""
    calls = []

    class Api:
        def create_repo(self, name, exist_ok):
            assert exist_ok
            return SimpleNamespace(repo_id=name)

        def upload_folder(self, repo_id, folder_path):
            calls.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr(hf_vlp.folders, "HfApi", Api)
    state, heads = official("xvlm_retrieval")
    torch.save(state, tmp_path / "official.th")
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    options = ["--num-attention-heads", str(heads), "--tokenizer", str(tmp_path / "tokenizer")]
    files = [str(tmp_path / "official.th"), str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["convert", *files, *options, "--push", "org/name"])
    assert result.exit_code == 0 and "pushed to" in result.output
    ((name, pushed),) = calls
    assert name == "org/name" and pushed == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert {"config.json", "model.safetensors", "modeling_xvlm.py", "tokenizer.json"} <= set(pushed)

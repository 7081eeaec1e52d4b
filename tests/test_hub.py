"""Sharing over HTTP: every model goes to a Hub and comes back the same, and faults break nothing."""

import json

import pytest
from hub_server import run_client
from test_models import CASES

PUSH = """
import sys
import torch
from butd_reference import tiny_butd
from test_models import CASES, PROCESSORS, _build, _paper, _with_teacher
for name in CASES:
    model, batch = _build(name)
    if model.config.__dict__.get("momentum_teacher"):
        model.config.momentum_teacher = False
        model = type(model)(model.config).eval()
    model.push_to_hub(f"org/{name}", private=True)
    PROCESSORS[_paper(name)]().push_to_hub(f"org/{name}")
    with torch.no_grad():
        torch.save((batch, dict(model(**batch).items())), f"{sys.argv[1]}/{name}.pt")
detector = tiny_butd()
detector.push_to_hub("org/butd")
detector.image_processor.push_to_hub("org/butd")
"""
LOAD = """
import re, sys
from huggingface_hub import ModelCard
import torch
from test_models import CASES
from transformers import AutoModel, AutoProcessor
for name, (model_class, auto_class, _) in CASES.items():
    batch, expected = torch.load(f"{sys.argv[1]}/{name}.pt")
    for loader in [auto_class]:
        model = loader.from_pretrained(f"org/{name}", revision="main")
        assert type(model) is model_class, type(model)
        with torch.no_grad():
            outputs = dict(model(**batch).items())
        assert outputs.keys() == expected.keys()
        assert all(torch.equal(outputs[key], expected[key]) for key in expected), name
    processor = AutoProcessor.from_pretrained(f"org/{name}")
    assert processor(text="a Red circle!").input_ids.shape[1] > 2
    snippets = re.findall("```python\\n(.*?)```", ModelCard.load(f"org/{name}").text, flags=re.S)
    assert len(snippets) == 2
    exec(compile(snippets[0], name, "exec"), {})
exec(re.search("```python\\n(.*?)```", ModelCard.load("org/butd").text, flags=re.S)[1])
assert regions.boxes.shape[2] == 4
"""
LOAD_WITHOUT = """
import json, re, sys
from huggingface_hub import ModelCard
import torch
from transformers import AutoModel
for name, class_name in json.loads(sys.argv[2]).items():
    snippets = re.findall("```python\\n(.*?)```", ModelCard.load(f"org/{name}").text, flags=re.S)
    names = {}
    exec(compile(snippets[1], name, "exec"), names)  # loads them with trust_remote_code=True
    model, processor = names["model"], names["processor"]
    assert type(model).__name__ == class_name and type(model).__module__.startswith("transformers_modules")
    batch, expected = torch.load(f"{sys.argv[1]}/{name}.pt")
    with torch.no_grad():
        outputs = dict(model(**batch).items())
    assert outputs.keys() == expected.keys()
    assert all(torch.equal(outputs[key], expected[key]) for key in expected), name
    assert processor(text="a Red circle!").input_ids.shape[1] > 2
model.push_to_hub("org/again")  # without the package, which alone writes cards
again = AutoModel.from_pretrained("org/again", trust_remote_code=True)
assert type(again).__name__ == type(model).__name__
"""


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory):
    """Folder of batches and outputs of every model on the Hub."""
    folder = tmp_path_factory.mktemp("pushed")
    run_client(hub, PUSH, folder, folder)
    return folder


def test_every_head_comes_back_with_the_package(hub, pushed, tmp_path):
    run_client(hub, LOAD, tmp_path, pushed)


def test_every_head_comes_back_without_the_package(hub, pushed, tmp_path):
    names = json.dumps({name: model_class.__name__ for name, (model_class, *_) in CASES.items()})
    run_client(hub, LOAD_WITHOUT, tmp_path, pushed, names, package=False)

"""What goes wrong on the way to a Hub and back: nothing is half published, half read or run."""

import json
import pickle

import pytest
import torch
from heads import save_heads
from hub_server import Fault, run_client

from hf_vlp import XVLMForGrounding

UPLOADS = """
import json, time
import torch
from heads import XVLMForGrounding, make_head
from huggingface_hub.errors import HfHubHTTPError
time.sleep = lambda seconds: None  # between attempts
model, processor = make_head(XVLMForGrounding)
for name in ("again", "no-commit", "no-content"):
    processor.push_to_hub(f"faults/{name}")
failures = {}
for name in ("again", "no-commit", "no-content"):
    with torch.no_grad():
        model.bbox_head.fc2.bias += 1  # other contents than are there
    try:
        model.push_to_hub(f"faults/{name}")
    except (HfHubHTTPError, RuntimeError) as error:
        failures[name] = str(error)
print(json.dumps(failures))
"""


def test_uploads_are_repeated_or_leave_nothing(hub, tmp_path):
    content = r"^/faults/{}/lfs/(?!verify)"
    hub.faults += [
        Fault("PUT", content.format("again"), times=2, status=500),
        Fault("PUT", content.format("no-content"), times=100, status=500),
        Fault("POST", "^/api/models/faults/no-commit/commit/", times=100, status=500, after=1),
    ]
    failures = run_client(hub, UPLOADS, tmp_path)
    assert failures.keys() == {"no-commit", "no-content"}
    assert failures["no-commit"].startswith("Server error '500 Internal Server Error'")
    assert failures["no-content"] == "Error while uploading 'model.safetensors' to the Hub."
    assert "model.safetensors" in hub.repos["faults/again"].files()
    for name in failures:
        assert hub.repos[f"faults/{name}"].titles == ["initial commit", "Upload XVLMProcessor"]
        assert "README.md" not in hub.repos[f"faults/{name}"].files()


LOADS = """
import json, sys, time
from pathlib import Path
import torch
from hf_vlp import ALBEFForGrounding, SOHOForGrounding, XVLMForGrounding
from huggingface_hub import constants
time.sleep = lambda seconds: None
expected = torch.load(f"{sys.argv[1]}/state.pt")

def error_of(model_class, name, **options):
    try:
        model = model_class.from_pretrained(f"faults/{name}", **options)
    except Exception as error:
        return type(error).__name__ + ": " + str(error)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())

errors = {
    "connection": error_of(XVLMForGrounding, "connection"),
    "file": error_of(XVLMForGrounding, "file"),
}
weights = Path(constants.HF_HUB_CACHE, "models--faults--file").rglob("model.safetensors")
assert not list(weights), "half of a file is taken for a whole"
errors |= {
    "file again": error_of(XVLMForGrounding, "file"),
    "short": error_of(XVLMForGrounding, "short"),
    "albef": error_of(ALBEFForGrounding, "whole"),
    "soho": error_of(SOHOForGrounding, "whole"),
    "pickle": error_of(XVLMForGrounding, "pickle"),
    "pickle shards": error_of(XVLMForGrounding, "pickle-shards"),
    "pickle in disguise": error_of(XVLMForGrounding, "pickle-in-disguise"),
    "pickle beside": error_of(XVLMForGrounding, "pickle-beside"),
    "named pickle": error_of(XVLMForGrounding, "named-pickle"),
    "asked for pickle": error_of(XVLMForGrounding, "pickle-beside", use_safetensors=False),
    "asked for trust": error_of(XVLMForGrounding, "pickle-beside", weights_only=False),
}
print(json.dumps(errors))
"""
LOADS_WITHOUT = """
import json
from transformers import AutoModel

def error_of(name):
    try:
        AutoModel.from_pretrained(f"faults/{name}", trust_remote_code=True)
    except Exception as error:
        return type(error).__name__ + ": " + str(error)

print(json.dumps({name: error_of(name) for name in ("pickle", "pickle-in-disguise", "pickle-beside")}))
"""


class _Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(scope="module")
def faulty(hub, tmp_path_factory):
    """Repositories, some with what none should read; a folder with the right weights, and the file that a
    pickle would leave."""
    folder = tmp_path_factory.mktemp("faulty")
    save_heads(folder, XVLMForGrounding)
    files = {path.name: path.read_bytes() for path in (folder / "XVLMForGrounding").iterdir()}
    model = XVLMForGrounding.from_pretrained(folder / "XVLMForGrounding")
    torch.save(model.state_dict(), folder / "state.pt")
    left = folder / "left-by-a-pickle"
    bomb = pickle.dumps(_Bomb(left))
    pickle.loads(bomb).close()
    left.unlink()  # it goes off, were it read

    weights = files.pop("model.safetensors")
    config = json.loads(files["config.json"])
    named = json.dumps(config | {"transformers_weights": "adapter_model.bin"}).encode()
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(model.state_dict(), "shard.bin")}
    index = json.dumps(index).encode()
    for name in ("whole", "connection", "file"):
        hub.write(f"faults/{name}", files | {"model.safetensors": weights})
    hub.write("faults/short", files | {"model.safetensors": weights[:-100]})
    hub.write("faults/pickle", files | {"pytorch_model.bin": bomb})
    hub.write("faults/pickle-shards", files | {"model.safetensors.index.json": index, "shard.bin": bomb})
    hub.write("faults/pickle-in-disguise", files | {"model.safetensors": bomb})
    hub.write("faults/pickle-beside", files | {"model.safetensors": weights, "pytorch_model.bin": bomb})
    hub.write("faults/named-pickle", files | {"config.json": named, "adapter_model.bin": bomb})
    return folder, left


def test_what_is_broken_or_dangerous_is_not_read(hub, faulty, tmp_path):
    folder, left = faulty
    weights = "^/faults/{}/resolve/.*safetensors$"
    hub.faults += [
        Fault("GET", weights.format("connection"), times=1, cut="connection"),
        Fault("GET", weights.format("file"), times=1, cut="file"),
    ]
    errors = run_client(hub, LOADS, tmp_path, folder)
    assert not left.exists(), "a pickle was run"
    for name in ("connection", "file again", "pickle beside"):
        assert errors.pop(name) is None
    for name, words in {
        "file": "OSError: Consistency check failed",
        "short": "ValueError: faults/short holds weights that are cut short",
        "albef": "ValueError: the config has model_type='vlp_xvlm', but ALBEFForGrounding is 'vlp_albef'",
        "soho": "ValueError: the config has model_type='vlp_xvlm', but SOHOForGrounding is 'vlp_soho'",
        "pickle": "ValueError: faults/pickle holds its weights in pytorch_model.bin, a pickle",
        "pickle shards": "ValueError",
        "pickle in disguise": "ValueError: faults/pickle-in-disguise holds weights that are cut short",
        "named pickle": "ValueError",
        "asked for pickle": "ValueError: use_safetensors is False",
        "asked for trust": "ValueError: weights_only is False",
    }.items():
        error = errors.pop(name)
        assert error.startswith(words), f"{name}: {error}"
    assert not errors


def test_without_the_package_pickles_are_not_read_either(hub, faulty, tmp_path):
    errors = run_client(hub, LOADS_WITHOUT, tmp_path, package=False)
    assert not faulty[1].exists(), "a pickle was run"
    assert errors.pop("pickle-beside") is None
    assert all(error.startswith("ValueError") for error in errors.values())


OFFLINE = """
from transformers import AutoProcessor
from hf_vlp import load_head
model = load_head("grounding", "faults/whole")
processor = AutoProcessor.from_pretrained("faults/whole")
assert processor(text="a red circle").input_ids.shape == (1, 4)
"""


def test_a_warm_cache_serves_offline(hub, faulty, tmp_path):
    run_client(hub, OFFLINE, tmp_path)
    asked = len(hub.requests)
    run_client(hub, OFFLINE, tmp_path, offline=True)
    assert len(hub.requests) == asked

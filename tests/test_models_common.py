"""The common checks of transformers that apply to these models, for every model and head, beside those in
`test_models`; docs/parity.md lists both."""

import copy
import inspect
import re
from pathlib import Path

import pytest
import safetensors
import test_models
import torch
from test_models import CASES, HEADS, _build, _close, _with_teacher, _without_dropout

from hf_vlp import BUTDDetector
from hf_vlp.models.auto import MODELS

ROOT = Path(__file__).parents[1]
WORDS = 5  # that are added to the vocabulary, or taken out at its end


def _save(name, folder, **options):
    model, batch = _build(name, **options)
    model.save_pretrained(folder, **_with_teacher(model))
    return model, batch


def _state_is_shared(model):
    """Every tied weight is one tensor with what it is tied to."""
    for target, source in model.all_tied_weights_keys.items():
        assert model.get_parameter(target) is model.get_parameter(source), target


@pytest.mark.parametrize("name", CASES)
def test_forward_signature(name):
    """The main input is an argument, and inputs are named as the processor names them."""
    model, batch = _build(name, loud=False)
    arguments = list(inspect.signature(model.forward).parameters)
    assert model.main_input_name in arguments and set(batch) <= set(arguments)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_determinism(name):
    model, batch = _build(name)
    first = model(**batch)
    _close(model(**batch), first, atol=0, rtol=0)
    _close(copy.deepcopy(model)(**batch), first, atol=0, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_tied_weights(name, tmp_path):
    """They are one tensor in memory, once in the file, and one tensor again after loading."""
    model, _ = _save(name, tmp_path)
    _state_is_shared(model)
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict()) - set(model.all_tied_weights_keys)
    loaded = CASES[name][0].from_pretrained(tmp_path)
    assert loaded.all_tied_weights_keys == model.all_tied_weights_keys
    _state_is_shared(loaded)
    loaded.get_input_embeddings().weight.data.add_(1.0)
    _state_is_shared(loaded)


@torch.no_grad()
@pytest.mark.parametrize("change", [WORDS, -WORDS])
@pytest.mark.parametrize("name", CASES)
def test_resize_token_embeddings(name, change, tmp_path):
    model, batch = _build(name)
    size = model.config.get_text_config().vocab_size + change
    batch = {
        key: value if value.is_floating_point() else value.clamp(max=size - 1) for key, value in batch.items()
    }
    expected = model(**batch)
    old = model.get_input_embeddings().weight[: min(size, size - change)].clone()
    assert model.resize_token_embeddings(size) is model.get_input_embeddings()
    assert model.config.get_text_config().vocab_size == model.get_input_embeddings().num_embeddings == size
    assert torch.equal(model.get_input_embeddings().weight[: len(old)], old)
    _state_is_shared(model)
    ours = model(**batch)
    if "mlm_logits" not in ours and not hasattr(model, "decoder"):  # else there are more words to choose from
        _close(ours, expected, atol=1e-6, rtol=1e-5)
    if getattr(model, "teacher", None) is not None:
        model.teacher.follow(model, 0.5)
        ours = model(**batch)
    model.save_pretrained(tmp_path, **_with_teacher(model))
    _close(CASES[name][0].from_pretrained(tmp_path)(**batch), ours, atol=0, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_dtype(name, tmp_path):
    model, batch = _save(name, tmp_path, loud=False)
    batch = {key: value.bfloat16() if value.is_floating_point() else value for key, value in batch.items()}
    loaded = CASES[name][0].from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16} and loaded.dtype == torch.bfloat16
    assert all(value.isfinite().all() for value in loaded(**batch).values())
    loaded.save_pretrained(tmp_path / "half", **_with_teacher(model))
    again = CASES[name][0].from_pretrained(tmp_path / "half", dtype="auto")
    assert again.dtype == torch.bfloat16
    for key, value in loaded.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_device_map(name, tmp_path):
    model, batch = _save(name, tmp_path)
    expected = model(**batch)
    for device_map in ({"": "cpu"}, "cpu") if name not in HEADS else ({"": "cpu"},):
        loaded = CASES[name][0].from_pretrained(tmp_path, device_map=device_map)
        _close(loaded(**batch), expected, atol=0, rtol=0)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", HEADS)
def test_training_with_gradient_checkpointing(name, reentrant):
    """Weights learn as without it, whichever of torch's two ways is taken."""
    model, batch = _build(name)
    _without_dropout(model.train())
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for one in (model, checkpointed):
        torch.manual_seed(0)  # stochastic depth of the trunk
        one(**batch).loss.backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    for key, parameter in checkpointed.named_parameters():
        if gradients[key] is not None:
            torch.testing.assert_close(parameter.grad, gradients[key], msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", CASES)
def test_mismatched_sizes(name, tmp_path):
    """Weights of another size are refused, or made anew when that is asked for."""
    model, batch = _save(name, tmp_path)
    config = CASES[name][0].config_class.from_pretrained(tmp_path)
    config.get_text_config().vocab_size += WORDS
    with pytest.raises(RuntimeError, match="mismatched|size"):
        CASES[name][0].from_pretrained(tmp_path, config=config)
    loaded = CASES[name][0].from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=True)
    embeddings = loaded.get_input_embeddings().weight
    assert len(embeddings) == config.get_text_config().vocab_size and embeddings.isfinite().all()
    _state_is_shared(loaded)


def test_the_list_of_checks():
    """Each check in the docs is a test of every head, README's number is theirs, and no head is left out."""
    parity, readme = ((ROOT / page).read_text(encoding="utf-8") for page in ("docs/parity.md", "README.md"))
    section = parity.partition("## Checks of every head\n")[2].partition("\n## ")[0]
    checks = re.findall(r"^\| .+ \| `(test_\w+)` \|$", section, flags=re.M)
    for check in checks:
        test = getattr(test_models, check, None) or globals()[check]
        ((names, values),) = [
            mark.args for mark in test.pytestmark if mark.args[0] != "reentrant" and "name" in mark.args[0]
        ]
        assert {value if names == "name" else value[0] for value in values} >= set(HEADS), check
    assert len(set(checks)) == len(checks) and f"{len(checks)} common checks" in readme
    tested = {model_class for model_class, *_ in CASES.values()}
    assert tested >= {
        one for _, _, base, heads in MODELS.values() if base is not BUTDDetector for one in (base, *heads)
    }

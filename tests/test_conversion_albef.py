"""Converting official ALBEF files of every kind, and refusing what is none."""

from pathlib import Path

import pytest
import torch
from parity_cases import read_official
from tiny import tiny_tokenizer
from transformers import AutoModel, AutoProcessor
from typer.testing import CliRunner

import hf_vlp
from hf_vlp.cli import app
from hf_vlp.conversion.albef import convert_checkpoint, convert_state_dict
from hf_vlp.models.backbones import resample_position_embeddings

KINDS = {
    "pretrain": hf_vlp.ALBEFForPreTraining,
    "retrieval": hf_vlp.ALBEFForRetrieval,
    "vqa": hf_vlp.ALBEFForQuestionAnswering,
    "ve": hf_vlp.ALBEFForVisualEntailment,
    "nlvr": hf_vlp.ALBEFForVisualReasoning,
    "text_assignment": hf_vlp.ALBEFForTextAssignment,
}
TRAINED = [name for name in KINDS if name != "text_assignment"]  # with a momentum teacher


@pytest.fixture
def official(request):
    """Official weights by kind, and the number of attention heads that tensors do not tell."""

    def load(name: str) -> tuple[dict[str, torch.Tensor], int]:
        folder = Path(request.config.getoption("--parity-dir"))
        if name == "text_assignment":
            state, heads = read_official(folder / "albef_nlvr")
            return _text_assignment(state), heads
        return read_official(folder / f"albef_{name}")

    return load


def _text_assignment(nlvr: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The key tree of NLVR2's domain pretraining: without teacher, with projections and a head of three."""
    text_width, image_width = (
        nlvr["text_encoder.embeddings.LayerNorm.weight"], nlvr["visual_encoder.norm.weight"]
    )  # fmt: skip
    return _student({key: value for key, value in nlvr.items() if not key.startswith("cls_head")}) | {
        "temp": torch.tensor(0.07),
        "vision_proj.weight": torch.randn(12, len(image_width)), "vision_proj.bias": torch.randn(12),
        "text_proj.weight": torch.randn(12, len(text_width)), "text_proj.bias": torch.randn(12),
        "ta_head.weight": torch.randn(3, len(text_width)), "ta_head.bias": torch.randn(3),
    }  # fmt: skip


def _of_momentum(key: str) -> bool:
    return key.split(".")[0].endswith(("_m", "_queue", "queue_ptr"))


def _student(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the released files of tasks hold."""
    return {key: value for key, value in state.items() if not _of_momentum(key)}


def _equal(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return state.keys() == other.keys() and all(value.equal(other[key]) for key, value in state.items())


@pytest.mark.parametrize("name", KINDS)
def test_file_to_folder(official, name, tmp_path):
    state, heads = official(name)
    wrapper = {"optimizer": {"state": {}}, "lr_scheduler": {}, "config": {"image_res": 256}, "epoch": 29}
    torch.save({"model": state, **wrapper}, tmp_path / "official.pth")
    report = convert_checkpoint(
        tmp_path / "official.pth", tmp_path / "out", tiny_tokenizer(), num_attention_heads=heads
    )
    buffers = {key for key in state if key.endswith("position_ids")}
    assert set(report.dropped) == {key for key in state if _of_momentum(key)} | buffers
    assert set(report.used) == set(state) - set(report.dropped) and not report.missing

    model = AutoModel.from_pretrained(tmp_path / "out")
    assert type(model) is KINDS[name] and not model.config.momentum_teacher
    weights = model.state_dict()
    assert _equal(weights, convert_state_dict(state, heads).model.state_dict())
    for key, targets in report.used.items():  # nothing is lost or moved on the way
        joined = torch.cat([weights[target] for target in targets]).reshape(state[key].shape)
        assert torch.equal(joined, state[key]), key

    text_config, tokenizer = model.config.text_config, tiny_tokenizer()
    assert text_config.bos_token_id == tokenizer.cls_token_id
    assert text_config.eos_token_id == tokenizer.sep_token_id
    size = model.config.vision_config.image_size
    batch = AutoProcessor.from_pretrained(tmp_path / "out")(images=[torch.zeros(3, 5, 9)], text=["a circle"])
    assert batch.pixel_values.shape == (1, 3, size, size)
    assert model.get_image_features(batch.pixel_values).last_hidden_state.isfinite().all()
    assert (tmp_path / "out" / "modeling_albef.py").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("name", KINDS)
def test_files_without_a_teacher_convert_to_the_same(official, name):
    state, heads = official(name)
    released = convert_state_dict(_student(state), heads).model
    assert type(released) is KINDS[name]
    assert _equal(released.state_dict(), convert_state_dict(state, heads).model.state_dict())
    with pytest.raises(ValueError, match="holds no momentum teacher"):
        convert_state_dict(_student(state), heads, momentum=True)


@pytest.mark.parametrize("name", TRAINED)
def test_the_teacher_is_kept_on_request(official, name, tmp_path):
    state, heads = official(name)
    state = {key: value + 1 if key == "queue_ptr" else value for key, value in state.items()}
    torch.save(state, tmp_path / "flat.pth")
    report = convert_checkpoint(
        tmp_path / "flat.pth", tmp_path / "out", tiny_tokenizer(), None, heads, momentum=True
    )
    assert all(key.endswith("position_ids") for key in report.dropped)
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert model.config.momentum_teacher
    weights = model.state_dict()
    for key in filter(_of_momentum, report.used):
        value = torch.cat([torch.atleast_1d(weights[target]) for target in report.used[key]])
        value = value.T if key in ("image_queue", "text_queue") else value
        assert torch.equal(value.reshape(state[key].shape), state[key]), key
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())


@pytest.mark.parametrize("momentum", [True, False])
def test_another_resolution(official, momentum, tmp_path):
    state, heads = official("pretrain")
    torch.save(state, tmp_path / "flat.pth")
    patch, grid = state["visual_encoder.patch_embed.proj.weight"].shape[-1], 5
    arguments = (tmp_path / "flat.pth", tmp_path / "out", tiny_tokenizer(), patch * grid, heads, momentum)
    convert_checkpoint(*arguments)
    model = AutoModel.from_pretrained(tmp_path / "out")
    trunks = {"visual_encoder": model.model} | ({"visual_encoder_m": model.teacher.model} if momentum else {})
    for name, base in trunks.items():
        resampled = resample_position_embeddings(state[f"{name}.pos_embed"], grid**2 + 1)
        assert torch.equal(base.vision_model.trunk.embeddings.position_embeddings, resampled)
    assert AutoProcessor.from_pretrained(tmp_path / "out").image_processor.size["height"] == patch * grid
    with pytest.raises(ValueError, match="image_size"):
        convert_checkpoint(tmp_path / "flat.pth", tmp_path / "odd", tiny_tokenizer(), patch + 1, heads)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flat.pth", "out"]


def test_a_grounding_file_has_the_keys_of_retrieval(official):
    state, heads = official("grounding")
    assert type(convert_state_dict(state, heads).model) is hf_vlp.ALBEFForRetrieval
    grounding = convert_state_dict(state, heads, grounding=True).model
    assert type(grounding) is hf_vlp.ALBEFForGrounding
    assert _equal(grounding.state_dict(), convert_state_dict(state, heads).model.state_dict())
    with pytest.raises(ValueError, match="grounding=True.*ALBEFForPreTraining"):
        convert_state_dict(*official("pretrain"), grounding=True)


def test_a_pretraining_file_starts_retrieval_and_grounding(official, tmp_path):
    state, heads = official("pretrain")
    torch.save(state, tmp_path / "official.pth")
    convert_checkpoint(
        tmp_path / "official.pth", tmp_path / "out", tiny_tokenizer(), num_attention_heads=heads
    )
    for head in (hf_vlp.ALBEFForRetrieval, hf_vlp.ALBEFForGrounding, hf_vlp.ALBEFModel):
        model, info = head.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not info["missing_keys"] and model.new_parameters == frozenset()


def _without(state, fragment):
    return {key: value for key, value in state.items() if fragment not in key}


def _changed(state, fragment):
    return {key: value + 1 if fragment in key else value for key, value in state.items()}


def _cut(state, name, dim):
    return {**state, name: state[name].narrow(dim, 0, state[name].shape[dim] - 1).clone()}


def _second_image_keys(state):
    """NLVR2 weights whose last layer has keys of its own."""
    last = max(key for key in state if key.startswith("text_encoder.") and "crossattention.self.key" in key)
    return _changed(state, last)


BROKEN = {
    "incomplete": ("retrieval", lambda s: _without(s, "layer.1.output.dense.bias"), "misses"),
    "no teacher's layer": ("pretrain", lambda s: _without(s, "encoder_m.bert.encoder.layer.0."), "misses"),
    "no queue": ("pretrain", lambda s: _without(s, "text_queue"), "misses"),
    "no projection": ("text_assignment", lambda s: _without(s, "vision_proj.bias"), "misses"),
    "no table": ("ve", lambda s: _without(s, "pos_embed"), "no visual_encoder.pos_embed"),
    "no image": ("ve", lambda s: _without(s, "visual_encoder"), "no visual_encoder"),
    "no head": ("retrieval", lambda s: _without(s, "itm_head"), "no head"),
    "no fusion": ("vqa", lambda s: _without(s, "crossattention"), "crossattention"),
    "surplus": ("nlvr", lambda s: {**s, "extra.weight": torch.zeros(1)}, "no place for"),
    "two heads": ("ve", lambda s: {**s, "itm_head.weight": torch.zeros(2, 8)}, "too many"),
    "misshapen": ("retrieval", lambda s: {**s, "itm_head.bias": torch.zeros(3)}, "misshapen"),
    "odd table": ("ve", lambda s: _cut(s, "visual_encoder.pos_embed", 1), "misshapen"),
    "untied": ("pretrain", lambda s: _changed(s, "text_encoder.cls.predictions.decoder.weight"), "differ"),
    "two biases": ("vqa", lambda s: _changed(s, "text_decoder.cls.predictions.decoder.bias"), "differ"),
    "keys not shared": ("nlvr", _second_image_keys, "differ"),
    "two classes": ("ve", lambda s: _cut(s, "cls_head.2.weight", 0), "differ"),
    "xvlm": ("retrieval", lambda s: {"vision_encoder.norm.weight": torch.zeros(1)}, "X-VLM"),
    "blip": (
        "vqa", lambda s: {**s, "text_encoder.encoder.layer.0.crossattention.x": torch.zeros(1)}, "BLIP",
    ),
    "lxmert": ("retrieval", lambda s: {"bert.encoder.r_layers.0.x": torch.zeros(1)}, "LXMERT"),
    "soho": ("retrieval", lambda s: {"language.bert.x": torch.zeros(1)}, "SOHO"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_such_checkpoint_is_refused(official, name, tmp_path):
    kind, damage, message = BROKEN[name]
    state, heads = official(kind)
    momentum = kind == "pretrain"
    torch.save({"model": damage(state)}, tmp_path / "broken.pth")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(
            tmp_path / "broken.pth", tmp_path / "out", tiny_tokenizer(), None, heads, momentum=momentum
        )
    assert [path.name for path in tmp_path.iterdir()] == ["broken.pth"]


def test_command_line(official, tmp_path):
    state, heads = official("retrieval")
    torch.save(state, tmp_path / "official.pth")
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    size = 4 * state["visual_encoder.patch_embed.proj.weight"].shape[-1]
    command = ["convert", "albef", str(tmp_path / "official.pth"), str(tmp_path / "out"), "--grounding"]
    command += ["--num-attention-heads", str(heads), "--image-size", str(size), "--momentum"]
    result = CliRunner().invoke(app, [*command, "--tokenizer", str(tmp_path / "tokenizer")])
    assert result.exit_code == 0 and "keys used" in result.output and "written to" in result.output
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert type(model) is hf_vlp.ALBEFForGrounding and model.teacher is not None
    assert model.config.vision_config.image_size == size

    result = CliRunner().invoke(
        app, ["convert", "albef", str(tmp_path / "none.pth"), str(tmp_path / "other")]
    )
    assert result.exit_code == 1 and isinstance(result.exception, FileNotFoundError)
    assert not (tmp_path / "other").exists()

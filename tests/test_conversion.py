"""Converting official X-VLM files, and refusing what is none."""

import hashlib
from pathlib import Path

import pytest
import torch
from parity_cases import read_official
from tiny import tiny_tokenizer
from transformers import AutoModel, AutoProcessor

import hf_vlp
from hf_vlp.conversion.keys import read_state_dict
from hf_vlp.conversion.xvlm import convert_checkpoint, convert_state_dict

KINDS = {
    "xvlm_pretrain_image": hf_vlp.XVLMForPreTraining,
    "xvlm_retrieval": hf_vlp.XVLMForRetrieval,
    "xvlm_grounding": hf_vlp.XVLMForGrounding,
    "xvlm_vqa": hf_vlp.XVLMForQuestionAnswering,
    "xvlm_nlvr": hf_vlp.XVLMForVisualReasoning,
    "text_assignment": hf_vlp.XVLMForTextAssignment,
    "xvlm_captioning": hf_vlp.XVLMForCaptioning,
}


@pytest.fixture
def official(request):
    """Official weights by folder name, and the number of attention heads that tensors do not tell."""

    def load(name: str) -> tuple[dict[str, torch.Tensor], int]:
        folder = Path(request.config.getoption("--parity-dir"))
        if name == "text_assignment":
            state, heads = read_official(folder / "xvlm_nlvr")
            return _text_assignment(state), heads
        return read_official(folder / name)

    return load


def _text_assignment(nlvr: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The key tree of NLVR2's domain pretraining: a projection of images alone, and a head of three."""
    text_width = len(nlvr["text_encoder.embeddings.LayerNorm.weight"])
    image_width = len(nlvr["vision_encoder.norm.weight"])
    return {key: value for key, value in nlvr.items() if not key.startswith("cls_head")} | {
        "vision_proj.weight": torch.randn(12, image_width), "vision_proj.bias": torch.randn(12),
        "ta_head.weight": torch.randn(3, text_width), "ta_head.bias": torch.randn(3),
    }  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_file_to_folder(official, name, tmp_path):
    state, heads = official(name)
    torch.save({"model": state, "config": {"image_res": 64}}, tmp_path / "official.th")
    report = convert_checkpoint(
        tmp_path / "official.th", tmp_path / "out", tiny_tokenizer(), num_attention_heads=heads
    )
    assert set(report.used) | set(report.dropped) == set(state) and not report.missing
    assert f"{len(report.used)} keys used" in str(report)

    model = AutoModel.from_pretrained(tmp_path / "out")
    assert type(model) is KINDS[name]
    converted = convert_state_dict(state, heads).model.state_dict()
    assert all(torch.equal(value, converted[key]) for key, value in model.state_dict().items())
    for key, targets in report.used.items():  # nothing is lost or moved on the way
        joined = torch.cat([converted[target] for target in targets]).reshape(state[key].shape)
        assert torch.equal(joined, state[key]), key

    text_config, tokenizer = model.config.text_config, tiny_tokenizer()
    assert text_config.bos_token_id == tokenizer.cls_token_id  # of answers
    assert text_config.eos_token_id == tokenizer.sep_token_id
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    size = model.config.vision_config.image_size
    batch = processor(images=[torch.zeros(3, 5, 9)], text=["a circle"])
    assert batch.pixel_values.shape == (1, 3, size, size)
    patches = processor.encode_regions([[[0, 0, 9, 5]]], [(5, 9)])["region_patch_mask"]
    assert patches.shape[1] == model.base_model.vision_model(batch.pixel_values).shape[1] - 1
    assert (tmp_path / "out" / "modeling_xvlm.py").exists()
    source, card = model.config.converted_from, (tmp_path / "out" / "README.md").read_text()
    digest = hashlib.sha256((tmp_path / "official.th").read_bytes()).hexdigest()
    assert (source["file"], source["sha256"], source["keys_used"]) == (
        "official.th",
        digest,
        len(report.used),
    )
    assert digest in card and f"{len(report.used)} used, {len(report.dropped)} dropped, 0 missing" in card
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_another_resolution(official, tmp_path):
    state, heads = official("xvlm_grounding")
    torch.save(state, tmp_path / "flat.pth")
    small = convert_state_dict(state, heads).model.config.vision_config
    size = small.image_size * 2
    convert_checkpoint(tmp_path / "flat.pth", tmp_path / "out", tiny_tokenizer(), size, heads)
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert model.config.vision_config.image_size == size
    assert model.config.vision_config.window_size == small.window_size * 2
    assert AutoProcessor.from_pretrained(tmp_path / "out").image_processor.size["height"] == size


@pytest.mark.parametrize("with_masks", [True, False])
@pytest.mark.parametrize("window", [3, 4])
def test_window_and_size_are_read(official, window, with_masks):
    """As of files for 384 pixels and for 480, whose last stage is one window of 12 or 15."""
    state, heads = official("xvlm_vqa")
    state = {k: v for k, v in state.items() if not k.endswith(("attn_mask", "relative_position_index"))}
    stages = len({key.split(".")[2] for key in state if key.startswith("vision_encoder.layers.")})
    for key in [key for key in state if key.endswith("relative_position_bias_table")]:
        state[key] = torch.randn((2 * window - 1) ** 2, state[key].shape[1])
        stage, block = int(key.split(".")[2]), int(key.split(".")[4])
        if with_masks and block % 2 and stage < stages - 1:
            name = key.replace("attn.relative_position_bias_table", "attn_mask")
            state[name] = torch.zeros(4 ** (stages - 1 - stage), window**2, window**2)
    swin = convert_state_dict(state, heads).model.config.vision_config
    assert swin.window_size == window
    assert swin.image_size == window * swin.patch_size * 2 ** (stages - 1)


@pytest.mark.parametrize("kind", ["xvlm_nlvr", "text_assignment"])
def test_pairs_share_keys_and_values(official, kind):
    """Stored twice, they must be equal: there is one place for both."""
    state, heads = official(kind)
    last = max(key for key in state if key.startswith("text_encoder.") and "crossattention.self.key" in key)
    with pytest.raises(ValueError, match="differ"):
        convert_state_dict(state | {last: state[last] + 1}, heads)


def _without(state, fragment):
    return {key: value for key, value in state.items() if fragment not in key}


BROKEN = {
    "incomplete": (lambda s: _without(s, "layer.1.output.dense.bias"), "misses"),
    "without heads": (lambda s: _without(s, "_head."), "no heads"),
    "without fusion": (lambda s: _without(s, "crossattention"), "crossattention"),
    "with surplus": (lambda s: {**s, "extra.weight": torch.zeros(1)}, "no place for"),
    "misshapen": (lambda s: {**s, "itm_head.3.weight": torch.zeros(3, 64)}, "misshapen"),
    "albef": (lambda s: {**s, "visual_encoder.cls_token": torch.zeros(1)}, "ALBEF"),
    "surplus decoder": (lambda s: {**s, "text_decoder.bert.x": torch.zeros(1)}, "no place for"),
    "two heads": (lambda s: {**s, "cls_head.0.weight": torch.zeros(1)}, "no heads"),
    "lxmert": (lambda s: {"bert.encoder.r_layers.0.x": torch.zeros(1)}, "LXMERT"),
    "half a clip": (
        lambda s: {**s, "vision_encoder.class_embedding": torch.zeros(1)},
        "no vision_encoder.patch_embed.weight",
    ),
    "nothing": (lambda s: {"weight": torch.zeros(1)}, "no heads"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_such_checkpoint_is_refused(official, name, tmp_path):
    damage, message = BROKEN[name]
    state, heads = official("xvlm_retrieval")
    torch.save({"model": damage(state)}, tmp_path / "broken.th")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(
            tmp_path / "broken.th", tmp_path / "out", tiny_tokenizer(), num_attention_heads=heads
        )
    assert [path.name for path in tmp_path.iterdir()] == ["broken.th"]


class Malicious:
    def __reduce__(self):
        return (Path("pwned").touch, ())


def test_files_that_cannot_be_read(official, tmp_path):
    state, _ = official("xvlm_grounding")
    whole = tmp_path / "whole.th"
    torch.save({"model": state}, whole)
    (tmp_path / "truncated.th").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (tmp_path / "truncated.safetensors").write_bytes(b"\x10\x00\x00")
    (tmp_path / "text.th").write_text("not a checkpoint")
    torch.save({"model": {"weight": Malicious()}}, tmp_path / "malicious.th")
    torch.save({"epoch": 3}, tmp_path / "empty.th")
    for name in ("truncated.th", "truncated.safetensors", "text.th", "malicious.th", "empty.th"):
        with pytest.raises(ValueError, match=name):
            read_state_dict(tmp_path / name)
    assert not Path("pwned").exists()
    with pytest.raises(FileNotFoundError, match="absent.th"):
        read_state_dict(tmp_path / "absent.th")


def test_outputs_and_tokenizers_that_do_not_fit(official, tmp_path):
    state, heads = official("xvlm_grounding")
    torch.save(state, tmp_path / "official.th")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="not an empty folder"):
        convert_checkpoint(tmp_path / "official.th", tmp_path / "full", tiny_tokenizer())
    with pytest.raises(ValueError, match="tokenizer="):
        convert_checkpoint(tmp_path / "official.th", tmp_path / "out", str(tmp_path / "none"), None, heads)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(1000)])
    with pytest.raises(ValueError, match="1026 tokens|tokens, but"):
        convert_checkpoint(tmp_path / "official.th", tmp_path / "out", tokenizer, None, heads)
    with pytest.raises(ValueError, match="num_attention_heads"):
        convert_checkpoint(tmp_path / "official.th", tmp_path / "out", tiny_tokenizer(), None, 31)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "official.th"]


def test_a_decoder_of_another_width_or_incomplete_is_refused(official):
    """A decoder without a text encoder is one of captions."""
    state, heads = official("xvlm_vqa")
    with pytest.raises(ValueError, match="misshapen"):
        convert_state_dict({k: v for k, v in state.items() if not k.startswith("text_encoder.")}, heads)
    state, heads = official("xvlm_captioning")
    with pytest.raises(ValueError, match="misses"):
        convert_state_dict(_without(state, "text_decoder.cls.predictions.transform"), heads)


@pytest.mark.parametrize("twin", ["weight", "bias"])
def test_tied_tensors_that_differ_are_refused(official, twin):
    state, heads = official("xvlm_pretrain_image")
    state[f"text_encoder.cls.predictions.decoder.{twin}"] += 1
    with pytest.raises(ValueError, match="differ"):
        convert_state_dict(state, heads)


def test_a_pretraining_file_starts_every_task(official, tmp_path):
    state, heads = official("xvlm_pretrain_image")
    torch.save(state, tmp_path / "official.th")
    convert_checkpoint(
        tmp_path / "official.th", tmp_path / "out", tiny_tokenizer(), num_attention_heads=heads
    )
    for head in (
        hf_vlp.XVLMForRetrieval,
        hf_vlp.XVLMForGrounding,
        hf_vlp.XVLMForCaptioning,
        hf_vlp.XVLMModel,
    ):
        model, info = head.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not info["missing_keys"] and model.new_parameters == frozenset()
    model = hf_vlp.XVLMForQuestionAnswering.from_pretrained(tmp_path / "out")
    assert len(model.new_parameters) == 4 * len(
        model.decoder.layer
    )  # keys and values, as in the official code
    assert all(name.startswith("decoder.key_values.") for name in model.new_parameters)
    for ours, theirs in zip(model.decoder.layer, model.model.fusion_model.layer, strict=True):
        for name, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name]), name
    pretrained = hf_vlp.XVLMForPreTraining.from_pretrained(tmp_path / "out")
    assert torch.equal(model.decoder.lm_head.dense.weight, pretrained.lm_head.dense.weight)
    assert torch.equal(model.decoder.lm_head.decoder.bias, pretrained.lm_head.decoder.bias)
    model = hf_vlp.XVLMForVisualReasoning.from_pretrained(tmp_path / "out")
    assert all(name.startswith("cls_head.") for name in model.new_parameters)
    fusion = model.model.fusion_model
    for first, second in zip(fusion.layer, fusion.second_layer, strict=True):
        assert torch.equal(first.crossattention.self.query.weight, second.crossattention.self.query.weight)

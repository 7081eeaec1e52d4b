"""Official X-VLM files with a CLIP or DeiT trunk, or a RoBERTa, made here from transformers' own models.

There are no reference values of the official code for them; what their names and shapes are is known.
"""

import re
from pathlib import Path

import pytest
import torch
from parity_cases import read_official
from tiny import IMAGE_SIZE, TRUNKS, tiny_tokenizer
from tokenizers_of_languages import byte_level_tokenizer
from transformers import (
    AutoModel,
    CLIPVisionModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    ViTModel,
)

import hf_vlp
from hf_vlp.conversion.bert import count_layers
from hf_vlp.conversion.xvlm import convert_checkpoint, convert_state_dict

VISION_HEADS = 2


def _loud(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def _clip() -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A model of transformers, and its weights under official names."""
    model = _loud(CLIPVisionModel(TRUNKS["clip"]()))
    official = {}
    for name, value in model.state_dict().items():
        name = name.removeprefix("embeddings.").replace("patch_embedding", "patch_embed")
        official[f"vision_encoder.{name.replace('position_embedding', 'pos_embed')}"] = value
    return model, official | {"vision_encoder.position_ids": torch.arange(5)[None]}


def _deit() -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    config = TRUNKS["vit"]()
    config.layer_norm_eps = 1e-6
    model = _loud(ViTModel(config, add_pooling_layer=False))
    state = model.state_dict()
    official = {
        "cls_token": state["embeddings.cls_token"],
        "pos_embed": state["embeddings.position_embeddings"],
    }
    for kind in ("weight", "bias"):
        official[f"patch_embed.proj.{kind}"] = state[f"embeddings.patch_embeddings.projection.{kind}"]
        official[f"norm.{kind}"] = state[f"layernorm.{kind}"]
        for i in range(config.num_hidden_layers):
            ours, theirs = f"layers.{i}.", f"blocks.{i}."
            official |= {
                f"{theirs}norm1.{kind}": state[f"{ours}layernorm_before.{kind}"],
                f"{theirs}norm2.{kind}": state[f"{ours}layernorm_after.{kind}"],
                f"{theirs}attn.qkv.{kind}": torch.cat(
                    [state[f"{ours}attention.{part}_proj.{kind}"] for part in "qkv"]
                ),
                f"{theirs}attn.proj.{kind}": state[f"{ours}attention.o_proj.{kind}"],
                f"{theirs}mlp.fc1.{kind}": state[f"{ours}mlp.fc1.{kind}"],
                f"{theirs}mlp.fc2.{kind}": state[f"{ours}mlp.fc2.{kind}"],
            }
    return model, {f"vision_encoder.{name}": value for name, value in official.items()}


def _with_trunk(official: dict[str, torch.Tensor], trunk: dict[str, torch.Tensor], width: int):
    """A file with a Swin given another trunk: what reads images gets its width."""
    state = {name: value for name, value in official.items() if not name.startswith("vision_encoder.")}
    for name, value in state.items():
        if re.fullmatch(r"vision_proj\.weight|.*crossattention\.self\.(key|value)\.weight", name):
            state[name] = torch.randn(len(value), width) * 0.1
    return state | trunk


@pytest.fixture
def official(request):
    """Official weights with a Swin and a BERT by folder name, and the number of attention heads."""

    def load(name: str) -> tuple[dict[str, torch.Tensor], int]:
        torch.manual_seed(0)
        return read_official(Path(request.config.getoption("--parity-dir")) / name)

    return load


@pytest.mark.parametrize("make", [_clip, _deit])
@pytest.mark.parametrize("name", ["xvlm_pretrain_image", "xvlm_retrieval", "xvlm_grounding"])
def test_trunks(official, name, make):
    state, heads = official(name)
    theirs, trunk = make()
    converted = convert_state_dict(_with_trunk(state, trunk, 16), heads, VISION_HEADS)
    model, report = converted.model, converted.report
    assert set(report.used) | set(report.dropped) == set(_with_trunk(state, trunk, 16)) and not report.missing
    config = model.config.vision_config
    assert type(config) is type(theirs.config) and model.config.local_attn_depth == 2
    for field in ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "intermediate_size"):
        assert getattr(config, field) == getattr(theirs.config, field)
    assert config.layer_norm_eps == (1e-5 if make is _clip else 1e-6)
    images = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    with torch.no_grad():
        ours, expected = model.base_model.vision_model(images), theirs(images).last_hidden_state
    if make is _clip:
        assert config.hidden_act == "quick_gelu"
        expected = theirs.post_layernorm(expected)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_a_file_with_a_clip_at_another_size(official, tmp_path):
    state, heads = official("xvlm_retrieval")
    _, trunk = _clip()
    torch.save({"model": _with_trunk(state, trunk, 16)}, tmp_path / "official.th")
    convert_checkpoint(
        tmp_path / "official.th",
        tmp_path / "out",
        tiny_tokenizer(),
        image_size=2 * IMAGE_SIZE,
        num_attention_heads=heads,
    )
    model = AutoModel.from_pretrained(tmp_path / "out")
    processor = hf_vlp.XVLMProcessor.from_pretrained(tmp_path / "out")
    batch = processor(images=[torch.zeros(3, 5, 9)], text=["a circle"])
    regions = processor.encode_regions([[[0, 0, 9, 5]]], [(5, 9)])
    assert model.get_image_features(batch.pixel_values).last_hidden_state.shape == (1, 17, 16)
    assert regions["region_patch_mask"].shape == (1, 16)


# RoBERTa

VOCABULARY = 300


def _as_roberta(official: dict[str, torch.Tensor], heads: int, prefix: str):
    """Half of a RoBERTa of transformers, and the file with its weights in place of BERT's."""
    official = {name.replace("text_encoder.bert.", "text_encoder."): v for name, v in official.items()}
    config = RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=official["text_encoder.embeddings.word_embeddings.weight"].shape[1],
        num_hidden_layers=count_layers(official, "text_encoder.encoder.layer."),
        num_attention_heads=heads,
        intermediate_size=len(official["text_encoder.encoder.layer.0.intermediate.dense.bias"]),
        max_position_embeddings=40,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    roberta = _loud(RobertaForMaskedLM(config))
    state = {name: v for name, v in official.items() if not re.search("predictions|position_ids", name)}
    theirs = {name.removeprefix("roberta."): value for name, value in roberta.state_dict().items()}
    for name in list(state):
        inner = name.removeprefix("text_encoder.")
        if name.startswith("text_encoder.") and "crossattention" not in name:
            state[name] = theirs[inner]
    if prefix:
        state = {name.replace("text_encoder.", f"text_encoder.{prefix}"): v for name, v in state.items()}
        state |= {f"text_encoder.{name}": v for name, v in theirs.items() if name.startswith("lm_head.")}
        state[f"text_encoder.{prefix}embeddings.position_ids"] = torch.arange(40)[None]
    return roberta, state


@pytest.mark.parametrize(
    ("name", "prefix"), [("xvlm_pretrain_image", "roberta."), ("xvlm_retrieval", ""), ("xvlm_grounding", "")]
)
def test_roberta(official, name, prefix):
    state, heads = official(name)
    theirs, state = _as_roberta(state, heads, prefix)
    converted = convert_state_dict(state, heads)
    model, report = converted.model, converted.report
    assert set(report.used) | set(report.dropped) == set(state) and not report.missing
    text = model.config.text_config
    assert (text.position_offset, text.pad_token_id, text.bos_token_id, text.eos_token_id) == (2, 1, 0, 2)
    assert (text.vocab_size, text.layer_norm_eps, text.type_vocab_size) == (VOCABULARY, 1e-5, 1)
    ids = torch.randint(5, VOCABULARY, (2, 6))
    ids[:, 0], ids[1, 4:] = 0, 1
    mask = (ids != 1).long()
    with torch.no_grad():
        hidden = theirs.roberta(ids, mask, output_hidden_states=True).hidden_states[text.num_text_layers]
        ours = model.base_model.text_model(ids, mask)
        torch.testing.assert_close(ours[mask.bool()], hidden[mask.bool()], atol=1e-5, rtol=1e-5)
        if prefix:
            torch.testing.assert_close(model.lm_head(hidden), theirs.lm_head(hidden), atol=1e-5, rtol=1e-5)


def test_roberta_wants_its_own_tokenizer(official, tmp_path):
    state, heads = official("xvlm_retrieval")
    torch.save(_as_roberta(state, heads, "")[1], tmp_path / "official.th")
    with pytest.raises(ValueError, match="tokenizer pads with 0"):
        convert_checkpoint(tmp_path / "official.th", tmp_path / "out", tiny_tokenizer(), None, heads)
    tokenizer = byte_level_tokenizer(["a red circle"], VOCABULARY)
    convert_checkpoint(tmp_path / "official.th", tmp_path / "out", tokenizer, None, heads)
    processor = hf_vlp.XVLMProcessor.from_pretrained(tmp_path / "out")
    assert processor(text=["a"]).input_ids[0, 0] == 0

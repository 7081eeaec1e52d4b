"""Properties of the bricks: boxes, negatives, objectives, trunks."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny import IMAGE_SIZE, TRUNKS, tiny_albef_config, tiny_config, tiny_processor, tiny_tokenizer
from transformers import BertConfig, BertForMaskedLM, ResNetConfig, SwinConfig, SwinModel, ViTModel

import hf_vlp
from hf_vlp.models.backbones import (
    ImageTrunk,
    resample_position_embeddings,
    resample_relative_table,
    resize_trunk,
)
from hf_vlp.models.boxes import box_losses, patch_mask
from hf_vlp.models.layers_bert import Packing
from hf_vlp.models.negatives import hard_negatives
from hf_vlp.models.objectives import contrastive_logits, contrastive_loss, masked_lm_loss

pixels = st.integers(0, 95)


@given(x=pixels, y=pixels, w=st.integers(1, 96), h=st.integers(1, 96))
def test_patch_mask_covers_what_the_box_touches(x, y, w, h):
    """Against a count of touched pixels, patch by patch."""
    w, h = min(w, 96 - x), min(h, 96 - y)
    touched = np.zeros((96, 96), dtype=bool)
    touched[y : y + h, x : x + w] = True
    expected = touched.reshape(6, 16, 6, 16).any(axis=(1, 3)).reshape(-1)
    box = torch.tensor([[x, y, x + w, y + h]]) / 96
    assert patch_mask(box, 6)[0].tolist() == expected.tolist()


@given(st.lists(st.floats(0.05, 0.95), min_size=4, max_size=4))
def test_box_losses_of_the_true_box_are_zero(box):
    box = torch.tensor([box])
    l1, giou = box_losses(box, box)
    assert l1 == 0 and giou.abs() < 1e-3  # the library adds 1e-7 to areas
    far, _ = box_losses(box, 1 - box)
    assert far >= 0


def test_box_losses_leave_out_uncounted_boxes():
    predicted, target = torch.rand(5, 4), torch.rand(5, 4)
    counted = torch.tensor([True, False, True, True, False])
    for ours, expected in zip(
        box_losses(predicted, target, counted), box_losses(predicted[counted], target[counted]), strict=True
    ):
        torch.testing.assert_close(ours, expected)
    assert box_losses(predicted, target, torch.zeros(5, dtype=torch.bool)) == (0, 0)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=12), st.integers(0, 99))
def test_hard_negatives_are_never_of_the_same_id(ids, seed):
    ids = torch.tensor(ids)
    logits = torch.randn(len(ids), len(ids), generator=torch.Generator().manual_seed(seed)) * 50
    if (ids == ids[0]).all():
        with pytest.raises(ValueError, match="no negatives"):
            hard_negatives(logits, logits.T, ids)
        return
    image, text = hard_negatives(logits, logits.T, ids)
    assert (ids[image] != ids).all() and (ids[text] != ids).all()


def test_hard_negatives_follow_similarity():
    logits = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 1.0], [3.0, 0.0, 0.0]])
    draws = torch.stack([torch.stack(hard_negatives(logits, logits.T)) for _ in range(3000)])  # (draws, 2, B)
    weights = logits.softmax(dim=1).fill_diagonal_(0)
    shares = F.one_hot(draws[:, 1], 3).float().mean(dim=0)
    torch.testing.assert_close(shares, weights / weights.sum(1, keepdim=True), atol=0.04, rtol=0)


def test_one_pair_has_no_negatives():
    with pytest.raises(ValueError, match="at least two different images"):
        hard_negatives(torch.zeros(1, 1), torch.zeros(1, 1))


@given(st.integers(2, 6), st.integers(0, 99))
def test_contrastive_loss_does_not_depend_on_the_order_of_pairs(size, seed):
    generator = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(size, 4, generator=generator), dim=1) for _ in range(2))
    ids = torch.randint(0, 3, (size,), generator=generator)
    order = torch.randperm(size, generator=generator)
    loss = contrastive_loss(contrastive_logits(image, text, torch.tensor(0.1)), ids)
    shuffled = contrastive_loss(contrastive_logits(image[order], text[order], torch.tensor(0.1)), ids[order])
    torch.testing.assert_close(loss, shuffled)
    distinct = contrastive_logits(image, text, torch.tensor(0.1))
    torch.testing.assert_close(contrastive_loss(distinct, torch.arange(size)), contrastive_loss(distinct))


def test_masked_lm_loss_without_labels_is_zero():
    logits = torch.zeros(0, 7, requires_grad=True)
    loss = masked_lm_loss(logits, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss == 0


# Many texts of one image


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_packing_leaves_out_padding_and_nothing_else(lengths):
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    packing, words = Packing.of(mask.long()), torch.arange(sum(lengths))[None, :, None]
    assert torch.equal(packing.pack(packing.pad(words)), words)
    assert torch.equal(packing.pad(words)[mask], words[0])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("cls_only", [False, True])
def test_packed_texts_of_one_image_are_fused_as_each_alone(implementation, cls_only):
    model = hf_vlp.XVLMForRetrieval(tiny_config()).eval()
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        key_values = model.project_image(torch.randn(1, 5, 32))
        texts, lengths = torch.randn(4, 6, 16), [6, 2, 4, 1]
        mask = (torch.arange(6) < torch.tensor(lengths)[:, None]).long()
        together = model.model.fuse(texts, mask, key_values, cls_only=cls_only)
        read = model.read_words(texts, mask)
        again = model.model.fuse(read, mask, key_values, cls_only=cls_only, words_read=True)
        for i, length in enumerate(lengths):
            text = texts[i : i + 1, :length]
            alone = model.model.fuse(text, mask[i : i + 1, :length], key_values, cls_only=cls_only)[0]
            torch.testing.assert_close(together[i, : len(alone)], alone, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(again[i, : len(alone)], alone, atol=1e-5, rtol=1e-5)


# Trunks


@pytest.mark.parametrize("name", TRUNKS)
def test_trunk_layout(name):
    """The global token comes first: [CLS] where the trunk has one, else the mean of the patches."""
    trunk = ImageTrunk(TRUNKS[name]()).eval()
    images = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    with torch.no_grad():
        tokens, raw = trunk(images), trunk.trunk(images).last_hidden_state
    assert tokens.shape == (2, 1 + 4, trunk.width)
    if name == "swin":
        torch.testing.assert_close(tokens[:, 0], raw.mean(dim=1))
        torch.testing.assert_close(tokens[:, 1:], raw)
    elif name == "clip":
        torch.testing.assert_close(tokens, trunk.trunk.post_layernorm(raw))
    else:
        torch.testing.assert_close(tokens, raw)


def test_a_convolutional_trunk_reads_any_size():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    trunk = ImageTrunk(config).eval()
    for size in (32, 64):
        tokens = trunk(torch.randn(1, 3, size, size))
        assert tokens.shape == (1, 1 + (size // 8) ** 2, 16)
        torch.testing.assert_close(tokens[:, 0], tokens[:, 1:].mean(dim=1))


RESAMPLED = [(7, 12, 1.240724), (7, 15, 1.337515), (12, 15, 1.047191)]  # windows, and BEiT's ratio


@pytest.mark.parametrize(("source", "target", "ratio"), RESAMPLED)
def test_relative_tables_are_resampled_by_beits_recipe(source, target, ratio):
    """Polynomials up to the third degree in the old coordinate come back exactly, read at the new ones."""
    half = sum(ratio**i for i in range(source - 1))
    assert math.isclose(half, target - 1, abs_tol=1e-3)
    steps = np.cumsum([ratio**i for i in range(source - 1)])
    old = torch.tensor(np.concatenate([-steps[::-1], [0], steps]))
    new = torch.arange(-(target - 1), target).double()

    def surface(x, y):
        return 1 + 0.1 * x[:, None] + (x[:, None] / 7) ** 3 - (y[None] / 9) ** 2 * x[:, None]

    table = surface(old, old).reshape(-1, 1)
    resampled = resample_relative_table(table, target)
    torch.testing.assert_close(resampled, surface(new, new).reshape(-1, 1), atol=2e-4, rtol=1e-4)


def test_resampling_to_the_same_window_changes_nothing():
    table = torch.randn(49, 3)
    assert resample_relative_table(table, 4) is table


def test_position_embeddings_keep_cls_and_scale_the_grid():
    table = torch.randn(1, 1 + 16, 8)
    resampled = resample_position_embeddings(table, 1 + 64)
    grid = table[:, 1:].mT.reshape(1, 8, 4, 4)
    expected = F.interpolate(grid, size=(8, 8), mode="bicubic", align_corners=False).reshape(1, 8, 64).mT
    torch.testing.assert_close(resampled[:, :1], table[:, :1])
    torch.testing.assert_close(resampled[:, 1:], expected)


@pytest.mark.parametrize("name", ["swin", "vit", "clip"])
def test_a_model_reads_another_resolution_and_is_saved_so(name, tmp_path):
    model = hf_vlp.XVLMForGrounding(tiny_config(name)).eval()
    model.save_pretrained(tmp_path / "small")
    larger = hf_vlp.XVLMForGrounding.from_pretrained(tmp_path / "small", image_size=64)
    images = torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match="set_image_size"):
        model.model.vision_model(images)
    larger.save_pretrained(tmp_path / "large")
    again = hf_vlp.XVLMForGrounding.from_pretrained(tmp_path / "large")
    torch.testing.assert_close(again.model.vision_model(images), larger.model.vision_model(images))
    for key, value in model.state_dict().items():
        if "relative_position" not in key and "position_embedding" not in key:
            assert torch.equal(value, larger.state_dict()[key]), key


@pytest.mark.parametrize(
    ("trunk", "size", "message"), [("swin", 40, "window"), ("vit", 40, "patches"), ("timm", 64, "resample")]
)
def test_sizes_that_do_not_fit(trunk, size, message):
    config = TRUNKS[trunk]()
    if trunk == "swin":
        config.window_size = 3
    with pytest.raises(ValueError, match=message):
        resize_trunk(ImageTrunk(config), size)


def test_unknown_vision_config():
    with pytest.raises(ValueError, match="vision_config"):
        hf_vlp.XVLMConfig(vision_config={"model_type": "nonsense"})
    with pytest.raises(ValueError, match="num_attention_heads"):
        hf_vlp.VLPTextConfig(hidden_size=10, num_attention_heads=3)


# Starting from public weights


@pytest.mark.parametrize(("layers", "fusion", "taken"), [(4, 2, [2, 3]), (8, 2, [5, 7])])
def test_from_backbones(layers, fusion, taken, tmp_path):
    config = TRUNKS["swin"]()
    config.image_size = 64  # so that the last stage is one window, as transformers' own Swin needs
    vision = SwinModel(config)
    vision.save_pretrained(tmp_path / "swin")
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    bert = BertForMaskedLM(BertConfig(num_hidden_layers=layers, **sizes)).eval()
    bert.save_pretrained(tmp_path / "bert")
    model = hf_vlp.XVLMForPreTraining.from_backbones(
        str(tmp_path / "swin"), str(tmp_path / "bert"), num_fusion_layers=fusion, projection_dim=8
    )
    for i, layer in enumerate(taken):
        ours = model.model.fusion_model.layer[i].output.dense.weight
        assert torch.equal(ours, bert.bert.encoder.layer[layer].output.dense.weight)
    ids, mask = torch.tensor([[2, 7, 8]]), torch.ones(1, 3, dtype=torch.long)
    text = bert.bert.embeddings(input_ids=ids)
    torch.testing.assert_close(model.model.text_model.embeddings(ids), text)
    hidden = bert.bert(ids, mask, output_hidden_states=True).hidden_states[layers // 2]
    torch.testing.assert_close(model.model.text_model(ids, mask), hidden)
    images = torch.randn(1, 3, 64, 64)
    patches = vision.eval()(images).last_hidden_state
    torch.testing.assert_close(model.model.vision_model(images)[:, 1:], patches)
    assert torch.equal(model.lm_head.decoder.bias, bert.cls.predictions.bias)
    parts = [name.removeprefix("model.").split(".")[0] for name in model.new_parameters]
    heads = {"itm_head", "bbox_head", "image_projection", "text_projection", "temperature"}
    assert set(parts) == {"fusion_model"} | heads
    assert all(
        "crossattention" in n or "key_values" in n for n in model.new_parameters if "fusion_model" in n
    )


def test_from_backbones_with_a_vit_at_another_size(tmp_path):
    ViTModel(TRUNKS["vit"]()).save_pretrained(tmp_path / "vit")
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(num_hidden_layers=4, **sizes)).save_pretrained(tmp_path / "bert")
    folders = str(tmp_path / "vit"), str(tmp_path / "bert")
    model = hf_vlp.XVLMForRetrieval.from_backbones(*folders, image_size=48, num_fusion_layers=1)
    assert model.model.vision_model(torch.randn(1, 3, 48, 48)).shape == (1, 1 + 9, 16)
    with pytest.raises(ValueError, match="num_fusion_layers"):
        hf_vlp.XVLMForRetrieval.from_backbones(*folders, num_fusion_layers=3)


# Processor


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("A man's red-hat, and/or <person>!", "a mans red hat and or person"),
        ("  two   spaces\n", "two spaces"),
        (" ".join(["word"] * 50), " ".join(["word"] * 40)),
    ],
)
def test_clean_text(text, cleaned):
    assert tiny_processor().clean_text(text) == cleaned


def test_processor_refuses_what_it_cannot_read():
    processor = tiny_processor()
    with pytest.raises(ValueError, match="no word left"):
        processor(text=["a circle", " .,!"])
    with pytest.raises(ValueError, match="both None"):
        processor()
    for box in ([5, 5, 0, 3], [5, 5, -2, 3], [30, 5, 10, 3], [-4, 0, 8, 8]):
        with pytest.raises(ValueError, match="boxes of image 1"):
            processor.encode_regions([[], [box]], [(32, 32), (32, 32)])
    with pytest.raises(ValueError, match="image_sizes"):
        processor.encode_regions([[[0, 0, 2, 2]]], [])
    with pytest.raises(ValueError, match="image_sizes"):
        processor.post_process_boxes(torch.rand(2, 4), [(3, 3)])


@given(x=pixels, y=pixels, w=st.integers(1, 96), h=st.integers(1, 96))
def test_boxes_come_back_in_pixels(x, y, w, h):
    w, h = min(w, 96 - x), min(h, 96 - y)
    processor = tiny_processor()
    regions = processor.encode_regions([[[x, y, w, h]]], [(96, 96)])
    boxes = processor.post_process_boxes(regions["target_boxes"], [(96, 96)])
    torch.testing.assert_close(
        boxes, torch.tensor([[x, y, x + w, y + h]], dtype=torch.float), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("name", ["swin", "vit"])
def test_processor_from_config(name, tmp_path):
    processor = hf_vlp.XVLMProcessor.from_config(tiny_config(name), tiny_tokenizer(), max_words=3)
    assert processor.image_processor.size == {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    assert (processor.patch_size, processor.max_words) == (16, 3)
    processor.save_pretrained(tmp_path)
    larger = hf_vlp.XVLMProcessor.from_pretrained(tmp_path, image_size=64)
    assert larger(images=[np.zeros((5, 9, 3), np.uint8)]).pixel_values.shape == (1, 3, 64, 64)
    assert larger.encode_regions([[[0, 0, 1, 1]]], [(2, 2)])["region_patch_mask"].shape == (1, 16)


def test_processor_from_a_config_that_does_not_tell():
    with pytest.raises(ValueError, match="stride"):
        hf_vlp.XVLMProcessor.from_config(tiny_config("timm"), tiny_tokenizer())
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    with pytest.raises(ValueError, match="stride"):
        hf_vlp.XVLMProcessor.from_config(hf_vlp.XVLMConfig(vision_config=resnet), tiny_tokenizer())


# Bad input to the models


def test_another_papers_folder_is_refused(tmp_path):
    tiny_albef_config().save_pretrained(tmp_path)
    for name in (hf_vlp.XVLMConfig, hf_vlp.XVLMModel):
        with pytest.raises(ValueError, match="model_type='vlp_albef'"):
            name.from_pretrained(tmp_path)


def test_albef_has_the_official_number_of_parameters():
    """Of each head at base size, counted on the official models."""
    expected = {
        hf_vlp.ALBEFForPreTraining: 209_937_725,
        hf_vlp.ALBEFForQuestionAnswering: 85_844_736 + 123_075_072 + 81_170_490,
        hf_vlp.ALBEFForVisualReasoning: 85_844_736 + 172_698_624 + 592_130,
        hf_vlp.ALBEFForVisualEntailment: 85_844_736 + 123_075_072 + 592_899,
    }
    for head, count in expected.items():
        with torch.device("meta"):
            model = head(hf_vlp.ALBEFConfig())
        assert model.num_parameters(only_trainable=True) == count
        if head is hf_vlp.ALBEFForPreTraining:
            assert model.num_parameters() == 419_873_911


def test_models_refuse_what_does_not_fit():
    from tiny import grounding_batch, pretraining_batch, region_batch, retrieval_batch

    pretraining = hf_vlp.XVLMForPreTraining(tiny_config())
    batch = region_batch()
    with pytest.raises(ValueError, match="names image 1"):
        pretraining(**{**batch, "pixel_values": batch["pixel_values"][:1]})
    with pytest.raises(ValueError, match="region_patch_mask"):
        pretraining(**{**batch, "region_patch_mask": batch["region_patch_mask"][:, :3]})
    with pytest.raises(ValueError, match="input_ids has 4 texts for 3"):
        pretraining(**{**pretraining_batch(), "pixel_values": batch["pixel_values"].repeat(2, 1, 1, 1)[:3]})
    one = {k: v[:1] for k, v in pretraining_batch().items() if not k.startswith("negative")}
    with pytest.raises(ValueError, match="at least two different images"):
        pretraining.train()(**one)
    assert pretraining.eval()(**one).loss.isfinite()  # the last row of an evaluation
    retrieval = hf_vlp.XVLMForRetrieval(tiny_config())
    with pytest.raises(ValueError, match="image_ids"):
        retrieval(**{**retrieval_batch(), "image_ids": torch.tensor([1, 2])})
    same = {**retrieval_batch(), "image_ids": torch.tensor([1] * 4)}
    with pytest.raises(ValueError, match="one and the same image"):
        retrieval(**{k: v for k, v in same.items() if not k.startswith("negative")})
    grounding = hf_vlp.XVLMForGrounding(tiny_config())
    with pytest.raises(ValueError, match="target_boxes"):
        grounding(**{**grounding_batch(), "target_boxes": torch.rand(3, 4)})
    with pytest.raises(ValueError, match="names image 5"):
        grounding(**{**grounding_batch(), "region_image_index": torch.tensor([0, 0, 1, 5])})
    with pytest.raises(ValueError, match="both None"):
        hf_vlp.XVLMModel(tiny_config())()


def test_regions_without_a_box_to_learn_are_finite():
    from tiny import region_batch

    batch = {**region_batch(), "is_full_image": torch.ones(4, dtype=torch.bool)}
    output = hf_vlp.XVLMForPreTraining(tiny_config())(**batch)
    output.loss.backward()
    assert output.loss_bbox == 0 and output.loss_giou == 0 and output.loss.isfinite()


def test_default_config_is_the_papers_base_model():
    with torch.device("meta"):
        model = hf_vlp.XVLMForPreTraining(hf_vlp.XVLMConfig())
        grounding = hf_vlp.XVLMForGrounding(hf_vlp.XVLMConfig())
    assert model.num_parameters() == 215_637_241
    assert round(grounding.num_parameters() / 1e6, 2) == 213.37
    with torch.device("meta"):
        answering = hf_vlp.XVLMForQuestionAnswering(hf_vlp.XVLMConfig())
        reasoning = hf_vlp.XVLMForVisualReasoning(hf_vlp.XVLMConfig())
    assert round(answering.num_parameters() / 1e6, 2) == 293.35
    assert round(reasoning.num_parameters() / 1e6, 2) == 262.99
    assert isinstance(model.config.vision_config, SwinConfig)

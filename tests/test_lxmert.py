"""LXMERT: what its heads do beside what all heads do, its processor, its config."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import (
    FEATURE_DIM,
    lxmert_pretraining_batch,
    region_rows,
    soft_answer_batch,
    text_batch,
    tiny_lxmert_config,
    tiny_lxmert_processor,
    visual_batch,
    visual_grounding_batch,
    visual_pair_batch,
    visual_retrieval_batch,
    visual_text_batch,
)
from torch.nn import functional as F
from transformers import BertConfig, BertForPreTraining, LxmertConfig, LxmertModel

import hf_vlp
from hf_vlp.models.layers_bert import project_together
from hf_vlp.models.regions import Regions, stack_regions
from hf_vlp.quickstart import word_tokenizer

CLOSE = {"atol": 2e-6, "rtol": 2e-5}


def loud(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


# Attention


def test_attention_maps_are_those_of_transformers(tmp_path):
    model = loud(hf_vlp.LXMERTModel(tiny_lxmert_config(x_layers=3)))
    batch = visual_text_batch()
    shared = set(LxmertConfig.__dataclass_fields__) & set(model.config.to_dict()) - {"model_type"}
    native = LxmertModel(LxmertConfig(**{name: getattr(model.config, name) for name in shared})).eval()
    native.load_state_dict(model.state_dict())
    expected = native(**batch, output_attentions=True)
    ours = model(**batch, output_attentions=True)
    for mine, theirs in (
        (ours.text_attentions[:2], expected.language_attentions),
        (ours.region_attentions[:1], expected.vision_attentions),
        (ours.text_to_region_attentions, expected.cross_encoder_attentions),
    ):
        assert len(mine) == len(theirs)
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, **CLOSE)


def test_both_directions_and_all_layers_have_maps():
    model, batch = loud(hf_vlp.LXMERTModel(tiny_lxmert_config())), visual_text_batch(padding=2)
    with torch.no_grad():
        plain, output = model(**batch), model(**batch, output_attentions=True)
    torch.testing.assert_close(output.last_hidden_state, plain.last_hidden_state, **CLOSE)
    torch.testing.assert_close(output.region_hidden_state, plain.region_hidden_state, **CLOSE)
    words, regions = batch["attention_mask"].shape[1], batch["visual_attention_mask"].shape[1]
    for maps, layers, size in (
        (output.text_attentions, 4, (words, words)),
        (output.region_attentions, 3, (regions, regions)),
        (output.text_to_region_attentions, 2, (words, regions)),
        (output.region_to_text_attentions, 2, (regions, words)),
    ):
        assert [one.shape for one in maps] == [(4, 2, *size)] * layers
        for one in maps:
            torch.testing.assert_close(one.sum(dim=-1), torch.ones(one.shape[:-1]))
    unseen = batch["visual_attention_mask"] == 0
    assert output.text_to_region_attentions[0].amax(dim=(1, 2))[unseen].max() == 0
    assert plain.text_attentions is None and model.config._attn_implementation == "sdpa"


def test_maps_of_a_head_that_reads_only_the_pooled_state():
    model, batch = loud(hf_vlp.LXMERTForQuestionAnswering(tiny_lxmert_config())), visual_text_batch()
    output = model.lxmert(**batch, output_attentions=True)
    assert output.text_attentions[-1].shape[2] == 1  # the first word alone
    assert len(output.text_to_region_attentions) == 2 and len(output.region_to_text_attentions) == 1


def test_pooled_only_gives_the_same_pooled_state():
    full = loud(hf_vlp.LXMERTModel(tiny_lxmert_config()))
    pooled = hf_vlp.LXMERTForQuestionAnswering(full.config).eval()
    result = pooled.lxmert.load_state_dict(full.state_dict(), strict=False)
    assert not result.missing_keys
    assert {name.split(".")[3] for name in result.unexpected_keys} == {
        "visn_self_att",
        "visn_inter",
        "visn_output",
    }
    batch = visual_text_batch(padding=2)
    with torch.no_grad():
        expected, ours = full(**batch), pooled.lxmert(**batch)
    torch.testing.assert_close(ours.pooler_output, expected.pooler_output, **CLOSE)
    assert ours.region_hidden_state is None


def test_project_together():
    class Adapter(torch.nn.Linear):
        def forward(self, states):
            return super().forward(states) + 1

    states, layers = torch.randn(2, 3, 8), [torch.nn.Linear(8, 8) for _ in range(2)]
    for ours, layer in zip(project_together(states, *layers), layers, strict=True):
        torch.testing.assert_close(ours, layer(states))
    adapted = Adapter(8, 8)
    ours = project_together(states, adapted, layers[0])
    torch.testing.assert_close(ours[0], adapted(states))
    torch.testing.assert_close(ours[1], layers[0](states))


@pytest.mark.parametrize("grad", [False, True])
def test_padding_that_nobody_reads_is_left_out(grad):
    for model in (
        loud(hf_vlp.LXMERTModel(tiny_lxmert_config())),
        loud(hf_vlp.LXMERTForRetrieval(tiny_lxmert_config())).lxmert,  # reads the pooled state only
    ):
        batch, rows = visual_text_batch(padding=3), []
        model.encoder.layer[0].register_forward_hook(lambda m, i, out, rows=rows: rows.append(len(out)))
        with torch.set_grad_enabled(grad):
            ours = model(**batch, keep_padding=False)
            model.pooled_only = False
            expected = model(**batch)
        torch.testing.assert_close(ours.pooler_output, expected.pooler_output, **CLOSE)
        if ours.region_hidden_state is not None:
            torch.testing.assert_close(ours.region_hidden_state, expected.region_hidden_state, **CLOSE)
            words = batch["attention_mask"].bool()
            torch.testing.assert_close(
                ours.last_hidden_state[words], expected.last_hidden_state[words], **CLOSE
            )
        assert rows == [1, 4]


def test_adapters_count_in_every_attention():
    """What is added to keys and values is not passed over where the first word reads alone."""

    class Adapter(torch.nn.Linear):
        def forward(self, states):
            return super().forward(states) + states.flip(-1)

    model, batch = loud(hf_vlp.LXMERTForQuestionAnswering(tiny_lxmert_config())), visual_text_batch(padding=2)
    for layer in model.lxmert.encoder.x_layers:
        for attention in (layer.visual_attention.att, layer.lang_self_att.self):
            for name in ("query", "key", "value"):
                adapter = Adapter(16, 16)
                adapter.load_state_dict(getattr(attention, name).state_dict())
                setattr(attention, name, adapter)
    expected = model(**batch).logits
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected, **CLOSE)


def test_images_of_texts():
    """Regions are encoded once for all texts of their image."""
    model = loud(hf_vlp.LXMERTModel(tiny_lxmert_config()))
    visual, texts, index = visual_batch(2), text_batch(4), torch.tensor([0, 1, 1, 0])
    seen = []
    model.encoder.r_layers[0].register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    ours = model(**visual, **texts, image_index=index)
    expected = model(**{name: value[index] for name, value in visual.items()}, **texts)
    torch.testing.assert_close(ours.pooler_output, expected.pooler_output, **CLOSE)
    assert seen == [2, 4]


# Pretraining


def test_region_losses_by_hand():
    """The official losses count every region, weighed by how sure the detector was; features masked ones."""
    model, batch = loud(hf_vlp.LXMERTForPreTraining(tiny_lxmert_config())), lxmert_pretraining_batch()
    labels = {
        name for name in batch if "visual" not in name and name not in ("mlm_input_ids", "attention_mask")
    }
    with torch.no_grad():
        output = model(**batch)
        raw = model(**{name: value for name, value in batch.items() if name not in labels})
    total = {"object": 0.0, "attribute": 0.0, "feature": 0.0}
    there, masked = batch["visual_attention_mask"].bool(), batch["region_mask"]
    for row, region in there.nonzero().tolist():
        for name, logits in (("object", raw.object_logits), ("attribute", raw.attribute_logits)):
            loss = F.cross_entropy(logits[row, region], batch[f"{name}_ids"][row, region])
            total[name] += batch[f"{name}_scores"][row, region] * loss
        if masked[row, region]:
            total["feature"] += F.smooth_l1_loss(
                raw.pred_feats[row, region], batch["target_feats"][row, region]
            )
    for name, value in total.items():
        torch.testing.assert_close(output[f"loss_{name}"], value / there.sum() / 0.15)
    terms = [value for name, value in output.items() if name.startswith("loss_")]
    torch.testing.assert_close(output.loss, sum(terms))
    assert len(terms) == 6


def test_masked_variant_counts_masked_regions_only():
    batch = lxmert_pretraining_batch()
    model = loud(hf_vlp.LXMERTForPreTraining(tiny_lxmert_config(mask_region_labels=True)))
    official = model(**batch | {"object_scores": batch["object_scores"] * batch["region_mask"]})
    model.config.mask_region_labels = False
    masked = model(**batch | {"object_scores": batch["object_scores"] * batch["region_mask"]})
    torch.testing.assert_close(official.loss_object, masked.loss_object)
    assert not torch.isclose(official.loss_attribute, masked.loss_attribute)
    assert len(official.object_logits) == batch["region_mask"].sum() < len(masked.object_logits)


def test_no_answer_costs_nothing():
    batch = lxmert_pretraining_batch()
    batch["answer_labels"].fill_(-100)
    batch["mlm_labels"].fill_(-100)
    batch["region_mask"].fill_(False)
    model = loud(hf_vlp.LXMERTForPreTraining(tiny_lxmert_config(mask_region_labels=True)))
    output = model(**batch)
    for name in ("answer", "mlm", "object", "attribute", "feature"):
        assert output[f"loss_{name}"] == 0, name
    output.loss.backward()
    gradients = [p.grad for p in model.answer_head.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_weights_of_the_terms():
    batch = lxmert_pretraining_batch()
    model = loud(hf_vlp.LXMERTForPreTraining(tiny_lxmert_config(mlm_weight=0.5, answer_weight=3)))
    output = model(**batch)
    expected = sum(value for name, value in output.items() if name.startswith("loss_"))
    expected = expected - 0.5 * output.loss_mlm + 2 * output.loss_answer
    torch.testing.assert_close(output.loss, expected)
    model.answer_weight = 0  # a schedule
    torch.testing.assert_close(model(**batch).loss, expected - 3 * output.loss_answer)


def test_losses_only_where_there_are_labels():
    model, batch = hf_vlp.LXMERTForPreTraining(tiny_lxmert_config()).eval(), lxmert_pretraining_batch()
    for name in ("object_ids", "target_feats", "answer_labels"):
        del batch[name]
    output = model(**batch)
    assert output.loss_object is output.loss_feature is output.loss_answer is None
    torch.testing.assert_close(output.loss, output.loss_mlm + output.loss_itm + output.loss_attribute)
    del batch["region_mask"]
    with pytest.raises(ValueError, match="region_mask is None"):
        model(**batch)
    with pytest.raises(ValueError, match="both None"):
        model(**visual_batch(2))


def test_official_padding_idx():
    """[CLS]'s position and the token type stay without gradient if asked for."""
    batch = lxmert_pretraining_batch()
    for official in (False, True):
        model = hf_vlp.LXMERTForPreTraining(tiny_lxmert_config(official_padding_idx=official))
        model(**batch).loss.backward()
        embeddings = model.lxmert.embeddings
        assert embeddings.position_embeddings.weight.grad[0].any() != official
        assert embeddings.token_type_embeddings.weight.grad[0].any() != official
        assert embeddings.position_embeddings.weight.grad[1].any()


def test_resizing_the_vocabulary():
    model = loud(hf_vlp.LXMERTForPreTraining(tiny_lxmert_config()))
    with torch.no_grad():
        model.cls["predictions"].bias.normal_()
    before = model(**visual_text_batch()).mlm_logits
    model.resize_token_embeddings(43, pad_to_multiple_of=8)
    after = model(**visual_text_batch()).mlm_logits
    assert after.shape[-1] == 48 == model.config.vocab_size
    torch.testing.assert_close(after[..., :40], before)


def test_from_bert(tmp_path):
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
    )
    bert = BertForPreTraining(config)
    bert.save_pretrained(tmp_path)
    sizes = {"l_layers": 2, "r_layers": 1, "x_layers": 1, "visual_feat_dim": FEATURE_DIM}
    model = hf_vlp.LXMERTForPreTraining.from_bert(str(tmp_path), **sizes)
    expected, ours = bert.state_dict(), model.state_dict()
    taken = {name for name in expected if not name.startswith(("bert.encoder.layer.2", "cls.predictions.d"))}
    for name in taken - {"cls.predictions.bias"}:
        assert torch.equal(ours[name.replace("bert.", "lxmert.")], expected[name]), name
    assert torch.equal(ours["cls.predictions.bias"], expected["cls.predictions.bias"])
    assert model.config.num_labels == 3 and model.config.l_layers == 2
    assert {name.split(".")[0] for name in model.new_parameters} == {
        "lxmert",
        "obj_predict_head",
        "answer_head",
    }
    assert all(
        "layer." not in name or "r_layers" in name or "x_layers" in name for name in model.new_parameters
    )
    head = hf_vlp.LXMERTForQuestionAnswering.from_bert(str(tmp_path), **sizes)
    assert "lxmert.pooler.dense.weight" not in head.new_parameters
    with pytest.raises(ValueError, match="l_layers=9"):
        hf_vlp.LXMERTModel.from_bert(str(tmp_path))


# Answers


def test_soft_labels_and_classes():
    model, batch = loud(hf_vlp.LXMERTForQuestionAnswering(tiny_lxmert_config())), soft_answer_batch()
    output = model(**batch)
    by_hand = F.binary_cross_entropy_with_logits(output.logits, batch["labels"]) * 6
    torch.testing.assert_close(output.loss, by_hand)
    classes = torch.tensor([0, 5, -100, 2])
    torch.testing.assert_close(
        model(**batch | {"labels": classes}).loss, F.cross_entropy(output.logits, classes)
    )
    with pytest.raises(ValueError, match="labels is"):
        model(**batch | {"labels": batch["labels"][:, :3]})


def test_rank_answers():
    model, batch = loud(hf_vlp.LXMERTForQuestionAnswering(tiny_lxmert_config())), visual_text_batch()
    ranked, logits = model.rank_answers(**batch, top_k=9), model(**batch).logits
    assert ranked.indices.shape == (4, 6)
    torch.testing.assert_close(ranked.probabilities, logits.sigmoid().sort(dim=1, descending=True).values)
    torch.testing.assert_close(logits.gather(1, ranked.indices).sigmoid(), ranked.probabilities)
    with pytest.raises(ValueError, match="top_k"):
        model.rank_answers(**batch, top_k=0)


# Other tasks


def test_a_pair_encodes_its_sentence_once():
    model, batch = loud(hf_vlp.LXMERTForVisualReasoning(tiny_lxmert_config())), visual_pair_batch(padding=1)
    seen = []
    model.lxmert.encoder.layer[0].register_forward_hook(lambda m, i, output: seen.append(output.shape[:2]))
    logits = model(**batch).logits
    assert seen == [(1, batch["attention_mask"].sum())]  # and no padding at all
    texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    visual = {name: value for name, value in batch.items() if name.startswith("visual")}
    pooled = [model.lxmert(**{n: v[:, i] for n, v in visual.items()}, **texts).pooler_output for i in (0, 1)]
    torch.testing.assert_close(logits, model.cls_head(torch.cat(pooled, dim=1)), **CLOSE)
    with pytest.raises(ValueError, match="two images"):
        model(**visual_text_batch())


@pytest.mark.parametrize("pairs_per_call", [1, 5, 100])
def test_score_pairs(pairs_per_call):
    model = loud(hf_vlp.LXMERTForRetrieval(tiny_lxmert_config()))
    visual, texts = visual_batch(3), text_batch(4)
    words = model.get_text_features(**texts).last_hidden_state
    regions = model.get_image_features(**visual).last_hidden_state
    scores = model.score_pairs(
        words, texts["attention_mask"], regions, visual["visual_attention_mask"], pairs_per_call
    )
    for image in range(3):
        one = {name: value[[image] * 4] for name, value in visual.items()}
        pooled = model.lxmert(**one, **texts).pooler_output
        expected = model.cls["seq_relationship"](pooled).softmax(dim=1)[:, 1]
        torch.testing.assert_close(scores[image].sigmoid(), expected, **CLOSE)


def test_negatives_are_of_other_images():
    model, batch = hf_vlp.LXMERTForRetrieval(tiny_lxmert_config()), visual_retrieval_batch()
    del batch["negative_image_index"], batch["negative_text_index"]
    batch["image_ids"] = torch.tensor([0, 0, 0, 1])
    chosen = []
    model.match = lambda *inputs: chosen.append(inputs) or torch.zeros(12, 2)
    model(**batch)
    words, _, regions, _ = chosen[0]
    assert all(torch.equal(regions[4 + row], regions[3]) for row in range(3))
    assert all(torch.equal(words[8 + row], words[3]) for row in range(3))
    with pytest.raises(ValueError, match="no negatives"):
        model(**batch | {"image_ids": torch.zeros(4, dtype=torch.long)})


def test_retrieval_starts_with_the_matching_head_of_pretraining(tmp_path):
    model = hf_vlp.LXMERTForPreTraining(tiny_lxmert_config())
    model.save_pretrained(tmp_path)
    head = hf_vlp.LXMERTForRetrieval.from_pretrained(tmp_path)
    assert not head.new_parameters
    assert torch.equal(head.cls["seq_relationship"].weight, model.cls["seq_relationship"].weight)


def test_grounding_targets():
    """Every region that overlaps the box by half is right, and the best one where none does."""
    model, batch = loud(hf_vlp.LXMERTForGrounding(tiny_lxmert_config())), visual_grounding_batch(padding=2)
    batch["target_boxes"][0] = torch.tensor([0.5, 0.5, 0.1, 0.1])  # a tenth of a corner of each
    batch["target_boxes"][0, :2] += 0.01  # the last cell most
    output = model(**batch)
    logits = output.region_logits.log_softmax(dim=1)
    expected = -(logits[0, 3] + logits[1, 1] + logits[2, 2] + logits[3, 3]) / 4
    torch.testing.assert_close(output.loss_region, expected)
    assert output.region_logits[:, 4:].max() < -1e30  # padding is never chosen
    torch.testing.assert_close(output.loss, output.loss_region + output.loss_bbox + output.loss_giou)


def test_refined_boxes_keep_a_size():
    model, batch = hf_vlp.LXMERTForGrounding(tiny_lxmert_config()).eval(), visual_grounding_batch()
    model.region_head.shift.weight.data.zero_()
    boxes = []
    for bias in ([0.0, 0, 0, 0], [0.5, 0, -9, 0.0]):
        model.region_head.shift.bias.data.copy_(torch.tensor(bias))
        boxes.append(model(**batch).pred_boxes)
    cells = {(0.25, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75)}
    assert {tuple(box[:2]) for box in boxes[0].tolist()} <= cells and (boxes[0][:, 2:] == 0.5).all()
    torch.testing.assert_close(boxes[1][:, 0], boxes[0][:, 0] + 0.25)
    assert (boxes[1][:, 2] > 0).all() and (boxes[1][:, 2] < 0.01).all() and (boxes[1][:, 3] == 0.5).all()


def test_wrong_shapes_are_named():
    model = hf_vlp.LXMERTModel(tiny_lxmert_config()).eval()
    batch = visual_text_batch()
    for change, match in (
        ({"visual_feats": batch["visual_feats"][..., 1:]}, "visual_feats is"),
        ({"visual_pos": batch["visual_pos"][..., :2]}, "visual_pos is"),
        ({"visual_attention_mask": batch["visual_attention_mask"][:, 1:]}, "visual_attention_mask is"),
        ({"image_index": torch.tensor([0, 1, 2, 4])}, "names image 4"),
        (text_batch(3), "3 texts for 4"),
    ):
        with pytest.raises(ValueError, match=match):
            model(**batch | change)
    with pytest.raises(ValueError, match="LXMERT reads regions"):
        model.set_image_size(384)


# Config and processor


def test_config_of_transformers(tmp_path):
    LxmertConfig(hidden_size=48, num_attention_heads=4, num_qa_labels=3, x_layers=2).save_pretrained(tmp_path)
    config = hf_vlp.LXMERTConfig.from_pretrained(tmp_path)
    assert (config.hidden_size, config.num_qa_labels, config.x_layers) == (48, 3, 2)
    assert config.visual_loss_normalizer == 1 / 0.15 and config.pad_token_id == 0 and config.num_labels == 3
    with pytest.raises(ValueError, match="model_type='bert'"):
        hf_vlp.LXMERTConfig.from_dict({"model_type": "bert"})
    for fields in ({"hidden_size": 50}, {"x_layers": 0}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            hf_vlp.LXMERTConfig(**fields)


class OneBox:
    """Finds the whole image, whose feature is its mean colour four times."""

    feature_dim, fits_released_weights, spec = FEATURE_DIM, False, "one-box"

    def extract(self, images):
        rows = []
        for image in images:
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).float().mean(dim=(0, 1)) / 255
            size = (image.height, image.width)
            rows.append({"features": pixels.repeat(4)[None], "boxes": [[0, 0, 1, 1]], "image_size": size})
        return stack_regions(rows)


def test_processor(tmp_path):
    processor = tiny_lxmert_processor(OneBox())
    batch = processor(images=[Image.new("RGB", (4, 3), "red")], text=["a Red circle ", "a"])
    assert batch.input_ids.tolist() == [[2, 5, 8, 12, 3], [2, 5, 3, 0, 0]]
    assert batch.attention_mask.sum(dim=1).tolist() == [5, 3]
    torch.testing.assert_close(batch.visual_feats[0, 0], torch.tensor([1.0, 0, 0]).repeat(4))
    assert batch.visual_pos.tolist() == [[[0, 0, 1, 1]]] and batch.visual_attention_mask.tolist() == [[1]]
    assert processor(text=" ".join(["red"] * 30)).input_ids.shape == (1, 20)
    processor.save_pretrained(tmp_path)
    loaded = hf_vlp.LXMERTProcessor.from_pretrained(tmp_path)
    assert loaded.extractor == "one-box" and loaded.max_tokens == 20
    assert processor.region_extractor is not None
    loaded = hf_vlp.LXMERTProcessor.from_pretrained(tmp_path, extractor=OneBox())
    assert loaded(images=Image.new("RGB", (4, 3))).visual_feats.shape == (1, 1, FEATURE_DIM)
    loaded.save_pretrained(tmp_path / "again")
    assert hf_vlp.LXMERTProcessor.from_pretrained(tmp_path / "again").extractor == "one-box"
    processor.extractor = None
    with pytest.raises(ValueError, match="extractor is None"):
        processor.region_extractor  # noqa: B018


def test_texts_are_framed_whatever_the_tokenizer():
    """Also where the tokenizer itself puts nothing around a text."""
    processor = hf_vlp.LXMERTProcessor(word_tokenizer(["a", "red", "circle"]))
    assert processor(text=["a red circle"]).input_ids.tolist() == [[2, 5, 6, 7, 3]]


def test_processor_takes_regions():
    processor, rows = tiny_lxmert_processor(), region_rows(2)
    batch = processor(regions=rows)
    assert batch.visual_attention_mask.sum(dim=1).tolist() == [5, 4]
    for one in (processor(regions=rows[1]), processor(regions=stack_regions(rows[1:]))):
        torch.testing.assert_close(one.visual_feats[0], rows[1]["features"])
    boxes = processor.encode_regions([[[10, 5, 20, 10]]], [(20, 40)])["target_boxes"]
    torch.testing.assert_close(boxes, torch.tensor([[0.5, 0.5, 0.5, 0.5]]))
    pixels = processor.post_process_boxes(boxes, [(20, 40)])
    torch.testing.assert_close(pixels, torch.tensor([[10.0, 5, 30, 15]]))


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        ({}, "all None"),
        ({"text": " "}, "no word"),
        ({"images": Image.new("RGB", (4, 3))}, "extractor is None"),
        ({"images": Image.new("RGB", (4, 3)), "regions": region_rows(1)}, "both given"),
        ({"regions": []}, "rows is empty"),
    ],
)
def test_processor_refuses(inputs, match):
    with pytest.raises(ValueError, match=match):
        tiny_lxmert_processor()(**inputs)


def test_regions_come_back_as_they_were():
    rows = region_rows(3)
    batch = stack_regions(rows)
    assert isinstance(batch, Regions) and batch.features.shape == (3, 5, FEATURE_DIM)
    for index, row in enumerate(rows):
        back = batch.row(index)
        assert back.keys() == row.keys()
        assert all(torch.equal(back[name], value) for name, value in row.items())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"features": torch.zeros(5, 3)}, "features of shape"),
        ({"features": torch.zeros(0, FEATURE_DIM), "boxes": torch.zeros(0, 4)}, "features of shape"),
        ({"boxes": torch.zeros(4, 4)}, "one box"),
        ({"boxes": torch.tensor([[0, 0, 1.1, 1]] * 5)}, "outside 0..1"),
        ({"boxes": torch.tensor([[0.5, 0, 0.4, 1]] * 5)}, "outside 0..1"),
        ({"boxes": torch.full((5, 4), torch.nan)}, "outside 0..1"),
        ({"object_ids": torch.zeros(3)}, "object_ids of shape"),
    ],
)
def test_stack_regions_refuses(change, match):
    rows = region_rows(3)
    rows[1] = rows[1] | change
    with pytest.raises(ValueError, match=match):
        stack_regions(rows)

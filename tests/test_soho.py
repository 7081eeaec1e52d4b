"""SOHO: its dictionary, what is frozen, masked cells, and what its heads do beside what all heads do."""

import pytest
import torch
import torch.nn.functional as F
from tiny import (
    canvas_answer_batch,
    canvas_batch,
    canvas_pair_batch,
    canvas_retrieval_batch,
    canvas_text_batch,
    soho_pretraining_batch,
    text_batch,
    tiny_soho_config,
)
from transformers import BertConfig, BertModel, ResNetModel

import hf_vlp
from hf_vlp.models.modeling_soho import VisualDictionary, sine_positions

CLOSE = {"atol": 2e-6, "rtol": 2e-5}


def loud(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def new_dictionary(**fields) -> VisualDictionary:
    dictionary = VisualDictionary(tiny_soho_config(**fields))
    dictionary.reset()
    return dictionary


# The dictionary


def one_hot_update(dictionary: VisualDictionary, cells: torch.Tensor, copies: int = 1):
    """The official way, by products with one-hot rows."""
    nearest = torch.cdist(cells, dictionary.embeddings).argmin(dim=1)
    chosen = F.one_hot(nearest, len(dictionary.embeddings)).float()  # (M, K)
    count = dictionary.decay * dictionary.ema_count + (1 - dictionary.decay) * copies * chosen.sum(dim=0)
    total = dictionary.decay * dictionary.ema_sum + (1 - dictionary.decay) * copies * chosen.T @ cells
    smoothed = (count + dictionary.eps) / (count.sum() + len(count) * dictionary.eps) * count.sum()
    return nearest, count, total, total / smoothed[:, None]


@pytest.mark.parametrize("copies", [1, 4])
@pytest.mark.parametrize("starts", [False, True])
def test_the_dictionary_follows_as_by_one_hot_products(copies, starts):
    dictionary = new_dictionary(vd_start_from_entries=starts).train()
    for step in range(3):
        cells = torch.randn(2, 5, 16) + step
        nearest, count, total, embeddings = one_hot_update(dictionary, cells.flatten(0, 1), copies)
        looked_up, entries = dictionary(cells, copies=copies)
        assert torch.equal(entries.flatten(), nearest)
        torch.testing.assert_close(dictionary.ema_count, count)
        torch.testing.assert_close(dictionary.ema_sum, total)
        torch.testing.assert_close(dictionary.embeddings, embeddings)
        torch.testing.assert_close(looked_up.flatten(0, 1), embeddings[nearest])
    assert dictionary.usage.sum() == 3 * 10 * copies


def test_entries_that_nothing_used():
    """The official start loses them in the first step, `vd_start_from_entries` keeps them where they were."""
    for starts, lost in ((False, True), (True, False)):
        dictionary = new_dictionary(vd_start_from_entries=starts).train()
        before = dictionary.embeddings.clone()
        _, entries = dictionary(before[:1, None] + 0.01)
        unused = torch.arange(len(before)) != int(entries)
        assert (dictionary.embeddings[unused] == 0).all() == lost
        if not lost:
            torch.testing.assert_close(dictionary.embeddings[unused], before[unused], atol=1e-3, rtol=1e-3)


def test_the_dictionary_can_start_from_the_first_batch():
    dictionary = new_dictionary(vd_revive_below=0.01).train()
    cells = torch.randn(4, 10, 16)
    dictionary(cells)
    used = dictionary.usage > 0
    distances = torch.cdist(dictionary.embeddings[~used], cells.flatten(0, 1)).min(dim=1)
    assert (distances.values < 1e-3).all()  # those that nothing was near to are cells now
    assert len(distances.indices.unique()) == (~used).sum()  # different ones
    dictionary(cells)
    assert (dictionary.usage > 0).all()


def test_only_entries_that_faded_are_revived():
    dictionary = new_dictionary(vd_revive_below=0.3, vd_start_from_entries=True, vd_decay=0.5).train()
    start = dictionary.embeddings.clone()
    cell = start[:1, None] + 0.01
    dictionary(cell)  # the averages of the others: 0.5
    torch.testing.assert_close(dictionary.embeddings[1:], start[1:], atol=1e-3, rtol=1e-3)
    dictionary(cell)  # 0.25
    torch.testing.assert_close(dictionary.embeddings[1:], cell[0].expand_as(start[1:]))
    assert (dictionary.ema_count[1:] == 1).all()
    with pytest.raises(ValueError, match="vd_revive_below is -1"):
        tiny_soho_config(vd_revive_below=-1)


def test_evaluation_moves_nothing_and_gradients_go_straight_through():
    dictionary = new_dictionary().eval()
    before = {name: value.clone() for name, value in dictionary.state_dict().items()}
    cells = torch.randn(1, 4, 16, requires_grad=True)
    looked_up, entries = dictionary(cells)
    torch.testing.assert_close(looked_up[0], dictionary.embeddings[entries[0]])
    gradient = torch.randn_like(looked_up)
    looked_up.backward(gradient)
    assert torch.equal(cells.grad, gradient)
    assert all(torch.equal(value, before[name]) for name, value in dictionary.state_dict().items())


def test_of_equally_near_entries_the_first():
    dictionary = new_dictionary()
    dictionary.embeddings[4] = dictionary.embeddings[2]
    assert dictionary.nearest(dictionary.embeddings[4:5]).tolist() == [2]


@pytest.mark.parametrize("on_padding", [True, False])
def test_padding_moves_entries_only_if_asked_to(on_padding):
    config = tiny_soho_config(vd_update_on_padding=on_padding, padding_mask_mode="exact")
    model, batch = hf_vlp.SOHOModel(config).train(), canvas_batch(2)
    batch["pixel_mask"][1, :, 40:] = False
    images = model.get_image_features(**batch)
    assert images.mask.sum() == 6  # the second image has one of two columns
    assert model.visual_dictionary.usage.sum() == (8 if on_padding else 6)


@pytest.mark.parametrize("fusion", ["gate", "add", "vd_only", "none"])
def test_every_fusion_reads(fusion):
    config = tiny_soho_config(visual_fusion=fusion)
    model = loud(hf_vlp.SOHOForPreTraining(config))
    output = model(**soho_pretraining_batch())
    output.loss.backward()
    assert (output.loss_mvm is None) == (fusion == "none")
    assert hasattr(model.model.visual_dictionary, "usage") == (fusion != "none")


# What is frozen


def test_frozen_stages_stay_as_they_are(tmp_path):
    model = hf_vlp.SOHOForQuestionAnswering(tiny_soho_config())
    model.save_pretrained(tmp_path)
    for one in (model, hf_vlp.SOHOForQuestionAnswering.from_pretrained(tmp_path)):
        backbone = one.train().model.backbone
        frozen = {name for name, p in one.named_parameters() if not p.requires_grad}
        assert frozen == {
            f"model.backbone.{name}"
            for name, _ in backbone.named_parameters()
            if name.startswith(("embedder.", "encoder.stages.0."))
        }
        assert not backbone.embedder.training and not backbone.encoder.stages[0].training
        assert backbone.encoder.stages[1].training
    free = hf_vlp.SOHOModel(tiny_soho_config(frozen_stages=-1, backbone_norm_eval=True)).train()
    assert all(p.requires_grad for p in free.parameters()) and not free.backbone.training
    with pytest.raises(ValueError, match="use -1"):
        hf_vlp.SOHOModel(tiny_soho_config("timm", frozen_stages=1))


def test_from_backbones(tmp_path):
    trunk = ResNetModel(tiny_soho_config().backbone_config)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 40}
    bert = BertModel(BertConfig(num_hidden_layers=3, **sizes))
    for name, model in (("trunk", trunk), ("bert", bert)):
        model.save_pretrained(tmp_path / name)
    folders = (str(tmp_path / "trunk"), str(tmp_path / "bert"))
    model = hf_vlp.SOHOForPreTraining.from_backbones(*folders, num_hidden_layers=2, vd_size=6)
    for name, value in trunk.state_dict().items():
        assert torch.equal(model.state_dict()[f"model.backbone.{name}"], value)
    for name in ("embeddings.word_embeddings.weight", "encoder.layer.1.output.dense.weight"):
        ours = name.removeprefix("encoder.").replace("embeddings.", "text_embeddings.", 1)
        assert torch.equal(model.state_dict()[f"model.{ours}"], bert.state_dict()[name])
    assert not any(name.startswith(("model.backbone", "model.layer")) for name in model.new_parameters)
    assert "itm_head.weight" in model.new_parameters
    assert not model.model.backbone.embedder.embedder.convolution.weight.requires_grad
    with pytest.raises(ValueError, match="num_hidden_layers=4"):
        hf_vlp.SOHOModel.from_backbones(*folders, num_hidden_layers=4)


# Masked cells


def test_cells_are_masked_by_their_entry():
    model, batch = loud(hf_vlp.SOHOForPreTraining(tiny_soho_config())), canvas_text_batch()
    images = model.model.get_image_features(batch["pixel_values"], batch["pixel_mask"])
    images.entries[:] = torch.tensor([[1, 2, 1, 3], [2, 2, 2, 2], [0, 1, 2, 3], [5, 5, 4, 5]])
    images.mask[3, 1, 1] = False  # the last cell is padding
    labels = model.mask_cells(images, torch.tensor([0, 3, -1, 0]))
    assert labels.tolist() == [[1, -100, 1, -100], [2, 2, 2, 2], [-100] * 4, [5, 5, -100, -100]]
    masked = (images.states == model.visual_mask_embedding).all(dim=-1)
    assert torch.equal(masked, labels != -100)


def test_nothing_is_masked_in_evaluation_unless_asked_for():
    model, batch = loud(hf_vlp.SOHOForPreTraining(tiny_soho_config(mvm_prob=1.0))), soho_pretraining_batch()
    assert (model(**batch).mvm_labels != -100).any()
    del batch["mvm_cells"]
    assert model(**batch).mvm_labels is None
    labels = model.train()(**batch).mvm_labels
    assert (labels != -100).any()
    model.config.mvm_prob = 0.0
    output = model(**batch)
    assert (output.mvm_labels == -100).all() and output.loss_mvm == 0


def test_every_entry_of_an_image_is_picked_equally_often():
    model = hf_vlp.SOHOForPreTraining(tiny_soho_config(mvm_pick="entry", mvm_prob=1.0, vd_size=6))
    entries = torch.tensor([[1, 1, 1, 1, 5, 3, -100, -100]]).expand(3000, -1)  # the last ones are padding
    cells = model._pick_cells(entries)
    picked = entries.gather(1, cells[:, None]).flatten().bincount(minlength=6)
    assert picked[[0, 2, 4]].sum() == 0
    assert (picked[[1, 3, 5]] - 1000).abs().max() < 130  # five standard deviations
    model.config.mvm_prob = 0.25
    assert (model._pick_cells(entries) >= 0).float().mean() == pytest.approx(0.25, abs=0.04)
    model.config.mvm_pick, model.config.mvm_prob = "location", 1.0
    assert len(model._pick_cells(entries).unique()) == 1


def test_cells_beside_texts_of_other_images_are_masked_but_not_to_be_found():
    """Otherwise a mask would tell which texts belong."""
    config, batch = tiny_soho_config(mvm_on_mismatched=False), soho_pretraining_batch()
    model = loud(hf_vlp.SOHOForPreTraining(config))
    batch["mvm_cells"] = torch.ones(4, dtype=torch.long)
    found = model(**batch)
    assert ((found.mvm_labels != -100).any(dim=1) == batch["itm_labels"].bool()).all()
    config.mvm_on_mismatched = True
    everywhere = model(**batch)
    assert (everywhere.mvm_labels != -100).any(dim=1).all()
    torch.testing.assert_close(found.itm_logits, everywhere.itm_logits)


def test_texts_of_an_image_share_its_tokens():
    """The trunk runs once per image, and the dictionary counts its cells once per text."""
    model, batch = hf_vlp.SOHOForPreTraining(tiny_soho_config()).train(), soho_pretraining_batch()
    seen = []
    model.model.backbone.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    model(**batch)
    assert seen == [2] and model.model.visual_dictionary.usage.sum() == 2 * 4 * 2
    with pytest.raises(ValueError, match="3 texts for 2"):
        model(**batch | {"mlm_input_ids": batch["mlm_input_ids"][:3]})


def test_positions():
    """Anchors of the specification: a full map of 9 x 12 cells."""
    encoded = sine_positions(torch.ones(1, 9, 12, dtype=torch.bool), 768)[0]
    anchors = torch.tensor([0.642788, 0.766044, 0.617399, 0.786650])
    torch.testing.assert_close(encoded[0, 0, :4], anchors, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        encoded[0, 0, 384:387], torch.tensor([0.5, 0.866025, 0.478613]), atol=1e-5, rtol=0
    )
    assert encoded.sum().item() == pytest.approx(41029.789, abs=0.5)


# Tasks


def test_reasoning_reads_both_images():
    model, batch = loud(hf_vlp.SOHOForVisualReasoning(tiny_soho_config())), canvas_pair_batch()
    first = [
        model.model(
            batch["pixel_values"][:, i],
            batch["input_ids"],
            batch["attention_mask"],
            batch["pixel_mask"][:, i],
        ).last_hidden_state[:, 0]
        for i in (0, 1)
    ]
    expected = model.cls_head(torch.cat(first, dim=1))
    torch.testing.assert_close(model(**batch).logits, expected, **CLOSE)
    with pytest.raises(ValueError, match="two images"):
        model(**canvas_text_batch())


def test_rank_answers():
    model, batch = loud(hf_vlp.SOHOForQuestionAnswering(tiny_soho_config())), canvas_answer_batch()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    ranked, logits = model.rank_answers(**inputs, top_k=3), model(**inputs).logits
    torch.testing.assert_close(ranked.probabilities, logits.sigmoid().topk(3, dim=1).values)
    with pytest.raises(ValueError, match="top_k"):
        model.rank_answers(**inputs, top_k=0)


@pytest.mark.parametrize("pairs_per_call", [1, 5, 100])
def test_score_pairs(pairs_per_call):
    model, texts = loud(hf_vlp.SOHOForRetrieval(tiny_soho_config())), text_batch(4)
    images = model.get_image_features(**canvas_batch(3))
    scores = model.score_pairs(*texts.values(), images, pairs_per_call)
    for image in range(3):
        logits = model.match(*texts.values(), images.select(torch.full((4,), image)))
        torch.testing.assert_close(scores[image], logits[:, 1] - logits[:, 0], **CLOSE)


def test_heatmaps_lie_on_the_image():
    model, batch = (
        loud(hf_vlp.SOHOForRetrieval(tiny_soho_config(padding_mask_mode="exact"))),
        canvas_text_batch(),
    )
    batch["pixel_mask"][-1, :, 40:] = False
    maps = model.heatmaps(
        batch["pixel_values"], batch["input_ids"], batch["attention_mask"], batch["pixel_mask"]
    )
    assert maps.shape == (4, 2, 2) and (maps >= 0).all() and maps.any()
    assert not maps[-1, :, 1].any()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_negatives_are_of_other_images():
    model, batch = hf_vlp.SOHOForRetrieval(tiny_soho_config()).eval(), canvas_retrieval_batch()
    del batch["negative_image_index"], batch["negative_text_index"]
    batch["image_ids"] = torch.tensor([0, 0, 0, 1])
    assert model(**batch).itm_logits.shape == (12, 2)
    with pytest.raises(ValueError, match="no negatives"):
        model(**batch | {"image_ids": torch.zeros(4, dtype=torch.long)})


def test_config():
    paper = hf_vlp.SOHOConfig.paper()
    assert paper.num_hidden_layers == 12 and paper.backbone_config.depths == [3, 4, 23, 3]
    assert paper.padding_mask_mode == "exact" and hf_vlp.SOHOConfig().padding_mask_mode == "square_legacy"
    for fields, match in (
        ({"visual_fusion": "sum"}, "visual_fusion"),
        ({"padding_mask_mode": "none"}, "padding_mask_mode"),
        ({"mvm_prob": 2.0}, "mvm_prob"),
        ({"hidden_size": 50}, "hidden_size"),
        ({"answers": ["a"]}, "one string for each class"),
    ):
        with pytest.raises(ValueError, match=match):
            hf_vlp.SOHOConfig(**fields)

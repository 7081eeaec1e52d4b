"""SOHO against reference values of the official code, through the shipped converter."""

from pathlib import Path

import pytest
import torch
from parity_cases import HIDDEN, LOGITS, check_gradients, check_trajectory, load_case

from hf_vlp.conversion.soho import convert_state_dict
from hf_vlp.models.modeling_soho import cell_mask

AFTER = {"atol": 1e-6, "rtol": 0}
CASES = ["soho_pretrain_gate", "soho_pretrain_add"]


@pytest.fixture
def case(request):
    folder = Path(request.config.getoption("--parity-dir"))

    def load(name: str):
        loaded = load_case(folder / name, convert_state_dict)
        for module in loaded.model.modules():  # training mode without dropout, as the references have it
            module.p = 0.0 if isinstance(module, torch.nn.Dropout) else getattr(module, "p", None)
        loaded.model.config.attention_probs_dropout_prob = 0.0
        loaded.model.config.frozen_stages = loaded.meta["frozen_stages"]
        return loaded

    return load


def _images(inputs) -> dict[str, torch.Tensor]:
    return {"pixel_values": inputs["pixel_values"], "pixel_mask": inputs["pixel_mask"].bool()}


def _pretraining(case) -> dict[str, torch.Tensor]:
    inputs = case.inputs
    return {
        **_images(inputs),
        "mlm_input_ids": inputs["masked_input_ids"],
        "attention_mask": inputs["attention_mask"],
        "mlm_labels": inputs["mlm_labels"],
        "itm_labels": inputs["matched_label"],
        "mvm_cells": torch.full((len(inputs["input_ids"]),), case.meta["mvm_cell"]),
    }


@pytest.mark.parametrize("name", CASES)
def test_evaluation(name, case):
    case = case(name)
    model, batch, expected = case.model.eval(), _pretraining(case), case.outputs
    with torch.no_grad():
        feature_map = model.model.backbone(batch["pixel_values"]).last_hidden_state
        images = model.model.get_image_features(batch["pixel_values"], batch["pixel_mask"])
    torch.testing.assert_close(feature_map, expected["backbone"], **HIDDEN)
    assert torch.equal(images.mask.flatten(1).long(), expected["visual_mask"])
    output = model(**batch)
    assert torch.equal(output.mvm_labels, expected["mvm_labels"])
    for term in ("mlm", "mvm", "itm"):
        torch.testing.assert_close(output[f"loss_{term}"], expected[f"eval_loss_{term}"], **LOGITS)
    torch.testing.assert_close(output.itm_logits, expected["itm_logits"], **LOGITS)
    case.meta["grad_norms"] = case.meta["eval_grad_norms"]
    check_gradients(case, output.loss)


@pytest.mark.parametrize("name", CASES)
def test_states(name, case):
    """The references are of the masked batch."""
    case = case(name)
    model, batch, expected = case.model.eval(), _pretraining(case), case.outputs
    with torch.no_grad():
        images = model.model.get_image_features(batch["pixel_values"], batch["pixel_mask"])
        model.mask_cells(images, batch["mvm_cells"])
        states = model.model.fuse(batch["mlm_input_ids"], batch["attention_mask"], images)
    fused = torch.cat([states.last_hidden_state, states.image_hidden_state], dim=1)
    torch.testing.assert_close(fused, expected["fusion"], **HIDDEN)


@pytest.mark.parametrize("name", CASES)
def test_training_step(name, case):
    case = case(name)
    output = case.model.train()(**_pretraining(case))
    for term in ("mlm", "mvm", "itm"):
        torch.testing.assert_close(output[f"loss_{term}"], case.outputs[f"train_loss_{term}"], **LOGITS)
    case.meta["grad_norms"] = case.meta["train_grad_norms"]
    check_gradients(case, output.loss)
    dictionary = case.model.model.visual_dictionary
    for ours, official in (("embeddings", "embed"), ("ema_sum", "embed_avg"), ("ema_count", "cluster_size")):
        torch.testing.assert_close(getattr(dictionary, ours), case.outputs[f"after_{official}"], **AFTER)


@pytest.mark.parametrize("name", CASES)
def test_training_trajectory(name, case):
    case = case(name)
    case.model.train()
    check_trajectory(case, _pretraining(case))


def test_question_answering(case):
    case = case("soho_vqa")
    inputs = case.inputs
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
    output = case.model.eval()(**_images(inputs), **texts)
    torch.testing.assert_close(output.logits, case.outputs["logits"], **LOGITS)
    torch.testing.assert_close(output.loss, case.outputs["loss"], **LOGITS)
    check_gradients(case, output.loss)


@pytest.mark.parametrize(
    ("size", "canvas", "cells", "valid"),
    [
        ((800, 600), (800, 608), (12, 9), 7),
        ((800, 600), (1024, 608), (16, 9), 6),
        ((600, 800), (608, 1024), (9, 16), 16),
        ((600, 800), (608, 800), (9, 12), 12),
    ],
)
def test_columns_of_the_official_mask(size, canvas, cells, valid):
    mask = torch.zeros(1, *canvas, dtype=torch.bool)
    mask[:, : size[0], : size[1]] = True
    official = cell_mask(mask, *cells, "square_legacy")[0]
    assert official.any(dim=0).sum() == valid
    exact = cell_mask(mask, *cells, "exact")[0]
    assert exact.any(dim=0).sum() == -(-size[1] * cells[1] // canvas[1])

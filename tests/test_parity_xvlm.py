"""X-VLM against reference values of the official code, through the shipped converter."""

from pathlib import Path

import pytest
import torch
from parity_cases import (
    HIDDEN,
    LOGITS,
    check_answer_ranking,
    check_gradients,
    check_trajectory,
    given_answers,
    load_case,
    pairs,
    texts,
)

from hf_vlp.conversion.xvlm import convert_state_dict


@pytest.fixture
def case(request):
    folder = Path(request.config.getoption("--parity-dir"))

    def load(name: str, weights: str | None = None):
        return load_case(folder / name, convert_state_dict, folder / weights if weights else None)

    return load


def _pretraining(inputs) -> dict[str, torch.Tensor]:
    slots = inputs["masked_ids"] != -100
    rows = torch.arange(len(slots))[:, None].expand_as(slots)
    labels = torch.full_like(inputs["masked_input_ids"], -100)
    labels[rows[slots], inputs["masked_pos"][slots]] = inputs["masked_ids"][slots]
    return {**texts(inputs), "mlm_input_ids": inputs["masked_input_ids"], "mlm_labels": labels}


def _regions(inputs) -> dict[str, torch.Tensor]:
    return {
        **_pretraining(inputs),
        "region_image_index": inputs["idx_to_group_img"],
        "region_patch_mask": inputs["image_atts"][:, 1:].bool(),
        "target_boxes": inputs["target_bbox"],
        "is_full_image": inputs["is_image"].bool(),
    }


def test_hidden_states_and_features(case):
    case = case("xvlm_pretrain_image")
    with torch.no_grad():
        output = case.model.model(**texts(case.inputs))
    expected = case.outputs
    torch.testing.assert_close(output.image_embeds, expected["image_embeds"], **HIDDEN)
    torch.testing.assert_close(output.text_embeds, expected["text_embeds"], **HIDDEN)
    torch.testing.assert_close(output.last_hidden_state, expected["cross_embeds"], **HIDDEN)
    torch.testing.assert_close(output.image_features, expected["image_feat"], **LOGITS)
    torch.testing.assert_close(output.text_features, expected["text_feat"], **LOGITS)


def test_image_batch(case):
    case = case("xvlm_pretrain_image")
    output = case.model(**_pretraining(case.inputs))
    for name in ("loss_itc", "loss_itm", "loss_mlm"):
        torch.testing.assert_close(output[name], case.outputs[name], **LOGITS)
    expected = case.outputs["itm_logits"]
    torch.testing.assert_close(output.itm_logits[: len(expected)], expected, **LOGITS)
    check_gradients(case, output.loss)


def test_region_batch(case):
    case = case("xvlm_pretrain_region", weights="xvlm_pretrain_image")
    batch = _regions(case.inputs)
    output = case.model(**batch)
    ours = torch.stack([output[f"loss_{name}"] for name in case.meta["loss_names"]])
    torch.testing.assert_close(ours, case.outputs["losses"], **LOGITS)
    torch.testing.assert_close(output.pred_boxes, case.outputs["pred_boxes"], **LOGITS)
    check_gradients(case, output.loss)
    with torch.no_grad():
        regions = case.model.get_region_features(
            batch["pixel_values"], batch["region_image_index"], batch["region_patch_mask"]
        )
        images = case.model.get_image_features(batch["pixel_values"])
    torch.testing.assert_close(regions.last_hidden_state, case.outputs["region_embeds"], **HIDDEN)
    full = images.last_hidden_state[batch["region_image_index"]]
    torch.testing.assert_close(full, case.outputs["full_embeds"], **HIDDEN)


def test_training_trajectories(case):
    region = case("xvlm_pretrain_region", weights="xvlm_pretrain_image")
    check_trajectory(region, _regions(region.inputs))


def test_retrieval(case):
    case = case("xvlm_retrieval")
    output = case.model(**texts(case.inputs), image_ids=case.inputs["idx"])
    torch.testing.assert_close(output.loss_itc, case.outputs["loss_itc"], **LOGITS)
    torch.testing.assert_close(output.loss_itm, case.outputs["loss_itm"], **LOGITS)
    check_gradients(case, output.loss)


def test_grounding(case):
    case = case("xvlm_grounding")
    output = case.model(**texts(case.inputs), target_boxes=case.inputs["target_boxes"])
    torch.testing.assert_close(output.pred_boxes, case.outputs["pred_boxes"], **LOGITS)
    torch.testing.assert_close(output.loss_bbox, case.outputs["loss_bbox"], **LOGITS)
    torch.testing.assert_close(output.loss_giou, case.outputs["loss_giou"], **LOGITS)
    check_gradients(case, output.loss)


def test_question_answering(case):
    case = case("xvlm_vqa")
    output = case.model(**texts(case.inputs), **given_answers(case))
    torch.testing.assert_close(output.loss, case.outputs["loss"], **LOGITS)
    check_gradients(case, output.loss)


def test_answer_ranking(case):
    check_answer_ranking(case("xvlm_vqa"))


def test_reasoning(case):
    case = case("xvlm_nlvr")
    output = case.model(**texts(pairs(case.inputs)), labels=case.inputs["labels"])
    torch.testing.assert_close(output.logits, case.outputs["logits"], **LOGITS)
    torch.testing.assert_close(output.loss, case.outputs["loss"], **LOGITS)
    check_gradients(case, output.loss)

"""ALBEF against reference values of the official code, through the shipped converter."""

import json
from functools import partial
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

from hf_vlp.conversion.albef import convert_state_dict

AFTER = {"atol": 1e-6, "rtol": 0}


@pytest.fixture
def case(request):
    folder = Path(request.config.getoption("--parity-dir"))

    def load(name: str, **settings):
        heads = json.loads((folder / name / "meta.json").read_text())["heads"]
        settings |= {"momentum": True, "num_vision_heads": heads}
        loaded = load_case(folder / name, partial(convert_state_dict, **settings))
        loaded.model.distillation_weight = loaded.meta.get("alpha", 0.0)
        loaded.model.config.momentum = loaded.meta["momentum"]
        for module in loaded.model.modules():  # a training step without dropout, as the references have it
            module.p = 0.0 if isinstance(module, torch.nn.Dropout) else getattr(module, "p", None)
        loaded.model.config.text_config.attention_probs_dropout_prob = 0.0
        loaded.model.train()
        return loaded

    return load


def _pretraining(inputs) -> dict[str, torch.Tensor]:
    masked = {"mlm_input_ids": inputs["masked_input_ids"], "mlm_labels": inputs["mlm_labels"]}
    return {**texts(inputs), **masked}


def test_hidden_states_and_features(case):
    case = case("albef_pretrain")
    case.model.eval()
    with torch.no_grad():
        output = case.model.model(**texts(case.inputs))
    expected = case.outputs
    torch.testing.assert_close(output.image_embeds, expected["image_embeds"], **HIDDEN)
    torch.testing.assert_close(output.text_embeds, expected["text_embeds"], **HIDDEN)
    torch.testing.assert_close(output.last_hidden_state, expected["fusion_embeds"], **HIDDEN)
    torch.testing.assert_close(output.image_features, expected["image_feat"], **LOGITS)
    torch.testing.assert_close(output.text_features, expected["text_feat"], **LOGITS)


def test_pretraining(case):
    case = case("albef_pretrain")
    output = case.model(**_pretraining(case.inputs))
    for ours, official in (("itc", "ita"), ("itm", "itm"), ("mlm", "mlm")):
        torch.testing.assert_close(output[f"loss_{ours}"], case.outputs[f"loss_{official}"], **LOGITS)
    expected = case.outputs["itm_logits"]
    torch.testing.assert_close(output.itm_logits[: len(expected)], expected, **LOGITS)
    labelled = case.inputs["mlm_labels"] != -100
    torch.testing.assert_close(output.mlm_logits, case.outputs["mlm_logits"][labelled], **LOGITS)
    check_gradients(case, output.loss)

    queue, teacher = case.model.queue, case.model.teacher.model
    assert queue.pointer == case.outputs["after_queue_ptr"]
    torch.testing.assert_close(queue.image_features, case.outputs["after_image_queue"].T, **AFTER)
    torch.testing.assert_close(queue.text_features, case.outputs["after_text_queue"].T, **AFTER)
    expected = case.outputs["after_text_proj_m_weight"]
    torch.testing.assert_close(teacher.text_projection.weight, expected, **AFTER)
    expected = case.outputs["after_visual_encoder_m_norm_weight"]
    torch.testing.assert_close(teacher.vision_model.trunk.layernorm.weight, expected, **AFTER)


def test_training_trajectory(case):
    case = case("albef_pretrain")
    check_trajectory(case, _pretraining(case.inputs))


def test_retrieval(case):
    case = case("albef_retrieval")
    output = case.model(**texts(case.inputs), image_ids=case.inputs["idx"])
    torch.testing.assert_close(output.loss_itc, case.outputs["loss_ita"], **LOGITS)
    torch.testing.assert_close(output.loss_itm, case.outputs["loss_itm"], **LOGITS)
    assert torch.equal(case.model.queue.image_ids, case.outputs["after_idx_queue"][0])
    check_gradients(case, output.loss)


def test_question_answering(case):
    case = case("albef_vqa")
    output = case.model(**texts(case.inputs), **given_answers(case))
    torch.testing.assert_close(output.loss, case.outputs["loss"], **LOGITS)
    check_gradients(case, output.loss)


def test_answer_ranking(case):
    check_answer_ranking(case("albef_vqa"))


def test_entailment(case):
    case = case("albef_ve")
    output = case.model(**texts(case.inputs), labels=case.inputs["labels"])
    torch.testing.assert_close(output.logits, case.outputs["logits"], **LOGITS)
    torch.testing.assert_close(output.loss, case.outputs["loss"], **LOGITS)
    check_gradients(case, output.loss)


def test_reasoning(case):
    case = case("albef_nlvr")
    output = case.model(**texts(pairs(case.inputs)), labels=case.inputs["labels"])
    torch.testing.assert_close(output.logits, case.outputs["logits"], **LOGITS)
    torch.testing.assert_close(output.loss, case.outputs["loss"], **LOGITS)
    check_gradients(case, output.loss)


def test_grounding(case):
    case = case("albef_grounding", grounding=True)
    model = case.model.eval()
    model.config.gradcam_layer = case.meta["block"] - case.meta["text"]["fusion_layer"]
    output = model(**texts(case.inputs))
    torch.testing.assert_close(output.itm_logits, case.outputs["itm_logits"], **LOGITS)
    torch.testing.assert_close(output.heatmap, case.outputs["heatmap"], **LOGITS)
    with torch.inference_mode():
        again = model(**{name: value.clone() for name, value in texts(case.inputs).items()})
    torch.testing.assert_close(again.heatmap, output.heatmap)
    assert all(parameter.grad is None for parameter in model.parameters())

"""X-VLM against reference values of the official code, through the shipped converter."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from hf_vlp.conversion.xvlm import convert_state_dict

LOGITS = {"atol": 1e-5, "rtol": 0}
HIDDEN = {"atol": 2e-5, "rtol": 0}


@pytest.fixture
def case(request):
    """One folder of reference values: `meta`, `inputs`, `outputs`, and our converted `model` with its key
    `report`."""

    def load(name: str, weights: str | None = None):
        folder = Path(request.config.getoption("--parity-dir")) / name
        meta = json.loads((folder / "meta.json").read_text())
        official = _read(folder.parent / (weights or name) / "official_state_dict.safetensors")
        converted = convert_state_dict(official, meta["text"]["num_attention_heads"])
        inputs, outputs = _read(folder / "inputs.safetensors"), _read(folder / "outputs.safetensors")
        return SimpleNamespace(
            meta=meta, inputs=inputs, outputs=outputs, model=converted.model, report=converted.report
        )

    return load


def _read(path: Path) -> dict[str, torch.Tensor]:
    return {k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()}


def _texts(inputs) -> dict[str, torch.Tensor]:
    return {name: inputs[name] for name in ("pixel_values", "input_ids", "attention_mask")}


def _pretraining(inputs) -> dict[str, torch.Tensor]:
    slots = inputs["masked_ids"] != -100
    rows = torch.arange(len(slots))[:, None].expand_as(slots)
    labels = torch.full_like(inputs["masked_input_ids"], -100)
    labels[rows[slots], inputs["masked_pos"][slots]] = inputs["masked_ids"][slots]
    return {**_texts(inputs), "mlm_input_ids": inputs["masked_input_ids"], "mlm_labels": labels}


def _regions(inputs) -> dict[str, torch.Tensor]:
    return {
        **_pretraining(inputs),
        "region_image_index": inputs["idx_to_group_img"],
        "region_patch_mask": inputs["image_atts"][:, 1:].bool(),
        "target_boxes": inputs["target_bbox"],
        "is_full_image": inputs["is_image"].bool(),
    }


def _check_gradients(case, loss):
    """Norm of the gradient of every official parameter; split tensors are joined, and zeros may be
    rounding."""
    loss.backward()
    parameters = dict(case.model.named_parameters())
    for name, norm in case.meta["grad_norms"].items():
        ours = torch.cat([parameters[target].grad.flatten() for target in case.report.used[name]]).norm()
        torch.testing.assert_close(
            ours.item(), norm, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )
    reached = {target for name in case.meta["grad_norms"] for target in case.report.used[name]}
    assert {name for name, p in parameters.items() if p.grad is not None} <= reached | {
        "lm_head.decoder.weight"
    }


def _check_trajectory(case, batch):
    """Losses along plain gradient descent from the stored weights."""
    for expected in case.outputs["sgd_losses"]:
        output = case.model(**batch)
        ours = torch.stack([output[f"loss_{name}"] for name in case.meta["sgd_loss_names"]])
        torch.testing.assert_close(ours, expected, atol=5e-4, rtol=0)
        case.model.zero_grad()
        output.loss.backward()
        with torch.no_grad():
            for parameter in case.model.parameters():
                if parameter.grad is not None:
                    parameter -= case.meta["sgd_lr"] * parameter.grad


def test_hidden_states_and_features(case):
    case = case("xvlm_pretrain_image")
    with torch.no_grad():
        output = case.model.model(**_texts(case.inputs))
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
    _check_gradients(case, output.loss)


def test_region_batch(case):
    case = case("xvlm_pretrain_region", weights="xvlm_pretrain_image")
    batch = _regions(case.inputs)
    output = case.model(**batch)
    ours = torch.stack([output[f"loss_{name}"] for name in case.meta["loss_names"]])
    torch.testing.assert_close(ours, case.outputs["losses"], **LOGITS)
    torch.testing.assert_close(output.pred_boxes, case.outputs["pred_boxes"], **LOGITS)
    _check_gradients(case, output.loss)
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
    _check_trajectory(region, _regions(region.inputs))


def test_retrieval(case):
    case = case("xvlm_retrieval")
    output = case.model(**_texts(case.inputs), image_ids=case.inputs["idx"])
    torch.testing.assert_close(output.loss_itc, case.outputs["loss_itc"], **LOGITS)
    torch.testing.assert_close(output.loss_itm, case.outputs["loss_itm"], **LOGITS)
    _check_gradients(case, output.loss)


def test_grounding(case):
    case = case("xvlm_grounding")
    output = case.model(**_texts(case.inputs), target_boxes=case.inputs["target_boxes"])
    torch.testing.assert_close(output.pred_boxes, case.outputs["pred_boxes"], **LOGITS)
    torch.testing.assert_close(output.loss_bbox, case.outputs["loss_bbox"], **LOGITS)
    torch.testing.assert_close(output.loss_giou, case.outputs["loss_giou"], **LOGITS)
    _check_gradients(case, output.loss)

"""Reference values of the official code: reading a folder, comparing gradients and trajectories."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

LOGITS = {"atol": 1e-5, "rtol": 0}
HIDDEN = {"atol": 2e-5, "rtol": 0}


def read(path: Path) -> dict[str, torch.Tensor]:
    return {k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()}


def read_official(folder: Path) -> tuple[dict[str, torch.Tensor], int]:
    """Official weights in float32, and the number of attention heads that tensors do not tell."""
    meta = json.loads((folder / "meta.json").read_text())
    heads = meta["text"]["num_attention_heads"] if "text" in meta else meta["heads"]
    return read(folder / "official_state_dict.safetensors"), heads


def load_case(folder: Path, convert, weights: Path | None = None) -> SimpleNamespace:
    """One folder: `meta`, `inputs`, `outputs`, and the `model` that `convert` makes of its weights, or those
    of another folder, with the key `report`."""
    meta = json.loads((folder / "meta.json").read_text())
    converted = convert(*read_official(weights or folder))
    inputs, outputs = read(folder / "inputs.safetensors"), read(folder / "outputs.safetensors")
    return SimpleNamespace(
        meta=meta, inputs=inputs, outputs=outputs, model=converted.model, report=converted.report
    )


def texts(inputs) -> dict[str, torch.Tensor]:
    return {name: inputs[name] for name in ("pixel_values", "input_ids", "attention_mask")}


def given_answers(case) -> dict[str, torch.Tensor]:
    """The answers of a question-answering case, the weights, and the question of each."""
    counts = torch.tensor(case.meta["answers_per_question"])
    return {
        "answer_input_ids": case.inputs["answer_ids"],
        "answer_attention_mask": case.inputs["answer_attention_mask"],
        "answer_weights": case.inputs["answer_weights"],
        "answer_question_index": torch.arange(len(counts)).repeat_interleave(counts),
    }


def pairs(inputs) -> dict[str, torch.Tensor]:
    """Inputs with pairs of images: (2R, ...), all first and then all second ones, to (R, 2, ...)."""
    return inputs | {"pixel_values": inputs["pixel_values"].unflatten(0, (2, -1)).transpose(0, 1)}


def check_answer_ranking(case):
    ranked = case.model.eval().rank_answers(
        **texts(case.inputs),
        answer_input_ids=case.inputs["candidate_ids"],
        answer_attention_mask=case.inputs["candidate_attention_mask"],
        top_k=case.meta["rank_k"],
    )
    assert torch.equal(ranked.indices, case.outputs["topk_ids"])
    torch.testing.assert_close(ranked.probabilities, case.outputs["topk_probs"], **LOGITS)


def check_gradients(case, loss):
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


def check_trajectory(case, batch):
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

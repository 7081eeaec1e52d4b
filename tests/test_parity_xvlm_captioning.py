"""X-VLM's captioning against reference values of the official code, through the shipped converter."""

from pathlib import Path

import pytest
import torch
from parity_cases import LOGITS, check_gradients, load_case, texts

from hf_vlp import XVLMForCaptioning
from hf_vlp.conversion.xvlm import convert_state_dict


@pytest.fixture
def case(request):
    folder = Path(request.config.getoption("--parity-dir")) / "xvlm_captioning"
    case = load_case(folder, convert_state_dict)
    assert type(case.model) is XVLMForCaptioning
    case.model.config.label_smoothing = case.meta["label_smoothing"]
    return case


def captions(case) -> dict[str, torch.Tensor]:
    labels = case.inputs["input_ids"].masked_fill(case.inputs["attention_mask"] == 0, -100)
    labels[:, : case.meta["prompt_length"]] = -100
    return {**texts(case.inputs), "labels": labels}


def test_logits(case):
    with torch.no_grad():
        output = case.model(**texts(case.inputs))
    words = case.inputs["attention_mask"].bool()  # what follows padding is of no use
    torch.testing.assert_close(output.lm_logits[words], case.outputs["logits"][words], **LOGITS)


def test_loss_and_gradients(case):
    output = case.model(**captions(case))
    torch.testing.assert_close(output.loss, case.outputs["loss"], **LOGITS)
    check_gradients(case, output.loss)


@pytest.mark.parametrize("length", ["max_length", "max_new_tokens"])
def test_greedy_captions(case, length):
    expected, prompt = case.outputs["greedy_ids"], case.meta["prompt_length"]
    stop = {"max_length": expected.shape[1], "max_new_tokens": expected.shape[1] - prompt}
    written = case.model.generate(
        case.inputs["pixel_values"],
        case.inputs["input_ids"][:, :prompt],
        eos_token_id=case.meta["text"]["vocab_size"],  # the reference stops at no word
        **{length: stop[length]},
    )
    assert torch.equal(written, expected)

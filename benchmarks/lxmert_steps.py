"""Speed of LXMERT at base size: forward passes and training steps, against transformers' own LXMERT.

Both have the same random weights and read the same questions of 8 to 20 word pieces, with 36 regions of 2,048
numbers each. Asserts that both give the same numbers, and prints the table of docs/benchmarks.md:

    python benchmarks/lxmert_steps.py

B: rows of a batch, L: text length, R: regions.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from measuring import (
    build_parser,
    caption_lengths,
    in_new_process,
    in_turn,
    machine,
    median,
    peak_memory,
    random_texts,
    ratio,
)
from torch import Tensor
from transformers import LxmertConfig, PreTrainedModel
from transformers import LxmertForPreTraining as TheirsForPreTraining
from transformers import LxmertForQuestionAnswering as TheirsForQuestionAnswering
from transformers import LxmertModel as TheirModel

from hf_vlp import LXMERTConfig, LXMERTForPreTraining, LXMERTForQuestionAnswering, LXMERTModel

REGIONS, FEATURES, ANSWERS = 36, 2048, 3129
OFFICIAL_LENGTH = 20  # to which the official code pads every text
OURS, THEIRS, PADDED = "this package", "transformers", f"transformers, padded to {OFFICIAL_LENGTH}"
TOLERANCE = 2e-3  # of losses around 60
Batch = dict[str, Tensor]


def build_batch(size: int, device: str) -> Batch:
    """Questions padded to the longest and the regions of their images."""
    texts = random_texts(caption_lengths(size).clamp(max=20))
    corners = torch.rand(size, REGIONS, 2, 2).sort(dim=2).values  # (B, R, corner, x and y)
    batch = {
        "input_ids": texts.input_ids,
        "attention_mask": texts.attention_mask,
        "visual_feats": torch.randn(size, REGIONS, FEATURES).relu(),
        "visual_pos": corners.flatten(2),
    }
    return {name: value.to(device) for name, value in batch.items()}


def build_labels(batch: Batch) -> Batch:
    """Labels of pretraining under our names: 15% of words and of regions are to be predicted."""
    words, size = batch["input_ids"], (len(batch["input_ids"]), REGIONS)
    device = words.device
    labelled = (torch.rand(words.shape, device=device) < 0.15) & batch["attention_mask"].bool()
    return {
        "mlm_labels": words.masked_fill(~labelled, -100),
        "itm_labels": torch.randint(2, size[:1], device=device),
        "answer_labels": torch.randint(9500, size[:1], device=device),
        "region_mask": torch.rand(size, device=device) < 0.15,
        "target_feats": batch["visual_feats"],
        "object_ids": torch.randint(1600, size, device=device),
        "object_scores": torch.rand(size, device=device),
        "attribute_ids": torch.randint(400, size, device=device),
        "attribute_scores": torch.rand(size, device=device),
    }


def their_labels(labels: Batch) -> dict:
    """The same labels as transformers takes them."""
    return {
        "labels": labels["mlm_labels"],
        "matched_label": labels["itm_labels"],
        "ans": labels["answer_labels"],
        "obj_labels": {
            "obj": (labels["object_ids"], labels["object_scores"]),
            "attr": (labels["attribute_ids"], labels["attribute_scores"]),
            "feat": (labels["target_feats"], labels["region_mask"].float()),
        },
    }


def pad_texts(inputs: dict) -> dict:
    """Texts of the length that the official code has."""
    slots = OFFICIAL_LENGTH - inputs["input_ids"].shape[1]
    fill = {"input_ids": 0, "attention_mask": 0}
    if inputs.get("labels") is not None and inputs["labels"].ndim == 2:  # of words
        fill["labels"] = -100
    return inputs | {name: F.pad(inputs[name], (0, slots), value=value) for name, value in fill.items()}


def build_model(kind: str, is_ours: bool, device: str) -> PreTrainedModel:
    """A model with random weights."""
    ours, theirs = {
        "body": (LXMERTModel, TheirModel),
        "answers": (LXMERTForQuestionAnswering, TheirsForQuestionAnswering),
        "pretraining": (LXMERTForPreTraining, TheirsForPreTraining),
    }[kind]
    answers = {"num_qa_labels": ANSWERS} if kind == "answers" else {}
    if is_ours:
        return ours(LXMERTConfig(**answers)).to(device)
    return theirs(LxmertConfig(visual_loss_normalizer=1 / 0.15, **answers)).to(device)


def forward(model: PreTrainedModel, inputs: dict):
    """One pass in evaluation mode."""
    with torch.inference_mode():
        return model.eval()(**inputs)


def training_step(model: PreTrainedModel, inputs: dict):
    """Forward with dropout and backward."""
    model.train().zero_grad()
    model(**inputs).loss.sum().backward()


def build_inputs(kind: str, trains: bool, size: int, device: str) -> dict[str, dict]:
    """What each way reads."""
    batch = build_batch(size, device)
    ours, theirs = {}, {}
    if trains and kind == "pretraining":
        ours = build_labels(batch)
        theirs = their_labels(ours)
    elif trains:
        ours = theirs = {"labels": torch.randint(ANSWERS, (size,), device=device)}
    return {OURS: batch | ours, THEIRS: batch | theirs, PADDED: pad_texts(batch | theirs)}


def make_ways(kind: str, trains: bool, size: int, device: str) -> dict[str, Callable[[], object]]:
    """What is timed, by its name, after all ways were seen to agree."""
    torch.manual_seed(0)
    ours, theirs = build_model(kind, True, device), build_model(kind, False, device)
    ours.load_state_dict(theirs.state_dict(), strict=False)  # ours has no dead branch
    inputs = build_inputs(kind, trains, size, device)
    found, words = forward(ours, inputs[OURS]), inputs[OURS]["attention_mask"].bool()
    for way in (THEIRS, PADDED):
        check(found, forward(theirs, inputs[way]), words)
    work = training_step if trains else forward
    return {way: partial(work, ours if way == OURS else theirs, inputs[way]) for way in inputs}


def check(ours, theirs, words: Tensor):
    """Assert that losses, or else answers or states, are the same."""
    if ours.get("loss") is not None:
        pairs = [(ours.loss, theirs.loss.squeeze())]
    elif "logits" in ours:
        pairs = [(ours.logits, theirs.question_answering_score)]
    else:
        pairs = [(ours.pooler_output, theirs.pooled_output)]
        pairs += [(ours.region_hidden_state, theirs.vision_output)]
        theirs_of_words = theirs.language_output[:, : words.shape[1]][words]
        pairs += [(ours.last_hidden_state[words], theirs_of_words)]
    for one, other in pairs:
        difference = float((one - other).abs().max())
        assert difference < TOLERANCE, f"the two ways differ by {difference}"


def memory(kind: str, trains: bool, size: int, device: str, way: str) -> float:
    """GiB at the peak of a process that knows this way alone."""
    torch.manual_seed(0)
    model = build_model(kind, way == OURS, device)
    (training_step if trains else forward)(model, build_inputs(kind, trains, size, device)[way])
    return peak_memory(device)


WAYS = (OURS, THEIRS, PADDED)
CASES = {
    "states of words and regions": ("body", False),
    "answers": ("answers", False),
    "fine-tuning step, answers": ("answers", True),
    "pretraining step": ("pretraining", True),
}


def main():
    parser = build_parser(__doc__)
    parser.add_argument("--batch-size", type=int, default=32, help="rows of a batch")
    options = parser.parse_args()
    size, device = options.batch_size, options.device

    # 1. Memory, before this process grows: a child's peak counts from its parent's.
    peaks = {
        (name, way): in_new_process(memory, kind, trains, size, device, way)
        for name, (kind, trains) in CASES.items()
        for way in WAYS
    }

    # 2. Seconds, in turn, and the table.
    print(f"{machine(device, 'float32')}; {size} rows, in {options.rounds} rounds.\n")
    print("| what | way | seconds | times this package's | peak memory |\n|---|---|---|---|---|")
    for name, (kind, trains) in CASES.items():
        times = in_turn(make_ways(kind, trains, size, device), options.rounds)
        for way in WAYS:
            figures = f"{median(times, way):.2f} | {ratio(times, way, OURS):.2f} | {peaks[name, way]:.2f} GiB"
            print(f"| {name} | {way} | {figures} |")


if __name__ == "__main__":
    main()

"""Speed of the forward pass of SOHO's pretraining, ResNet-18 and 3 layers as released.

The official way, written out here with the same modules and weights, repeats the map of the trunk for each
text of an image, so that projection, dictionary, gate and positions are computed for each copy, looks up with
one-hot matrices, and computes vocabulary logits at all words and cells and the entries' logits at all cells.
This package does the first once per image, and predicts where there is a label. Both are in training mode,
without dropout and gradients. Asserts that both give the same losses, and prints the table of
docs/benchmarks.md:

    python benchmarks/soho_pretraining_forward.py

B: images, R = B * S texts, L: text length, N: cells of an image, D: hidden width, K: entries, V: vocabulary.
"""

from copy import deepcopy

import torch
import torch.nn.functional as F
from measuring import build_parser, caption_lengths, in_turn, machine, median, random_texts, ratio
from soho_dictionary import TEXTS, official_look_up
from torch import Tensor

from hf_vlp import SOHOConfig, SOHOForPreTraining
from hf_vlp.models.modeling_soho import VisualTokens, cell_mask, sine_positions

HEIGHT, WIDTH = 608, 800  # pixels of an image of 600 x 800, padded
LENGTH = 16  # to which the official code pads every text
OURS, OFFICIAL = "this package", "official"
TOLERANCE = 1e-3
LOSSES = ("loss_mlm", "loss_mvm", "loss_itm")
Batch = dict[str, Tensor]


def build_model(device: str) -> SOHOForPreTraining:
    """A model with random weights."""
    config = SOHOConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return SOHOForPreTraining(config).to(device).train()


def build_batch(images: int, device: str) -> Batch:
    """Images with padding below and S captions of each; 15% of words and an entry of one text are masked."""
    texts = random_texts(caption_lengths(images * TEXTS).clamp(max=LENGTH), LENGTH)
    labelled = (torch.rand(texts.input_ids.shape) < 0.15) & texts.attention_mask.bool()
    labelled[:, 0] = False  # [CLS]
    pixel_mask = torch.ones(images, HEIGHT, WIDTH, dtype=torch.bool)
    pixel_mask[:, 600:] = False
    mvm_cells = torch.full((images * TEXTS,), -1)
    mvm_cells[0] = 40
    batch = {
        "pixel_values": torch.randn(images, 3, HEIGHT, WIDTH) * pixel_mask[:, None],
        "pixel_mask": pixel_mask,
        "mlm_input_ids": texts.input_ids.masked_fill(labelled, 103),
        "attention_mask": texts.attention_mask,
        "mlm_labels": texts.input_ids.masked_fill(~labelled, -100),
        "itm_labels": torch.randint(2, (images * TEXTS,)),
        "mvm_cells": mvm_cells,
    }
    return {name: value.to(device) for name, value in batch.items()}


@torch.no_grad()
def our_losses(model: SOHOForPreTraining, batch: Batch) -> list[Tensor]:
    output = model(**batch)
    return [output[name] for name in LOSSES]


@torch.no_grad()
def official_losses(model: SOHOForPreTraining, batch: Batch) -> list[Tensor]:
    """The losses of words, cells and matching, as the official code computes them."""
    images = official_tokens(model, batch)
    mvm_labels = model.mask_cells(images, batch["mvm_cells"])
    states = model.model.fuse(batch["mlm_input_ids"], batch["attention_mask"], images)
    words, cells = states.last_hidden_state, states.image_hidden_state

    vocabulary = model.get_input_embeddings().weight
    mlm_logits = F.linear(torch.cat([words, cells], dim=1), vocabulary)  # (R, L + N, V)
    mlm_labels = F.pad(batch["mlm_labels"], (0, cells.shape[1]), value=-100)
    entries = F.normalize(model.model.visual_dictionary.embeddings, dim=-1)
    mvm_logits = F.normalize(cells, dim=-1) @ entries.T  # (R, N, K)
    matching = F.cross_entropy(model.itm_head(words[:, 0]), batch["itm_labels"])
    return [official_mean(mlm_logits, mlm_labels), official_mean(mvm_logits, mvm_labels), matching]


def official_tokens(model: SOHOForPreTraining, batch: Batch) -> VisualTokens:
    """Image tokens of R texts, from S copies of the map of each image."""
    soho = model.model
    feature_map = soho.backbone(batch["pixel_values"]).last_hidden_state
    cells = soho.visual_projection(feature_map.repeat_interleave(TEXTS, dim=0))  # (R, h, w, D)
    pixel_mask = batch["pixel_mask"].repeat_interleave(TEXTS, dim=0)
    mask = cell_mask(pixel_mask, *cells.shape[1:3], model.config.padding_mask_mode)
    positions = sine_positions(mask, cells.shape[3]).flatten(1, 2)
    cells = cells.flatten(1, 2)  # (R, N, D)
    looked_up, nearest = official_look_up(soho.visual_dictionary, cells)
    states = soho.visual_gate(soho.visual_dictionary_projection(looked_up), cells)
    return VisualTokens(states, positions, mask, nearest)


def official_mean(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy over the number of labels that are not -100."""
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return losses / ((labels != -100).sum() + 1e-6)


def check(ours: SOHOForPreTraining, official: SOHOForPreTraining, batch: Batch):
    """Assert that both ways give the same losses."""
    pairs = zip(LOSSES, our_losses(ours, batch), official_losses(official, batch), strict=True)
    for name, one, other in pairs:
        assert one > 0, f"{name} is {one}, which shows nothing"
        assert abs(one - other) < TOLERANCE, f"{name} is {one} here and {other} in the official way"


def main():
    parser = build_parser(__doc__)
    parser.add_argument("--images", type=int, default=2, help="images of a batch, of 4 texts each")
    options = parser.parse_args()
    torch.manual_seed(0)
    ours, batch = build_model(options.device), build_batch(options.images, options.device)
    official = deepcopy(ours)  # each has its own dictionary, which moves
    check(ours, official, batch)

    ways = {OURS: lambda: our_losses(ours, batch), OFFICIAL: lambda: official_losses(official, batch)}
    times = in_turn(ways, options.rounds)
    print(f"{machine(options.device, 'float32')}; {options.images} images, in {options.rounds} rounds.\n")
    print("| way | seconds | times this package's |\n|---|---|---|")
    for way in ways:
        print(f"| {way} | {median(times, way):.2f} | {ratio(times, way, OURS):.2f} |")


if __name__ == "__main__":
    main()

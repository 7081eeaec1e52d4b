"""Speed of captions: keys and values once per image, against once for each step and beam.

The base model at 384 pixels writes captions with three beams of up to 20 tokens, random weights and all.
Prints the table of docs/benchmarks.md:

    python benchmarks/xvlm_captioning.py

B: images, S: image tokens, W: image width, L: length with the prompt.
"""

import copy
from functools import partial

import torch
from measuring import build_parser, in_turn, machine, median, ratio
from torch import Tensor

from hf_vlp import XVLMConfig, XVLMForCaptioning
from hf_vlp.models.layers_bert import TextDecoder

PROMPT = [101, 1037, 3861, 1997]  # [CLS] a picture of
SETTINGS = {
    "num_beams": 3,
    "max_length": 20,
    "min_length": 20,
    "official_length": True,
}  # all words are written
OURS, OFFICIAL = "this package", "official: keys and values for each step and beam"


def build_model(device: str, dtype: torch.dtype, tiny: bool) -> XVLMForCaptioning:
    """The base model for images of 384 pixels, or a tiny one."""
    swin = XVLMConfig().vision_config.to_dict() | {"image_size": 384, "window_size": 12}
    text = {}
    if tiny:
        swin |= {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "hidden_size": 64}
        text = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    return XVLMForCaptioning(XVLMConfig(vision_config=swin, text_config=text)).eval().to(device, dtype)


class Reprojecting(TextDecoder):
    """The official way: states of an image come once for each beam, and every step makes keys and values of
    them anew."""

    def read_context(self, states: Tensor, mask: Tensor | None = None) -> None:
        self.states = states.repeat_interleave(SETTINGS["num_beams"], dim=0)  # (B * K, S, W)

    def prepare_inputs_for_generation(self, *args, **kwargs) -> dict:
        kwargs["context"] = super().read_context(self.states)
        return super().prepare_inputs_for_generation(*args, **kwargs)


class KnownStates(torch.nn.Module):
    """A trunk that takes no time: the states (B, S, W) of its images are given."""

    def __init__(self, states: Tensor):
        super().__init__()
        self.states = states

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.states


def with_part(model: XVLMForCaptioning, **parts: torch.nn.Module) -> XVLMForCaptioning:
    """The model, all weights shared, with other parts."""
    other = copy.copy(model)
    other._modules = model._modules | parts
    return other


def official_way(model: XVLMForCaptioning) -> XVLMForCaptioning:
    decoder = copy.copy(model.decoder)
    decoder.__class__ = Reprojecting
    return with_part(model, decoder=decoder)


@torch.inference_mode()
def main():
    parser = build_parser(__doc__)
    parser.add_argument("--images", type=int, default=4, help="images of a batch")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    options = parser.parse_args()
    torch.manual_seed(0)

    # 1. A model, images, and the prompt
    model = build_model(options.device, torch.float32, options.tiny)
    pixels = torch.randn(options.images, 3, 384, 384, device=options.device)
    prompt = torch.tensor([PROMPT], device=options.device)
    states = model.vision_model(pixels)
    print(f"{machine(options.device, 'float32')}; {options.images} images, {SETTINGS['num_beams']} beams.")

    # 2. Both ways write the same captions
    official, known = official_way(model), KnownStates(states)
    expected, found = (one.generate(pixels, prompt, **SETTINGS) for one in (official, model))
    assert torch.equal(expected, found), "the two ways write different captions"

    # 3. Seconds with the image trunk, and without
    models = {
        OFFICIAL: official,
        OURS: model,
        f"{OFFICIAL}, without the trunk": with_part(official, vision_model=known),
        f"{OURS}, without the trunk": with_part(model, vision_model=known),
    }
    ways = {way: partial(one.generate, pixels, prompt, **SETTINGS) for way, one in models.items()}
    times = in_turn(ways, options.rounds)
    print("\n| way | seconds | times this package's |\n|---|---|---|")
    for way in ways:
        ours = f"{OURS}, without the trunk" if way.endswith("trunk") else OURS
        print(f"| {way} | {median(times, way):.2f} | {ratio(times, way, ours):.1f} |")


if __name__ == "__main__":
    main()

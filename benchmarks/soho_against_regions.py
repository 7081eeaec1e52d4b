"""From an image and a question to an answer: SOHO, which sees images, against LXMERT, which sees regions.

SOHO is the paper's, ResNet-101, dictionary and 12 layers; LXMERT is the base model with the detector that
its features come from, ResNet-101 too, whose last stage runs on each of 300 proposals. Weights are random,
the image has 600 x 1000 pixels, the question 16 word pieces, and both choose among 3,129 answers. Prints the
table of docs/benchmarks.md:

    python benchmarks/soho_against_regions.py
"""

from collections.abc import Callable

import numpy as np
import torch
from measuring import Texts, build_parser, in_turn, machine, median, random_texts, ratio
from PIL import Image

from hf_vlp import (
    BUTDConfig,
    BUTDDetector,
    LXMERTConfig,
    LXMERTForQuestionAnswering,
    SOHOConfig,
    SOHOForQuestionAnswering,
    SOHOImageProcessor,
)
from hf_vlp.models.regions import Regions

HEIGHT, WIDTH, LENGTH, ANSWERS = 600, 1000, 16, 3129
SOHO, LXMERT = "SOHO", "LXMERT with its detector"
REGIONS = "of this, LXMERT once the regions are there"


def build_image() -> Image.Image:
    """Random blobs."""
    coarse = np.random.default_rng(0).integers(0, 256, (HEIGHT // 40, WIDTH // 40, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def soho_way(image: Image.Image, question: Texts, device: str) -> Callable[[], torch.Tensor]:
    """The answer of SOHO, image processor included."""
    config = SOHOConfig.paper(visual_fusion="gate", num_answers=ANSWERS)
    model, processor = SOHOForQuestionAnswering(config).to(device).eval(), SOHOImageProcessor()

    @torch.inference_mode()
    def answer() -> torch.Tensor:
        pixels = processor(image, return_tensors="pt").to(device)
        return model(**pixels, **question._asdict()).logits.argmax(dim=1)

    return answer


def lxmert_ways(image: Image.Image, question: Texts, device: str) -> dict[str, Callable[[], object]]:
    """The answer of LXMERT, and that where the regions are there already."""
    detector = BUTDDetector(BUTDConfig()).to(device).eval()
    model = LXMERTForQuestionAnswering(LXMERTConfig(num_qa_labels=ANSWERS)).to(device).eval()

    @torch.inference_mode()
    def detect() -> Regions:
        return detector.extract([image])

    @torch.inference_mode()
    def answer(regions: Regions) -> torch.Tensor:
        features, boxes = regions.features.to(device), regions.boxes.to(device)
        return model(features, boxes, **question._asdict()).logits.argmax(dim=1)

    ready = detect()
    expected = (1, detector.config.num_regions, detector.feature_dim)
    assert ready.features.shape == expected, f"the detector found {ready.features.shape}, not {expected}"
    assert ready.features.isfinite().all(), "features are not finite"
    return {LXMERT: lambda: answer(detect()), REGIONS: lambda: answer(ready)}


def main():
    options = build_parser(__doc__).parse_args()
    torch.manual_seed(0)
    image = build_image()
    question = Texts(*(value.to(options.device) for value in random_texts(torch.tensor([LENGTH]))))
    ways = {SOHO: soho_way(image, question, options.device)}
    ways |= lxmert_ways(image, question, options.device)
    times = in_turn(ways, options.rounds)
    print(f"{machine(options.device, 'float32')}; one image and question, in {options.rounds} rounds.\n")
    print("| way | seconds | times SOHO's |\n|---|---|---|")
    for way in ways:
        print(f"| {way} | {median(times, way):.2f} | {ratio(times, way, SOHO):.2f} |")


if __name__ == "__main__":
    main()

"""Configuration of the bottom-up-attention detector (Anderson et al., CVPR 2018, arXiv 1707.07998)."""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig


@strict
class BUTDConfig(PreTrainedConfig):
    """Faster R-CNN with ResNet-101, trained on Visual Genome; the defaults are the released 36-region model.

    Fields, in the order of the way an image takes:
    - `shortest_edge`, `longest_edge`: an image is scaled to the first in pixels, or to the second where its
      longer side would become longer;
    - `image_mean`: of the channels blue, green, red, 0 to 255;
    - `stem_size`, `hidden_sizes`, `depths`: widths of the first convolution and of the stages C2 to C5, and
      blocks of these stages; blocks are a fourth as wide inside. C5 runs on each proposal;
    - `anchor_base_size`, `anchor_ratios`, `anchor_scales`: anchors have base_size^2 * scale^2 pixels, and are
      ratio times as high as wide;
    - `rpn_hidden_size`: width of the proposal network;
    - `min_proposal_size`: sides of a proposal, at least, in pixels of the unscaled image;
    - `num_candidates`: best candidates that go through non-maximum suppression, at `proposal_nms_threshold`;
    - `num_proposals`: best proposals that are left of these;
    - `roi_size`: cells along each side that a proposal is pooled to;
    - `num_objects`, `num_attributes`: classes without "background" and "none";
    - `object_embedding_size`, `attribute_hidden_size`: widths on the way from an object to its attributes;
    - `nms_threshold`: of non-maximum suppression within each class of objects;
    - `num_regions`: regions that an image has, or fewer where there are fewer proposals;
    - `score_threshold`: where exactly `num_regions` reach it, they keep the order of the proposals.
    """

    model_type = "vlp_butd"

    shortest_edge: int = 600
    longest_edge: int = 1000
    image_mean: list[float] | tuple[float, ...] = (102.9801, 115.9465, 122.7717)
    stem_size: int = 64
    hidden_sizes: list[int] | tuple[int, ...] = (256, 512, 1024, 2048)
    depths: list[int] | tuple[int, ...] = (3, 4, 23, 3)
    anchor_base_size: int = 16
    anchor_ratios: list[float] | tuple[float, ...] = (0.5, 1.0, 2.0)
    anchor_scales: list[int] | tuple[int, ...] = (4, 8, 16, 32)
    rpn_hidden_size: int = 512
    min_proposal_size: int = 16
    num_candidates: int = 6000
    proposal_nms_threshold: float | int = 0.7
    num_proposals: int = 300
    roi_size: int = 14
    num_objects: int = 1600
    num_attributes: int = 400
    object_embedding_size: int = 256
    attribute_hidden_size: int = 512
    nms_threshold: float | int = 0.3
    num_regions: int = 36
    score_threshold: float | int = 0.2

    def __post_init__(self, **kwargs):
        for name in ("hidden_sizes", "depths"):
            if len(getattr(self, name)) != 4:
                raise ValueError(
                    f"{name}={getattr(self, name)} is not one number for each of the stages C2 to C5; give "
                    "four"
                )
        for name in ("proposal_nms_threshold", "nms_threshold", "score_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is no share; give a number from 0 to 1")
        super().__post_init__(**kwargs)

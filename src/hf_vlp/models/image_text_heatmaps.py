"""Weakly supervised grounding: pointing with the Grad-CAM of the match (ALBEF section 6, X-VLM section 4).

B: images, R: texts, L: text length, N: patches.
"""

import math

from torch import Tensor

from .boxes import heatmap_boxes
from .gradcam import gradcam
from .image_text import MatchingHead, all_ones, images_of_texts
from .outputs import VLPForGroundingOutput, VLPForRetrievalOutput


class HeatmapHead(MatchingHead):
    """On a retrieval head, which comes after it among the parents: trained as that, it points with the
    attention of fusion layer `config.gradcam_layer`."""

    auto_class = "AutoModelForGrounding"

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_ids: Tensor | None = None,
        negative_image_index: Tensor | None = None,
        negative_text_index: Tensor | None = None,
        region_image_index: Tensor | None = None,
        return_dict: bool = True,
    ) -> VLPForGroundingOutput | VLPForRetrievalOutput | tuple:
        """With `image_ids`, or while training, as the retrieval head; else locate texts (R, L) in images
        (B, 3, size, size).

        Text r refers to image r, or with `region_image_index` (R,) to that image, which is encoded once. The
        output holds `heatmap` (R, grid, grid), `pred_boxes` (R, 4) around its hot half, and `itm_logits`.

        Raises:
            ValueError: the texts do not fit the images, or as the retrieval head.
        """
        if self.training or image_ids is not None:
            negatives = negative_image_index, negative_text_index
            return super().forward(
                pixel_values, input_ids, attention_mask, image_ids, *negatives, return_dict=return_dict
            )
        attention_mask = all_ones(input_ids) if attention_mask is None else attention_mask
        heatmaps, itm_logits = self.word_heatmaps(pixel_values, input_ids, attention_mask, region_image_index)
        heatmap = heatmaps.mean(dim=1)
        output = VLPForGroundingOutput(
            pred_boxes=heatmap_boxes(heatmap), heatmap=heatmap, itm_logits=itm_logits
        )
        return output if return_dict else output.to_tuple()

    def word_heatmaps(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        region_image_index: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Grad-CAM of the match of each text: a map for each of its words (R, L, grid, grid), 0 for padding,
        and the matching logits (R, 2)."""
        layer = self.model.fusion_model.layer[self.config.gradcam_layer]
        logits = []

        def score() -> Tensor:
            words, mask = input_ids.clone(), attention_mask.clone()
            index = None if region_image_index is None else region_image_index.clone()
            images = images_of_texts(self.model, pixel_values.clone(), words, index)
            text_embeds = self.model.text_model(words, mask)
            fused = self.model.fuse(text_embeds, mask, images.key_values)
            logits.append(self.itm_head(fused[:, 0]))
            return logits[0][:, 1]

        maps, _ = gradcam(self, layer.crossattention.self, self.config.text_config, score)
        maps = maps[..., 1:].mean(dim=1) * attention_mask[:, :, None]  # (R, L, N), without the global token
        grid = math.isqrt(maps.shape[-1])
        return maps.unflatten(-1, (grid, grid)), logits[0].detach()

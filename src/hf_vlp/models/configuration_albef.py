"""Configuration of ALBEF (Li et al., NeurIPS 2021, arXiv 2107.07651)."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_image_text import ImageTextConfig


@strict
class ALBEFConfig(ImageTextConfig):
    """ALBEF; the defaults are the paper's model (ViT-B/16 at 256 pixels, BERT-base).

    Fields beside those of `ImageTextConfig`:
    - `momentum_teacher`: whether the model holds the teacher and the queues it learns from. True to train,
      False for inference; a folder saved without them says False;
    - `momentum`: of the teacher's moving average;
    - `queue_size`: features of either kind that the contrastive loss remembers;
    - `alpha`: weight of the teacher's soft targets in every loss, 0 to 1;
    - `gradcam_layer`: without it the third of six fusion layers, as in the paper, and of others the one as
      high.
    """

    model_type = "vlp_albef"
    # loss terms, and what has no row for each row of the batch
    keys_to_ignore_at_inference = ["loss_itc", "loss_itm", "loss_mlm"]
    keys_to_ignore_at_inference += ["itm_logits", "mlm_logits", "logits_per_image", "answer_losses"]
    default_vision_config: ClassVar[dict[str, Any]] = {
        "model_type": "vit",
        "image_size": 256,
        "layer_norm_eps": 1e-6,
    }

    momentum_teacher: bool = True
    momentum: float | int = 0.995
    queue_size: int = 65536
    alpha: float | int = 0.4

    def __post_init__(self, **kwargs):
        for name in ("alpha", "momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is no share; give a number from 0 to 1")
        if self.queue_size < 1:
            raise ValueError(f"queue_size={self.queue_size} holds nothing; give at least 1")
        super().__post_init__(**kwargs)
        if self.gradcam_layer is None:
            self.gradcam_layer = (self.text_config.num_fusion_layers - 1) // 2

"""X-VLM's heads for question answering, pair reasoning, visual entailment and weakly supervised grounding
(arXiv 2111.08276, section 4). The paper has no entailment; its head is that of pair reasoning, on one image.
"""

from .base import Projection
from .configuration_xvlm import XVLMConfig
from .image_text_answering import AnsweringHead
from .image_text_heatmaps import HeatmapHead
from .image_text_sentences import AssignmentHead, EntailmentHead, ReasoningHead
from .layers_bert import TextDecoder
from .modeling_xvlm import PredictionHead, XVLMForRetrieval, XVLMHead, XVLMModel


class XVLMForQuestionAnswering(XVLMHead, AnsweringHead):
    """X-VLM that writes or ranks answers: a decoder attends to the question fused with the image.

    The decoder starts as the fusion layers; its keys and values start new where image embeds have another
    width than text embeds, as with Swin.
    """

    def __init__(self, config: XVLMConfig):
        super().__init__(config)
        self.model = XVLMModel(config, add_projections=False)
        self.decoder = TextDecoder(config.text_config, config.text_config.hidden_size)
        self.post_init()


class XVLMForVisualReasoning(XVLMHead, ReasoningHead):
    """X-VLM that tells whether a sentence is true of two images (NLVR2). Class 1 is true. X-VLM section 4."""

    def __init__(self, config: XVLMConfig):
        super().__init__(config)
        self.model = XVLMModel(config, add_projections=False, num_images=2)
        self.cls_head = PredictionHead(config, 2)
        self.post_init()


class XVLMForTextAssignment(XVLMHead, AssignmentHead):
    """X-VLM that tells which of two images a text belongs to, to get used to pairs before NLVR2.

    Class 0 is the first image, 1 the second, 2 neither. Of the projections it has that of images alone, by
    which it finds images that are alike.
    """

    def __init__(self, config: XVLMConfig):
        super().__init__(config)
        self.model = XVLMModel(config, num_images=2)
        self.model.text_projection = self.model.temperature = None
        self.ta_head = Projection(config.text_config.hidden_size, 3)
        self.post_init()


class XVLMForVisualEntailment(XVLMHead, EntailmentHead):
    """X-VLM that tells whether an image entails a sentence, by the classes of `config.id2label`."""

    def __init__(self, config: XVLMConfig):
        super().__init__(config)
        self.model = XVLMModel(config, add_projections=False)
        self.cls_head = PredictionHead(config, config.num_labels)
        self.post_init()


class XVLMForWeakGrounding(HeatmapHead, XVLMForRetrieval):
    """X-VLM for weakly supervised grounding: trained as for retrieval on texts of single objects, it points
    with the Grad-CAM of their match. X-VLM section 4."""

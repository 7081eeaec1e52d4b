"""ALBEF's heads for question answering, visual entailment and pair reasoning (arXiv 2107.07651, section 5).

Each learns from its labels and from a momentum teacher. R: texts, D: text width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Projection
from .configuration_albef import ALBEFConfig
from .image_text_answering import AnsweringHead
from .image_text_sentences import AssignmentHead, EntailmentHead, ReasoningHead
from .layers_bert import TextDecoder
from .modeling_albef import ALBEFHead, ALBEFModel, ALBEFPreTrainedModel
from .objectives import distilled_cross_entropy


class ALBEFLabelledHead(ALBEFHead):
    """A head that learns labels, and how likely the teacher finds others."""

    def learn(self, predict: Callable[[nn.Module], Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        """As `LabelledHead.learn`, with the teacher's soft labels at `distillation_weight`."""
        teacher, teacher_logits = self.lead_teacher(), None
        if teacher is not None and self.distillation_weight:
            with torch.no_grad():
                teacher_logits = predict(teacher)
        logits = predict(self)
        return logits, distilled_cross_entropy(logits, labels, teacher_logits, self.distillation_weight)


class ALBEFForQuestionAnswering(ALBEFLabelledHead, AnsweringHead):
    """ALBEF that writes or ranks answers: a decoder attends to the question fused with the image."""

    def __init__(self, config: ALBEFConfig):
        super().__init__(config)
        self.model = ALBEFModel(config, add_projections=False)
        self.decoder = TextDecoder(config.text_config, config.text_config.hidden_size)
        self.add_teacher("model", "decoder")


class ClassificationHead(nn.Module):
    """The two-layer head on the fused [CLS] state: (R, D) -> (R, classes)."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.fc1 = Projection(width, width)
        self.fc2 = Projection(width, classes)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(hidden_states)))


class ALBEFForVisualEntailment(ALBEFLabelledHead, EntailmentHead):
    """ALBEF that tells whether an image entails a sentence, by the classes of `config.id2label`."""

    def __init__(self, config: ALBEFConfig):
        super().__init__(config)
        self.model = ALBEFModel(config, add_projections=False)
        self.cls_head = ClassificationHead(config.text_config.hidden_size, config.num_labels)
        self.add_teacher("model", "cls_head")


class ALBEFForVisualReasoning(ALBEFLabelledHead, ReasoningHead):
    """ALBEF that tells whether a sentence is true of two images (NLVR2). Class 1 is true. ALBEF section 5."""

    def __init__(self, config: ALBEFConfig):
        super().__init__(config)
        self.model = ALBEFModel(config, add_projections=False, num_images=2)
        self.cls_head = ClassificationHead(config.text_config.hidden_size, 2)
        self.add_teacher("model", "cls_head")


class ALBEFForTextAssignment(ALBEFPreTrainedModel, AssignmentHead):
    """ALBEF that tells which of two images a text belongs to, to get used to pairs before NLVR2.

    Class 0 is the first image, 1 the second, 2 neither. ALBEF section 5.
    """

    def __init__(self, config: ALBEFConfig):
        super().__init__(config)
        self.model = ALBEFModel(config, num_images=2)
        self.ta_head = Projection(config.text_config.hidden_size, 3)
        self.post_init()

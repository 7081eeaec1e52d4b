"""Which class stands for what: one table, and the loop that tells transformers' Auto classes and ours.

`AutoModel` gives back the class that a folder was saved from, with and without this package: the base model,
or a head.
"""

from collections import OrderedDict

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForVisualQuestionAnswering,
    AutoProcessor,
)
from transformers.models.auto.auto_factory import _BaseAutoModelClass, _LazyAutoMapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from .configuration_albef import ALBEFConfig
from .configuration_butd import BUTDConfig
from .configuration_lxmert import LXMERTConfig
from .configuration_soho import SOHOConfig
from .configuration_text import VLPTextConfig
from .configuration_xvlm import XVLMConfig
from .image_processing_albef import ALBEFImageProcessor
from .image_processing_butd import BUTDImageProcessor
from .image_processing_soho import SOHOImageProcessor
from .image_processing_xvlm import XVLMImageProcessor
from .modeling_albef import ALBEFForGrounding, ALBEFForPreTraining, ALBEFForRetrieval, ALBEFModel
from .modeling_albef_tasks import (
    ALBEFForQuestionAnswering,
    ALBEFForTextAssignment,
    ALBEFForVisualEntailment,
    ALBEFForVisualReasoning,
)
from .modeling_butd import BUTDDetector
from .modeling_lxmert import LXMERTModel
from .modeling_lxmert_pretraining import LXMERTForPreTraining
from .modeling_lxmert_tasks import (
    LXMERTForGrounding,
    LXMERTForQuestionAnswering,
    LXMERTForRetrieval,
    LXMERTForVisualEntailment,
    LXMERTForVisualReasoning,
)
from .modeling_soho import SOHOModel
from .modeling_soho_pretraining import SOHOForPreTraining
from .modeling_soho_tasks import (
    SOHOForGrounding,
    SOHOForQuestionAnswering,
    SOHOForRetrieval,
    SOHOForVisualEntailment,
    SOHOForVisualReasoning,
)
from .modeling_xvlm import XVLMForGrounding, XVLMForPreTraining, XVLMForRetrieval, XVLMModel
from .modeling_xvlm_captioning import XVLMForCaptioning
from .modeling_xvlm_tasks import (
    XVLMForQuestionAnswering,
    XVLMForTextAssignment,
    XVLMForVisualEntailment,
    XVLMForVisualReasoning,
    XVLMForWeakGrounding,
)
from .processing_albef import ALBEFProcessor
from .processing_lxmert import LXMERTProcessor
from .processing_soho import SOHOProcessor
from .processing_xvlm import XVLMProcessor


class AutoModelForRetrieval(_BaseAutoModelClass):
    """Loads the retrieval head of any model of this package."""

    _model_mapping = _LazyAutoMapping(CONFIG_MAPPING_NAMES, OrderedDict())


class AutoModelForGrounding(_BaseAutoModelClass):
    """Loads the grounding head of any model of this package."""

    _model_mapping = _LazyAutoMapping(CONFIG_MAPPING_NAMES, OrderedDict())


class AutoModelForVisualReasoning(_BaseAutoModelClass):
    """Loads the pair-reasoning head (NLVR2) of any model of this package."""

    _model_mapping = _LazyAutoMapping(CONFIG_MAPPING_NAMES, OrderedDict())


class AutoModelForVisualEntailment(_BaseAutoModelClass):
    """Loads the entailment head (SNLI-VE) of any model of this package."""

    _model_mapping = _LazyAutoMapping(CONFIG_MAPPING_NAMES, OrderedDict())


class AutoModelForTextAssignment(_BaseAutoModelClass):
    """Loads the head of any model of this package that learns which of two images a text belongs to."""

    _model_mapping = _LazyAutoMapping(CONFIG_MAPPING_NAMES, OrderedDict())


class AutoModelForCaptioning(_BaseAutoModelClass):
    """Loads the head of any model of this package that writes captions."""

    _model_mapping = _LazyAutoMapping(CONFIG_MAPPING_NAMES, OrderedDict())


# config: (processor, image processor, base model, heads); None where a model has none
MODELS = {
    ALBEFConfig: (
        ALBEFProcessor,
        ALBEFImageProcessor,
        ALBEFModel,
        (
            ALBEFForPreTraining,
            ALBEFForRetrieval,
            ALBEFForQuestionAnswering,
            ALBEFForVisualEntailment,
            ALBEFForVisualReasoning,
            ALBEFForTextAssignment,
            ALBEFForGrounding,
        ),
    ),
    BUTDConfig: (None, BUTDImageProcessor, BUTDDetector, ()),
    LXMERTConfig: (
        LXMERTProcessor,
        None,
        LXMERTModel,
        (
            LXMERTForPreTraining,
            LXMERTForQuestionAnswering,
            LXMERTForVisualReasoning,
            LXMERTForVisualEntailment,
            LXMERTForRetrieval,
            LXMERTForGrounding,
        ),
    ),
    SOHOConfig: (
        SOHOProcessor,
        SOHOImageProcessor,
        SOHOModel,
        (
            SOHOForPreTraining,
            SOHOForQuestionAnswering,
            SOHOForRetrieval,
            SOHOForVisualReasoning,
            SOHOForVisualEntailment,
            SOHOForGrounding,
        ),
    ),
    XVLMConfig: (
        XVLMProcessor,
        XVLMImageProcessor,
        XVLMModel,
        (
            XVLMForPreTraining,
            XVLMForRetrieval,
            XVLMForQuestionAnswering,
            XVLMForVisualEntailment,
            XVLMForVisualReasoning,
            XVLMForTextAssignment,
            XVLMForGrounding,
            XVLMForWeakGrounding,
            XVLMForCaptioning,
        ),
    ),
}
AUTO_CLASSES = {
    auto_class.__name__: auto_class
    for auto_class in (
        AutoModelForPreTraining,
        AutoModelForVisualQuestionAnswering,
        AutoModelForRetrieval,
        AutoModelForGrounding,
        AutoModelForVisualReasoning,
        AutoModelForVisualEntailment,
        AutoModelForTextAssignment,
        AutoModelForCaptioning,
    )
}


def register():
    """Make the Auto classes know the models of this package."""
    AutoConfig.register(VLPTextConfig.model_type, VLPTextConfig, exist_ok=True)
    for config, (processor, image_processor, base_model, heads) in MODELS.items():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        if processor is not None:
            AutoProcessor.register(config, processor, exist_ok=True)
        if image_processor is not None:
            backends = dict.fromkeys(("torchvision", "pil"), image_processor)
            AutoImageProcessor.register(config, image_processor_classes=backends, exist_ok=True)
        AutoModel.register(config, (base_model, *heads), exist_ok=True)
        for name, auto_class in AUTO_CLASSES.items():
            of_task = tuple(head for head in heads if head.auto_class == name)
            if of_task:  # of several, the one a folder was saved from, or else the first
                auto_class.register(config, of_task if len(of_task) > 1 else of_task[0], exist_ok=True)

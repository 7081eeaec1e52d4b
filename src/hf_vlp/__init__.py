"""Four vision-language pre-training papers as Hugging Face models; importing registers the Auto classes."""

from .cards import write_card
from .models.auto import (
    AutoModelForCaptioning,
    AutoModelForGrounding,
    AutoModelForRetrieval,
    AutoModelForTextAssignment,
    AutoModelForVisualEntailment,
    AutoModelForVisualReasoning,
    register,
)
from .models.base import VLPPreTrainedModel
from .models.configuration_albef import ALBEFConfig
from .models.configuration_butd import BUTDConfig
from .models.configuration_lxmert import LXMERTConfig
from .models.configuration_soho import SOHOConfig
from .models.configuration_text import VLPTextConfig
from .models.configuration_xvlm import XVLMConfig
from .models.image_processing_albef import ALBEFImageProcessor
from .models.image_processing_butd import BUTDImageProcessor
from .models.image_processing_soho import SOHOImageProcessor
from .models.image_processing_xvlm import XVLMImageProcessor
from .models.modeling_albef import ALBEFForGrounding, ALBEFForPreTraining, ALBEFForRetrieval, ALBEFModel
from .models.modeling_albef_tasks import (
    ALBEFForQuestionAnswering,
    ALBEFForTextAssignment,
    ALBEFForVisualEntailment,
    ALBEFForVisualReasoning,
)
from .models.modeling_butd import BUTDDetector
from .models.modeling_lxmert import LXMERTModel
from .models.modeling_lxmert_pretraining import LXMERTForPreTraining
from .models.modeling_lxmert_tasks import (
    LXMERTForGrounding,
    LXMERTForQuestionAnswering,
    LXMERTForRetrieval,
    LXMERTForVisualEntailment,
    LXMERTForVisualReasoning,
)
from .models.modeling_soho import SOHOModel
from .models.modeling_soho_pretraining import SOHOForPreTraining
from .models.modeling_soho_tasks import (
    SOHOForGrounding,
    SOHOForQuestionAnswering,
    SOHOForRetrieval,
    SOHOForVisualEntailment,
    SOHOForVisualReasoning,
)
from .models.modeling_xvlm import XVLMForGrounding, XVLMForPreTraining, XVLMForRetrieval, XVLMModel
from .models.modeling_xvlm_captioning import XVLMForCaptioning
from .models.modeling_xvlm_tasks import (
    XVLMForQuestionAnswering,
    XVLMForTextAssignment,
    XVLMForVisualEntailment,
    XVLMForVisualReasoning,
    XVLMForWeakGrounding,
)
from .models.processing_albef import ALBEFProcessor
from .models.processing_lxmert import LXMERTProcessor
from .models.processing_soho import SOHOProcessor
from .models.processing_xvlm import XVLMProcessor
from .pipelines import pipeline
from .pipelines import register as register_pipelines

register()
register_pipelines()
VLPPreTrainedModel.write_card = write_card  # handed in, since `models/` goes to the Hub without the rest


def __getattr__(name: str):
    """On first use: the Trainer needs `datasets` and `accelerate`, which prediction goes without."""
    if name in ("VLPTrainer", "VLPTrainingArguments"):
        from . import training

        return getattr(training, name)
    if name == "predict":
        from .prediction import predict

        return predict
    if name == "RetrievalIndex":
        from .retrieval_index import RetrievalIndex

        return RetrievalIndex
    if name == "load_head":
        from .heads import load_head

        return load_head
    if name == "export_onnx":
        from .onnx_export import export_onnx

        return export_onnx
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = "0.1.0"
__all__ = [
    "ALBEFConfig",
    "ALBEFForGrounding",
    "ALBEFForPreTraining",
    "ALBEFForQuestionAnswering",
    "ALBEFForRetrieval",
    "ALBEFForTextAssignment",
    "ALBEFForVisualEntailment",
    "ALBEFForVisualReasoning",
    "ALBEFImageProcessor",
    "ALBEFModel",
    "ALBEFProcessor",
    "AutoModelForCaptioning",
    "AutoModelForGrounding",
    "AutoModelForRetrieval",
    "AutoModelForTextAssignment",
    "AutoModelForVisualEntailment",
    "AutoModelForVisualReasoning",
    "BUTDConfig",
    "BUTDDetector",
    "BUTDImageProcessor",
    "LXMERTConfig",
    "LXMERTForGrounding",
    "LXMERTForPreTraining",
    "LXMERTForQuestionAnswering",
    "LXMERTForRetrieval",
    "LXMERTForVisualEntailment",
    "LXMERTForVisualReasoning",
    "LXMERTModel",
    "LXMERTProcessor",
    "RetrievalIndex",
    "SOHOConfig",
    "SOHOForGrounding",
    "SOHOForPreTraining",
    "SOHOForQuestionAnswering",
    "SOHOForRetrieval",
    "SOHOForVisualEntailment",
    "SOHOForVisualReasoning",
    "SOHOImageProcessor",
    "SOHOModel",
    "SOHOProcessor",
    "VLPTextConfig",
    "VLPTrainer",
    "VLPTrainingArguments",
    "XVLMConfig",
    "XVLMForCaptioning",
    "XVLMForGrounding",
    "XVLMForPreTraining",
    "XVLMForQuestionAnswering",
    "XVLMForRetrieval",
    "XVLMForTextAssignment",
    "XVLMForVisualEntailment",
    "XVLMForVisualReasoning",
    "XVLMForWeakGrounding",
    "XVLMImageProcessor",
    "XVLMModel",
    "XVLMProcessor",
    "export_onnx",
    "load_head",
    "pipeline",
    "predict",
]

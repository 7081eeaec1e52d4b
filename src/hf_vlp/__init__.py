"""Four vision-language pre-training papers as Hugging Face models; importing registers the Auto classes."""

from .models.auto import AutoModelForGrounding, AutoModelForRetrieval, register
from .models.configuration_text import VLPTextConfig
from .models.configuration_xvlm import XVLMConfig
from .models.image_processing_xvlm import XVLMImageProcessor
from .models.modeling_xvlm import XVLMForGrounding, XVLMForPreTraining, XVLMForRetrieval, XVLMModel
from .models.processing_xvlm import XVLMProcessor

register()


def __getattr__(name: str):
    """The Trainer's classes on first use: they bring `datasets` and `accelerate`, which prediction does not
    need."""
    if name in ("VLPTrainer", "VLPTrainingArguments"):
        from . import training

        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = "0.1.0"
__all__ = [
    "AutoModelForGrounding",
    "AutoModelForRetrieval",
    "VLPTextConfig",
    "VLPTrainer",
    "VLPTrainingArguments",
    "XVLMConfig",
    "XVLMForGrounding",
    "XVLMForPreTraining",
    "XVLMForRetrieval",
    "XVLMImageProcessor",
    "XVLMModel",
    "XVLMProcessor",
]

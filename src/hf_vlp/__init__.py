"""Four vision-language pre-training papers as Hugging Face models; importing registers the Auto classes."""

from .models.auto import AutoModelForGrounding, AutoModelForRetrieval, register
from .models.configuration_text import VLPTextConfig
from .models.configuration_xvlm import XVLMConfig
from .models.image_processing_xvlm import XVLMImageProcessor
from .models.modeling_xvlm import XVLMForGrounding, XVLMForPreTraining, XVLMForRetrieval, XVLMModel
from .models.processing_xvlm import XVLMProcessor

register()

__version__ = "0.1.0"
__all__ = [
    "AutoModelForGrounding",
    "AutoModelForRetrieval",
    "VLPTextConfig",
    "XVLMConfig",
    "XVLMForGrounding",
    "XVLMForPreTraining",
    "XVLMForRetrieval",
    "XVLMImageProcessor",
    "XVLMModel",
    "XVLMProcessor",
]

"""What the examples of SOHO share: a tiny new model that knows the words of drawn scenes."""

from transformers import PreTrainedModel, ResNetConfig

from hf_vlp import SOHOConfig, SOHOImageProcessor, SOHOProcessor
from hf_vlp.data.scenes import LEVELS
from hf_vlp.data.shapes import vocabulary
from hf_vlp.quickstart import word_tokenizer

LEVEL, IMAGE_SIZE = LEVELS[0], 64  # 4 x 4 cells, as the tiny trunk has two stages
ANSWERS = ["no", "yes", "zero", "one", "two", "three", *LEVEL.colours, *LEVEL.shapes]
# Weights of 0.02, right for a width of 768, are too quiet for one of 64
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "initializer_range": 0.1,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "classifier_dropout": 0.0,
    "max_position_embeddings": 64,
    "vd_size": 64,
    "mvm_prob": 0.15,
    "mvm_pick": "location",  # scenes have few things: one entry of many is often all that a text is about
    "frozen_stages": -1,  # the trunk is new
}


def tiny_soho(head: type[PreTrainedModel]) -> tuple[PreTrainedModel, SOHOProcessor]:
    """A new head after the paper's preset, and its processor."""
    tokenizer = word_tokenizer(vocabulary())
    trunk = ResNetConfig(embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic")
    answers = {"answers": ANSWERS, "num_answers": len(ANSWERS)}
    config = SOHOConfig.paper(backbone_config=trunk, vocab_size=len(tokenizer), **answers, **SIZES)
    size = {"shortest_edge": IMAGE_SIZE, "longest_edge": IMAGE_SIZE}
    return head(config), SOHOProcessor(SOHOImageProcessor(size=size), tokenizer, max_tokens=32)

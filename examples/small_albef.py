"""What the examples of ALBEF share, some of them X-VLM's too: a tiny new model that knows the words of drawn
scenes, a model to start from, rows of files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
from transformers import AutoConfig, AutoProcessor, PreTrainedModel, ProcessorMixin, ViTConfig

from hf_vlp import ALBEFConfig, ALBEFImageProcessor, ALBEFProcessor, VLPTextConfig, load_head
from hf_vlp.data.shapes import vocabulary
from hf_vlp.quickstart import word_tokenizer
from hf_vlp.training import RECIPES

# 36 patches of 8 pixels; weights of 0.02, right for a width of 768, are too quiet for one of 64
SIZE = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "initializer_range": 0.1}
VISION = SIZE | {"image_size": 48, "patch_size": 8, "num_hidden_layers": 2}
TEXT = SIZE | {"num_text_layers": 2, "num_fusion_layers": 2, "num_decoder_layers": 2}
TEXT |= {"max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

TRAINING_SCENES = 20_000
SCHEDULE_ON_SHAPES = {
    "max_steps": 800,
    "per_device_train_batch_size": 64,
    "learning_rate": 5e-4,
    "warmup_steps": 50,
    "lr_scheduler_type": "cosine",
    "alpha_ramp_epochs": 1.0,
    "logging_steps": 50,
    "save_strategy": "no",
}


def tiny_albef(head: type[PreTrainedModel]) -> tuple[PreTrainedModel, ALBEFProcessor]:
    """A new head with its momentum teacher, and its processor."""
    tokenizer = word_tokenizer(vocabulary())
    ends = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}  # of answers
    config = ALBEFConfig(
        vision_config=ViTConfig(**VISION),
        text_config=VLPTextConfig(vocab_size=len(tokenizer), **ends, **TEXT),
        projection_dim=64,
        queue_size=64,  # the scenes of level 0 have only some 2,000 captions, so that more would repeat
        momentum=0.99,  # so that the teacher follows within so few steps
    )
    size = {"height": VISION["image_size"], "width": VISION["image_size"]}
    return head(config), ALBEFProcessor(ALBEFImageProcessor(size=size), tokenizer)


def load_start(
    task: str, head: type[PreTrainedModel], name: str | None, image_size: int | None
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The head for `task` of the ALBEF, with its teacher, or X-VLM in `name`, and its processor; without a
    name the tiny new `head`."""
    if name is None:
        return tiny_albef(head)
    processor = AutoProcessor.from_pretrained(name, image_size=image_size)
    return load_head(task, name, needs_weights=False, teacher=True, image_size=image_size), processor


def schedule_for(name: str | None, has_own_rows: bool, **recipes: str) -> dict[str, Any]:
    """The schedule of one's own rows, by the recipe of the paper ("albef", "xvlm") of the model in `name`,
    or of drawn scenes; X-VLM has no teacher whose weight could rise."""
    model_type = ALBEFConfig.model_type if name is None else AutoConfig.from_pretrained(name).model_type
    if has_own_rows:
        return RECIPES[recipes[model_type.removeprefix("vlp_")]]
    is_albef = model_type == ALBEFConfig.model_type
    return SCHEDULE_ON_SHAPES if is_albef else SCHEDULE_ON_SHAPES | {"alpha_ramp_epochs": 0.0}


def read_rows(
    paths: Sequence[str], read_lists: Callable[[Sequence[str]], datasets.Dataset]
) -> datasets.Dataset:
    """Rows of folders that `Dataset.save_to_disk` wrote, of parquet files, or of ALBEF's JSON lists."""
    if Path(paths[0], "state.json").is_file():
        return datasets.concatenate_datasets([datasets.load_from_disk(path) for path in paths])
    if paths[0].endswith(".parquet"):
        return datasets.load_dataset("parquet", data_files=list(paths), split="train")
    return read_lists(paths)

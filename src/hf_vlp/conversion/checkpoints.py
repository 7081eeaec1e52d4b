"""From an official file to a folder that `from_pretrained` reads: the steps that every paper shares."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

from ..cards import write_card
from ..folders import new_folder
from ..models.base import VLPPreTrainedModel
from .keys import KeyReport, read_state_dict


@dataclass
class Conversion:
    """A converted model, and what became of each key of its checkpoint."""

    model: VLPPreTrainedModel
    report: KeyReport


class OfficialWeights(dict[str, Tensor]):
    """Tensors by name, where an absent one is a `ValueError` that names it."""

    def __missing__(self, name: str) -> Tensor:
        raise ValueError(f"the checkpoint has no {name}; it is incomplete or of another model")


def write_folder(
    checkpoint: str | Path,
    output_dir: str | Path,
    convert: Callable[[Mapping[str, Tensor]], Conversion],
    processor_class: type[ProcessorMixin],
    tokenizer: str | Path | PreTrainedTokenizerBase,
    image_size: int | None = None,
    **save_options,
) -> KeyReport:
    """Write a folder with model, processor, code and card, or nothing.

    Args:
        checkpoint: the official file.
        output_dir: a folder that does not exist yet, or is empty.
        convert: from the tensors of the file to our model.
        processor_class: has `from_config(config, tokenizer)`.
        tokenizer: the tokenizer the text encoder was trained with; a name, a folder, or the tokenizer itself.
        image_size: resample the trunk's position tables to this size in pixels.
        save_options: passed to the model's `save_pretrained`.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: as `convert`; a file that cannot be read; a folder that is not empty; a tokenizer that
            does not fit the word embeddings.
    """
    with new_folder(output_dir) as folder:
        converted = convert(read_state_dict(checkpoint))
        if image_size is not None:
            converted.model.set_image_size(image_size)
        config = converted.model.config
        text_config = config.get_text_config()
        tokenizer = _load_tokenizer(tokenizer, text_config)
        if hasattr(text_config, "bos_token_id"):  # what a decoder writes
            text_config.bos_token_id = tokenizer.cls_token_id
            text_config.eos_token_id = tokenizer.sep_token_id
        config.converted_from = converted.report.provenance(checkpoint)
        converted.model.save_pretrained(folder, **save_options)
        write_card(converted.model, folder)
        processor_class.from_config(config, tokenizer).save_pretrained(folder)
    return converted.report


def _load_tokenizer(
    tokenizer: str | Path | PreTrainedTokenizerBase, text_config: PreTrainedConfig
) -> PreTrainedTokenizerBase:
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(tokenizer))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"tokenizer={str(tokenizer)!r} cannot be loaded; give the name or the folder of the "
                "tokenizer that the text encoder was trained with (bert-base-uncased for the released files)"
            ) from error
    if len(tokenizer) > text_config.vocab_size:
        raise ValueError(
            f"tokenizer has {len(tokenizer)} tokens, but the checkpoint embeds {text_config.vocab_size}; "
            "give the tokenizer that the text encoder was trained with"
        )
    if getattr(text_config, "position_offset", 0) and tokenizer.pad_token_id != text_config.pad_token_id:
        raise ValueError(
            f"tokenizer pads with {tokenizer.pad_token_id}, but the text encoder is a RoBERTa, which pads "
            f"with {text_config.pad_token_id}; give the tokenizer that it was trained with (roberta-base)"
        )
    return tokenizer

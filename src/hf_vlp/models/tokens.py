"""Special tokens around texts."""

import copy

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast


def with_special_tokens(
    tokenizer: PreTrainedTokenizerFast | None, ends_in_sep: bool
) -> PreTrainedTokenizerFast | None:
    """A copy of the tokenizer that reads a text as `[CLS] words`, or as `[CLS] words [SEP]`.

    Raises:
        ValueError: the tokenizer is a slow one, or has no such tokens.
    """
    if tokenizer is None:
        return None
    cls, sep = tokenizer.cls_token, tokenizer.sep_token
    if cls is None or sep is None or not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer is a {type(tokenizer).__name__} with cls_token={cls} and sep_token={sep}; give a "
            "fast one that has both, such as BERT's, RoBERTa's or XLM-R's"
        )
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{cls} $A {sep}" if ends_in_sep else f"{cls} $A",
        special_tokens=[(cls, tokenizer.cls_token_id), (sep, tokenizer.sep_token_id)],
    )
    return tokenizer

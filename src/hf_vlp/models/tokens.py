"""Special tokens around texts."""

import copy

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast


def with_special_tokens(
    tokenizer: PreTrainedTokenizerFast | None, ends_in_sep: bool
) -> PreTrainedTokenizerFast | None:
    """A copy of the tokenizer that reads a text as `[CLS] words`, or as `[CLS] words [SEP]`."""
    if tokenizer is None:
        return None
    tokenizer = copy.deepcopy(tokenizer)
    cls, sep = tokenizer.cls_token, tokenizer.sep_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{cls} $A {sep}" if ends_in_sep else f"{cls} $A",
        special_tokens=[(cls, tokenizer.cls_token_id), (sep, tokenizer.sep_token_id)],
    )
    return tokenizer

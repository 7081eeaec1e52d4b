"""LXMERT checkpoints, official ones and those of transformers, to ours and back to the official layout.

Kinds are read from the keys: pretraining (`*_LXRT.pth`), VQA and GQA, NLVR2. Below their prefixes all three
layouts have the same names.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..models.configuration_lxmert import LXMERTConfig
from ..models.modeling_lxmert import LXMERTModel, LXMERTPreTrainedModel
from ..models.modeling_lxmert_pretraining import LXMERTForPreTraining
from ..models.modeling_lxmert_tasks import LXMERTForQuestionAnswering, LXMERTForVisualReasoning
from ..models.processing_lxmert import LXMERTProcessor
from .bert import count_layers
from .checkpoints import Conversion, OfficialWeights, write_folder
from .detect import refuse_other_papers
from .keys import KeyReport, load_into, rename_keys

_BODY = r"(?:lxrt_encoder\.model\.(?:module\.)?)?(?:bert|lxmert)\."
_KEYS = {
    r"cls\.predictions\.decoder\.weight": "lxmert.embeddings.word_embeddings.weight",  # tied
    _BODY + r"((?:embeddings|encoder|pooler)\..+)": r"lxmert.\1",
    r"((?:cls|obj_predict_head|answer_head)\..+)": r"\1",
}
_TASK_HEADS = {
    LXMERTForQuestionAnswering: {r"(logit_fc\..+)": r"answer_head.\1"},
    LXMERTForVisualReasoning: {r"(?:answer_head\.)?(logit_fc\..+)": r"cls_head.\1"},
}


def convert_state_dict(
    official: Mapping[str, Tensor],
    num_attention_heads: int | None = None,
    answers: Sequence[str] | None = None,
) -> Conversion:
    """Weights of the official code or of transformers' LXMERT to our model; kind and sizes are read from
    them.

    Args:
        official: the tensors.
        num_attention_heads: cannot be read from tensors; heads are 64 wide without it.
        answers: strings of the answer head's classes, which the files do not hold: the official
            `all_ans.json` for pretraining, `trainval_label2ans.json` for VQA and GQA.

    Raises:
        ValueError: the weights belong to another model, are incomplete, or do not fit; `answers` are not as
            many as classes, or given for NLVR2.
    """
    refuse_other_papers(official, "LXMERT")
    body = _body(official)
    model_class = _detect(official, len(body["pooler.dense.bias"]))
    config = _read_config(official, body, model_class, num_attention_heads, answers)
    model = model_class(config)
    table = _TASK_HEADS.get(model_class, {}) | _KEYS
    renamed, report = rename_keys(official, table, _dropped(model_class, config))
    if model_class is LXMERTModel:
        renamed = {name.removeprefix("lxmert."): value for name, value in renamed.items()}
    load_into(model, renamed, report)
    return Conversion(model.eval(), report)


def convert_checkpoint(
    checkpoint: str | Path,
    output_dir: str | Path,
    tokenizer: str | Path | PreTrainedTokenizerBase = "bert-base-uncased",
    num_attention_heads: int | None = None,
    answers: Sequence[str] | None = None,
) -> KeyReport:
    """Convert a file into a folder with model, processor and code, or write nothing.

    Args:
        checkpoint: an official `.pth` file, or the weights of a folder of transformers' LXMERT.
        output_dir: a folder that does not exist yet, or is empty.
        tokenizer: the tokenizer the model was trained with; a name, a folder, or the tokenizer itself.
        num_attention_heads: where heads are not 64 wide.
        answers: strings of the answer head's classes, see `convert_state_dict`.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: as `convert_state_dict`; a file that cannot be read; a folder that is not empty; a
            tokenizer that does not fit the word embeddings.
    """
    convert = partial(convert_state_dict, num_attention_heads=num_attention_heads, answers=answers)
    return write_folder(checkpoint, output_dir, convert, LXMERTProcessor, tokenizer)


def official_state_dict(model: LXMERTPreTrainedModel) -> dict[str, Tensor]:
    """The weights of a head under the official names: what the official code loads.

    Heads that read only the pooled state lack the last layer's region branch, which the official code leaves
    as it is.

    Raises:
        ValueError: the official code has no such head.
    """
    if isinstance(model, LXMERTForPreTraining):
        prefixes = {"lxmert.": "bert."}
    elif isinstance(model, (LXMERTForQuestionAnswering, LXMERTForVisualReasoning)):
        prefixes = {"lxmert.": "lxrt_encoder.model.bert.", "answer_head.": "", "cls_head.": ""}
    else:
        raise ValueError(
            f"model is {type(model).__name__}, for which the official code has no head; give a model of "
            "pretraining, question answering or visual reasoning"
        )
    pattern = re.compile("|".join(map(re.escape, prefixes)))
    return {
        pattern.sub(lambda match: prefixes[match[0]], name, count=1): value
        for name, value in model.state_dict().items()
    }


def _body(official: Mapping[str, Tensor]) -> OfficialWeights:
    """The encoder's tensors without prefix."""
    pattern = re.compile(_BODY + "(.+)")
    matches = {key: pattern.fullmatch(key) for key in official}
    return OfficialWeights({match[1]: official[key] for key, match in matches.items() if match})


def _detect(official: Mapping[str, Tensor], hidden_size: int) -> type[LXMERTPreTrainedModel]:
    if "cls.predictions.bias" in official:
        return LXMERTForPreTraining
    for prefix in ("logit_fc.", "answer_head.logit_fc."):
        if f"{prefix}0.weight" in official:
            reads_pairs = official[f"{prefix}0.weight"].shape[1] == 2 * hidden_size
            return LXMERTForVisualReasoning if reads_pairs else LXMERTForQuestionAnswering
    return LXMERTModel


def _dropped(model_class: type[LXMERTPreTrainedModel], config: LXMERTConfig) -> dict[str, str]:
    if model_class in (LXMERTForPreTraining, LXMERTModel):
        return {}
    last = rf".*\.x_layers\.{config.x_layers - 1}\.visn_(self_att|inter|output)\..*"
    return {last: "of the last layer, whose regions the head does not read"}


def _read_config(
    official: Mapping[str, Tensor],
    body: OfficialWeights,
    model_class: type[LXMERTPreTrainedModel],
    num_attention_heads: int | None,
    answers: Sequence[str] | None,
) -> LXMERTConfig:
    vocab_size, hidden_size = body["embeddings.word_embeddings.weight"].shape
    fields = {}
    if model_class is LXMERTForPreTraining:
        weights = OfficialWeights(official)
        fields["num_object_labels"] = len(weights["obj_predict_head.decoder_dict.obj.bias"])
        fields["num_attr_labels"] = len(weights["obj_predict_head.decoder_dict.attr.bias"])
        fields["num_qa_labels"] = len(weights["answer_head.logit_fc.3.bias"])
    elif model_class is LXMERTForQuestionAnswering:
        key = next(key for key in official if key.endswith("logit_fc.3.bias"))
        fields["num_qa_labels"] = len(official[key])
    if answers is not None:
        if "num_qa_labels" not in fields:
            raise ValueError("answers is given, but the checkpoint chooses among no answers; leave it out")
        fields["answers"] = list(answers)
    return LXMERTConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads or max(hidden_size // 64, 1),
        intermediate_size=len(body["encoder.layer.0.intermediate.dense.bias"]),
        max_position_embeddings=len(body["embeddings.position_embeddings.weight"]),
        type_vocab_size=len(body["embeddings.token_type_embeddings.weight"]),
        l_layers=count_layers(body, "encoder.layer."),
        r_layers=count_layers(body, "encoder.r_layers."),
        x_layers=count_layers(body, "encoder.x_layers."),
        visual_feat_dim=body["encoder.visn_fc.visn_fc.weight"].shape[1],
        visual_pos_dim=body["encoder.visn_fc.box_fc.weight"].shape[1],
        **fields,
    )

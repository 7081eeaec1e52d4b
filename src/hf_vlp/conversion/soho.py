"""Official SOHO checkpoints: pretraining and question answering, with any ResNet."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase, ResNetConfig

from ..models.configuration_soho import SOHOConfig
from ..models.modeling_soho import SOHOPreTrainedModel
from ..models.modeling_soho_pretraining import SOHOForPreTraining
from ..models.modeling_soho_tasks import SOHOForQuestionAnswering
from ..models.processing_soho import SOHOProcessor
from .bert import count_layers
from .checkpoints import Conversion, OfficialWeights, write_folder
from .detect import refuse_other_papers
from .keys import KeyReport, load_into, rename_keys

_BACKBONE = "model.backbone."
_NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
_CONVOLUTIONS = {  # of a block, by their number
    rf"backbone\.layer{stage}\.(\d+)\.{kind}{number}\.{rest}": (
        rf"{_BACKBONE}encoder.stages.{stage - 1}.layers.\1.layer.{number - 1}.{name}.\2"
    )
    for stage in range(1, 5)
    for number in range(1, 4)
    for kind, rest, name in (("conv", "(weight)", "convolution"), ("bn", _NORM, "normalization"))
}
_SHORTCUTS = {
    rf"backbone\.layer{stage}\.0\.downsample\.{number}\.{rest}": (
        rf"{_BACKBONE}encoder.stages.{stage - 1}.layers.0.shortcut.{name}.\1"
    )
    for stage in range(1, 5)
    for number, rest, name in ((0, "(weight)", "convolution"), (1, _NORM, "normalization"))
}
_KEYS = {
    r"backbone\.conv1\.weight": _BACKBONE + "embedder.embedder.convolution.weight",
    r"backbone\.bn1\." + _NORM: _BACKBONE + r"embedder.embedder.normalization.\1",
    **_CONVOLUTIONS,
    **_SHORTCUTS,
    r"neck\.conv\.conv\.weight": "model.visual_projection.convolution.weight",
    r"neck\.conv\.bn\." + _NORM: r"model.visual_projection.normalization.\1",
    r"neck\.ln\.(weight|bias)": r"model.visual_layer_norm.\1",
    r"neck\.mask_emb\.weight": "visual_mask_embedding",
    r"neck\.vq\.embed": "model.visual_dictionary.embeddings",
    r"neck\.vq\.embed_avg": "model.visual_dictionary.ema_sum",
    r"neck\.vq\.cluster_size": "model.visual_dictionary.ema_count",
    r"neck\.vq\.cluster_sum": "model.visual_dictionary.usage",
    r"neck\.pos_line\.(weight|bias)": r"model.visual_dictionary_projection.\1",
    r"neck\.gate_fc\.conv\.weight": "model.visual_gate.convolution.weight",
    r"neck\.gate_fc\.bn\." + _NORM: r"model.visual_gate.normalization.\1",
    r"language\.bert\.embeddings\.(.+)": r"model.text_embeddings.\1",
    r"language\.bert\.encoder\.(layer\..+)": r"model.\1",
    r"mask_l_fc\.weight": "model.text_embeddings.word_embeddings.weight",  # tied
    r"head\.match_class\.weight": "itm_head.weight",
    r"head\.vqa\.0\.(weight|bias)": r"answer_head.dense.\1",
    r"head\.vqa\.3\.(weight|bias)": r"answer_head.out_proj.\1",
}


def convert_state_dict(
    official: Mapping[str, Tensor],
    num_attention_heads: int | None = None,
    answers: Sequence[str] | None = None,
) -> Conversion:
    """Official weights to our model; kind, trunk and sizes are read from the tensors.

    Args:
        official: the tensors.
        num_attention_heads: cannot be read from tensors; heads are 64 wide without it.
        answers: strings of the answer head's classes, which the files do not hold: `label2ans` of the VQA
            annotations.

    Raises:
        ValueError: the weights belong to another model or kind, are incomplete, or do not fit; `answers` are
            not as many as classes, or given for pretraining.
    """
    refuse_other_papers(official, "SOHO")
    weights = OfficialWeights(official)
    model_class = _detect(weights)
    model = model_class(_read_config(weights, num_attention_heads, answers))
    renamed, report = rename_keys(official, _KEYS, {})
    for name, value in renamed.items():
        if name.endswith("visual_mask_embedding"):
            renamed[name] = value[0]
        elif name.endswith("visual_gate.convolution.weight"):
            renamed[name] = value[..., 0]  # 1 x 1 in two dimensions
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
        checkpoint: the official `.pth` file.
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
    return write_folder(checkpoint, output_dir, convert, SOHOProcessor, tokenizer)


def _detect(weights: OfficialWeights) -> type[SOHOPreTrainedModel]:
    if "head.match_class.weight" in weights:
        return SOHOForPreTraining
    if "head.vqa.0.weight" in weights:
        return SOHOForQuestionAnswering
    raise ValueError(
        f"the checkpoint has no head of a SOHO file (its first keys are {list(weights)[:3]}); give one of "
        "pretraining or question answering"
    )


def _read_config(
    weights: OfficialWeights, num_attention_heads: int | None, answers: Sequence[str] | None
) -> SOHOConfig:
    vocab_size, hidden_size = weights["language.bert.embeddings.word_embeddings.weight"].shape
    fields = {"visual_fusion": "none"}
    if "neck.vq.embed" in weights:
        fields = {"visual_fusion": "gate" if "neck.gate_fc.conv.weight" in weights else "add"}
        fields["vd_size"] = len(weights["neck.vq.embed"])
    if "head.vqa.3.bias" in weights:
        fields["num_answers"] = len(weights["head.vqa.3.bias"])
    if answers is not None:
        if len(answers) != fields.get("num_answers", 0):
            raise ValueError(
                f"answers holds {len(answers)} strings, but the checkpoint chooses among "
                f"{fields.get('num_answers', 'no')} answers; give as many, or leave it out"
            )
        fields["answers"] = list(answers)
    return SOHOConfig(
        backbone_config=_read_backbone(weights),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=count_layers(weights, "language.bert.encoder.layer."),
        num_attention_heads=num_attention_heads or max(hidden_size // 64, 1),
        intermediate_size=len(weights["language.bert.encoder.layer.0.intermediate.dense.bias"]),
        max_position_embeddings=len(weights["language.bert.embeddings.position_embeddings.weight"]),
        type_vocab_size=len(weights["language.bert.embeddings.token_type_embeddings.weight"]),
        **fields,
    )


def _read_backbone(weights: OfficialWeights) -> ResNetConfig:
    is_bottleneck = "backbone.layer1.0.conv3.weight" in weights
    last = "conv3" if is_bottleneck else "conv2"
    return ResNetConfig(
        embedding_size=len(weights["backbone.conv1.weight"]),
        hidden_sizes=[len(weights[f"backbone.layer{stage}.0.{last}.weight"]) for stage in range(1, 5)],
        depths=[count_layers(weights, f"backbone.layer{stage}.") for stage in range(1, 5)],
        layer_type="bottleneck" if is_bottleneck else "basic",
    )

"""Every head in tiny, in memory and as folders, for the tests of what is done with heads."""

from pathlib import Path

from tiny import (
    tiny_albef_config,
    tiny_albef_processor,
    tiny_config,
    tiny_lxmert_config,
    tiny_lxmert_processor,
    tiny_processor,
    tiny_soho_config,
    tiny_soho_processor,
)

from hf_vlp import (
    ALBEFForGrounding,
    ALBEFForPreTraining,
    ALBEFForQuestionAnswering,
    ALBEFForRetrieval,
    ALBEFForVisualEntailment,
    ALBEFForVisualReasoning,
    LXMERTForGrounding,
    LXMERTForPreTraining,
    LXMERTForQuestionAnswering,
    LXMERTForRetrieval,
    LXMERTForVisualEntailment,
    LXMERTForVisualReasoning,
    SOHOForGrounding,
    SOHOForPreTraining,
    SOHOForQuestionAnswering,
    SOHOForRetrieval,
    SOHOForVisualEntailment,
    SOHOForVisualReasoning,
    XVLMForGrounding,
    XVLMForPreTraining,
    XVLMForQuestionAnswering,
    XVLMForRetrieval,
    XVLMForVisualEntailment,
    XVLMForVisualReasoning,
)

ALBEF = (
    ALBEFForPreTraining,
    ALBEFForRetrieval,
    ALBEFForGrounding,
    ALBEFForQuestionAnswering,
    ALBEFForVisualEntailment,
    ALBEFForVisualReasoning,
)
LXMERT = (
    LXMERTForPreTraining,
    LXMERTForRetrieval,
    LXMERTForGrounding,
    LXMERTForQuestionAnswering,
    LXMERTForVisualEntailment,
    LXMERTForVisualReasoning,
)
SOHO = (
    SOHOForPreTraining,
    SOHOForRetrieval,
    SOHOForGrounding,
    SOHOForQuestionAnswering,
    SOHOForVisualEntailment,
    SOHOForVisualReasoning,
)
XVLM = (
    XVLMForPreTraining,
    XVLMForRetrieval,
    XVLMForGrounding,
    XVLMForQuestionAnswering,
    XVLMForVisualEntailment,
    XVLMForVisualReasoning,
)

LXMERT_ANSWERS = ["yes", "no", "red", "blue", "1", "2"]
LXMERT_FEATURES = 16  # width of those of `save_trunk("vit")`


def make_head(head):
    """A head with new weights and no teacher, and its processor, LXMERT's without extractor."""
    if head in ALBEF:
        return head(tiny_albef_config(momentum_teacher=False)).eval(), tiny_albef_processor()
    if head in LXMERT:
        config = tiny_lxmert_config(visual_feat_dim=LXMERT_FEATURES, answers=LXMERT_ANSWERS)
        return head(config).eval(), tiny_lxmert_processor()
    if head in SOHO:
        config = tiny_soho_config(answers=LXMERT_ANSWERS, num_labels=3)
        return head(config).eval(), tiny_soho_processor()
    return head(tiny_config()).eval(), tiny_processor()


def save_heads(folder: Path, *heads) -> Path:
    """Each in a folder of its name."""
    for head in heads:
        for part in make_head(head):
            part.save_pretrained(folder / head.__name__)
    return folder

"""One table of models and heads, and the checks that all of them pass."""

import json
import math
import re
import subprocess
import sys

import datasets
import pytest
import torch
from tiny import (
    answer_batch,
    assignment_batch,
    canvas_answer_batch,
    canvas_entailment_batch,
    canvas_grounding_batch,
    canvas_pair_batch,
    canvas_retrieval_batch,
    canvas_text_batch,
    caption_batch,
    entailment_batch,
    grounding_batch,
    image_batch,
    lxmert_pretraining_batch,
    pretraining_batch,
    reasoning_batch,
    region_batch,
    retrieval_batch,
    soft_answer_batch,
    soho_pretraining_batch,
    text_batch,
    tiny_albef_config,
    tiny_albef_processor,
    tiny_clip_config,
    tiny_config,
    tiny_lxmert_config,
    tiny_lxmert_processor,
    tiny_processor,
    tiny_soho_config,
    tiny_soho_processor,
    visual_entailment_batch,
    visual_grounding_batch,
    visual_pair_batch,
    visual_retrieval_batch,
    visual_text_batch,
)
from transformers import (
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForVisualQuestionAnswering,
    AutoProcessor,
)

import hf_vlp
from hf_vlp import (
    AutoModelForCaptioning,
    AutoModelForGrounding,
    AutoModelForRetrieval,
    AutoModelForTextAssignment,
    AutoModelForVisualEntailment,
    AutoModelForVisualReasoning,
)
from hf_vlp.models.momentum import FeatureQueue
from hf_vlp.training import VLPTrainer, VLPTrainingArguments


def _model_batch(padding: int = 0):
    return {**image_batch(4), **text_batch(4, padding=padding)}


def _image_pretraining(padding: int = 0, rows: int = 4):
    return pretraining_batch(rows, padding)


# name: (class, its own Auto class, batch)
CASES = {
    "xvlm": (hf_vlp.XVLMModel, AutoModel, _model_batch),
    "xvlm-pretraining-images": (hf_vlp.XVLMForPreTraining, AutoModelForPreTraining, _image_pretraining),
    "xvlm-pretraining-regions": (hf_vlp.XVLMForPreTraining, AutoModelForPreTraining, region_batch),
    "xvlm-retrieval": (hf_vlp.XVLMForRetrieval, AutoModelForRetrieval, retrieval_batch),
    "xvlm-grounding": (hf_vlp.XVLMForGrounding, AutoModelForGrounding, grounding_batch),
    "xvlm-weak-grounding": (hf_vlp.XVLMForWeakGrounding, AutoModelForGrounding, retrieval_batch),
    "xvlm-answering": (hf_vlp.XVLMForQuestionAnswering, AutoModelForVisualQuestionAnswering, answer_batch),
    "xvlm-entailment": (hf_vlp.XVLMForVisualEntailment, AutoModelForVisualEntailment, entailment_batch),
    "xvlm-reasoning": (hf_vlp.XVLMForVisualReasoning, AutoModelForVisualReasoning, reasoning_batch),
    "xvlm-assignment": (hf_vlp.XVLMForTextAssignment, AutoModelForTextAssignment, assignment_batch),
    "xvlm_clip": (hf_vlp.XVLMModel, AutoModel, _model_batch),  # and with RoBERTa
    "xvlm_clip-pretraining-images": (hf_vlp.XVLMForPreTraining, AutoModelForPreTraining, _image_pretraining),
    "xvlm_clip-pretraining-regions": (hf_vlp.XVLMForPreTraining, AutoModelForPreTraining, region_batch),
    "xvlm-captioning": (hf_vlp.XVLMForCaptioning, AutoModelForCaptioning, caption_batch),
    "albef": (hf_vlp.ALBEFModel, AutoModel, _model_batch),
    "albef-pretraining": (hf_vlp.ALBEFForPreTraining, AutoModelForPreTraining, _image_pretraining),
    "albef-retrieval": (hf_vlp.ALBEFForRetrieval, AutoModelForRetrieval, retrieval_batch),
    "albef-grounding": (hf_vlp.ALBEFForGrounding, AutoModelForGrounding, retrieval_batch),
    "albef-answering": (
        hf_vlp.ALBEFForQuestionAnswering,
        AutoModelForVisualQuestionAnswering,
        answer_batch,
    ),
    "albef-entailment": (hf_vlp.ALBEFForVisualEntailment, AutoModelForVisualEntailment, entailment_batch),
    "albef-reasoning": (hf_vlp.ALBEFForVisualReasoning, AutoModelForVisualReasoning, reasoning_batch),
    "albef-assignment": (hf_vlp.ALBEFForTextAssignment, AutoModelForTextAssignment, assignment_batch),
    "lxmert": (hf_vlp.LXMERTModel, AutoModel, visual_text_batch),
    "lxmert-pretraining": (hf_vlp.LXMERTForPreTraining, AutoModelForPreTraining, lxmert_pretraining_batch),
    "lxmert-answering": (
        hf_vlp.LXMERTForQuestionAnswering,
        AutoModelForVisualQuestionAnswering,
        soft_answer_batch,
    ),
    "lxmert-reasoning": (hf_vlp.LXMERTForVisualReasoning, AutoModelForVisualReasoning, visual_pair_batch),
    "lxmert-entailment": (
        hf_vlp.LXMERTForVisualEntailment,
        AutoModelForVisualEntailment,
        visual_entailment_batch,
    ),
    "lxmert-retrieval": (hf_vlp.LXMERTForRetrieval, AutoModelForRetrieval, visual_retrieval_batch),
    "lxmert-grounding": (hf_vlp.LXMERTForGrounding, AutoModelForGrounding, visual_grounding_batch),
    "soho": (hf_vlp.SOHOModel, AutoModel, canvas_text_batch),
    "soho-pretraining": (hf_vlp.SOHOForPreTraining, AutoModelForPreTraining, soho_pretraining_batch),
    "soho-answering": (
        hf_vlp.SOHOForQuestionAnswering,
        AutoModelForVisualQuestionAnswering,
        canvas_answer_batch,
    ),
    "soho-reasoning": (hf_vlp.SOHOForVisualReasoning, AutoModelForVisualReasoning, canvas_pair_batch),
    "soho-entailment": (
        hf_vlp.SOHOForVisualEntailment,
        AutoModelForVisualEntailment,
        canvas_entailment_batch,
    ),
    "soho-retrieval": (hf_vlp.SOHOForRetrieval, AutoModelForRetrieval, canvas_retrieval_batch),
    "soho-grounding": (hf_vlp.SOHOForGrounding, AutoModelForGrounding, canvas_grounding_batch),
}
HEADS = [name for name in CASES if "-" in name]
UNREACHED = {  # boxes are learnt from regions only; text assignment carries what ITC compares
    "xvlm-pretraining-images": r"bbox_head\.",
    "xvlm-assignment": r"model\.image_projection",
    "xvlm_clip-pretraining-images": r"bbox_head\.",
    "albef-assignment": r"model\.(image_projection|text_projection|temperature)",
}
FLOORS = {  # of the loss, where captions of one image share their target, or answers to one question theirs
    "xvlm-retrieval": 2 / 4 * math.log(2),
    "xvlm-weak-grounding": 2 / 4 * math.log(2),
    "xvlm-answering": (0.7 * -math.log(0.7) + 0.3 * -math.log(0.3)) / 4,
    # smoothed labels, of which each of the 39 other words has 0.1 / 40
    "xvlm-captioning": -0.9 * math.log(0.9 / 0.9975) - 39 * 0.0025 * math.log(0.0025 / 0.9975),
    "soho-pretraining": 0.1 * math.log(1 + 5 * math.exp(-1)),  # cosines are bounded
    "albef-pretraining": 1 / 8 * math.log(2),  # the queue holds the last pair once more
    "albef-retrieval": math.log(2),  # these two know by their ids which
    "albef-grounding": math.log(2),
    "albef-answering": (0.7 * -math.log(0.7) + 0.3 * -math.log(0.3)) / 8,
}
CONFIGS = {
    "xvlm": tiny_config,
    "xvlm_clip": tiny_clip_config,
    "albef": tiny_albef_config,
    "lxmert": tiny_lxmert_config,
    "soho": tiny_soho_config,
}
TRUNKS = {  # the usual one first
    "xvlm": ["swin", "vit", "timm"],
    "xvlm_clip": ["clip"],
    "albef": ["vit", "swin", "timm"],
    "lxmert": [None],
    "soho": ["resnet", "timm"],
}
PROCESSORS = {
    "xvlm": tiny_processor,
    "xvlm_clip": tiny_processor,
    "albef": tiny_albef_processor,
    "lxmert": tiny_lxmert_processor,
    "soho": tiny_soho_processor,
}


def _paper(name: str) -> str:
    return name.split("-")[0]


def _with_trunks(names) -> list[tuple[str, str | None]]:
    return [(name, trunk) for name in names for trunk in TRUNKS[_paper(name)]]


def _build(name: str, trunk: str | None = None, loud: bool = True):
    model_class, _, batch = CASES[name]
    torch.manual_seed(0)
    trunk = trunk or TRUNKS[_paper(name)][0]
    config = CONFIGS[_paper(name)]
    model = model_class(config() if trunk is None else config(trunk)).eval()
    if loud:  # so that a lost term shows
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, batch()


def _without_dropout(model):
    for module in model.modules():
        module.p = 0.0 if isinstance(module, torch.nn.Dropout) else getattr(module, "p", None)
    model.config.get_text_config().attention_probs_dropout_prob = 0.0
    return model


def _with_teacher(model) -> dict[str, bool]:
    return {"keep_teacher": True} if hasattr(model, "teacher") else {}


def _close(ours, expected, **tolerance):
    assert ours.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            ours[name], expected[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize(("name", "trunk"), _with_trunks(CASES))
def test_save_and_load(name, trunk, tmp_path):
    model, batch = _build(name, trunk)
    model.save_pretrained(tmp_path, **_with_teacher(model))
    for loader in (CASES[name][0], CASES[name][1], AutoModel):
        loaded, info = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is type(model) and not info["missing_keys"] and not info["unexpected_keys"]
        for key, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), key
        with torch.no_grad():
            _close(loaded(**batch), model(**batch), atol=0, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_in_the_meta_built_model(name, tmp_path):
    """Loading builds on the meta device; a head that the file lacks must come out initialised."""
    base, _ = _build(_paper(name))
    base.save_pretrained(tmp_path)
    head = CASES[name][0].from_pretrained(tmp_path)
    assert all(value.isfinite().all() and value.abs().max() < 200 for value in head.state_dict().values())
    new = {
        n
        for n, p in head.named_parameters()
        if re.search(r"(_head|^cls)\.|mask_embedding", n) and p.requires_grad
    }
    if name == "xvlm-answering":  # images are wider than texts
        new |= {n for n, _ in head.named_parameters() if n.startswith("decoder.key_values.")}
    assert head.new_parameters == new - {"decoder.lm_head.decoder.weight"}


@pytest.mark.parametrize("name", CASES)
def test_sdpa_equals_eager(name):
    model, batch = _build(name)
    with torch.no_grad():
        expected = model(**batch)
        model.set_attn_implementation("eager")
        _close(model(**batch), expected, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_padding_changes_nothing(name):
    model, batch = _build(name)
    padded = CASES[name][2](3)
    assert padded["attention_mask"].shape[1] > batch["attention_mask"].shape[1]
    with torch.no_grad():
        expected, ours = model(**batch), model(**padded)
    for key in expected:
        if key not in ("last_hidden_state", "text_embeds"):  # these have a row for each slot
            of_regions = ours[key][tuple(map(slice, expected[key].shape))]  # some have one for each slot
            torch.testing.assert_close(of_regions, expected[key], atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize(("name", "trunk"), _with_trunks(HEADS))
def test_gradients_reach_every_parameter(name, trunk):
    model, batch = _build(name, trunk)
    model(**batch).loss.backward()
    unreached = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    unreached -= {n for n, p in model.named_parameters() if not p.requires_grad}  # the teacher
    assert {n for n in unreached if not re.match(UNREACHED.get(name, " "), n)} == set()


@pytest.mark.parametrize("name", HEADS)
def test_bf16(name):
    model, batch = _build(name, loud=False)
    expected = model(**batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(**batch).loss
    whole = model.to(torch.bfloat16)(
        **{k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}
    ).loss
    whole.backward()
    torch.testing.assert_close(autocast.float(), expected, atol=0.05, rtol=0.05)
    torch.testing.assert_close(whole.float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("name", HEADS)
def test_overfits_eight_examples(name):
    model, batch = _build(name, loud=False)
    if _paper(name) == "albef":
        batch = CASES[name][2](rows=8)
        model.distillation_weight = (
            0.0  # to the labels, not to the guesses of a teacher that starts at random
        )
    if getattr(model, "queue", None) is not None:
        _without_dropout(model).train()  # the teacher follows, and queues fill
        model.config.momentum = 0.5
    if name == "albef-pretraining":  # without ids, a pair in the queue is a negative of itself
        model.queue = FeatureQueue(1, model.config.projection_dim)
    steps, rate = (400, 2e-3) if _paper(name) in ("lxmert", "soho") else (200, 5e-3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    first = model(**batch).loss.item()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < FLOORS.get(name, 0.0) + 0.15 < first / 2


def test_remote_code_in_a_clean_process(tmp_path):
    """Folders load where this package cannot be imported, and give the same outputs."""
    expected = {}
    for name in CASES:
        model, batch = _build(name)
        model.save_pretrained(tmp_path / name, **_with_teacher(model))
        processor = PROCESSORS[_paper(name)]()
        processor.save_pretrained(tmp_path / name)
        torch.save(batch, tmp_path / name / "batch.pt")
        torch.save(processor(text="a Red circle!").input_ids, tmp_path / name / "ids.pt")
        with torch.no_grad():
            expected[name] = dict(model(**batch).items())
    script = """
import json, sys
sys.modules["hf_vlp"] = None
import torch
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, AutoProcessor
for name in json.loads(sys.argv[2]):
    folder = f"{sys.argv[1]}/{name}"
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model.config) is type(model).config_class
    with torch.no_grad():
        torch.save(dict(model(**torch.load(f"{folder}/batch.pt")).items()), f"{folder}/output.pt")
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert processor(text="a Red circle!").input_ids.equal(torch.load(f"{folder}/ids.pt"))
    if "pretraining" in name:
        assert type(AutoModelForPreTraining.from_pretrained(folder, trust_remote_code=True)) is type(model)
    model.save_pretrained(folder + "-again")
    AutoModel.from_pretrained(folder + "-again", trust_remote_code=True)
"""
    command = [sys.executable, "-c", script, str(tmp_path), json.dumps(list(CASES))]
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in CASES:
        _close(torch.load(tmp_path / name / "output.pt"), expected[name], atol=0, rtol=0)
        # saved without the package, loaded with it
        again = AutoModel.from_pretrained(tmp_path / f"{name}-again")
        assert type(again) is CASES[name][0]


def test_trainer_checkpoints_stay_plain(tmp_path):
    """Checkpoints hold no code, what the trainer saves in the end does."""
    model, _ = _build("xvlm-grounding")
    rows = datasets.Dataset.from_dict(
        {"input_ids": [[2, 5, 8]] * 2, "pixel_values": image_batch(2)["pixel_values"]}
    )
    rows = rows.add_column("target_boxes", [[0.5, 0.5, 0.2, 0.2]] * 2)
    arguments = VLPTrainingArguments(
        tmp_path, max_steps=1, save_steps=1, use_cpu=True, per_device_train_batch_size=2
    )
    trainer = VLPTrainer(model, arguments, train_dataset=rows)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-1"
    assert not list(checkpoint.glob("*.py")) and "auto_map" not in (checkpoint / "config.json").read_text()
    trainer.save_model()
    assert (tmp_path / "modeling_xvlm.py").exists() and "auto_map" in (tmp_path / "config.json").read_text()


def test_processor_round_trip(tmp_path):
    processor = tiny_processor()
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is hf_vlp.XVLMProcessor
    assert loaded.image_processor.to_dict() == processor.image_processor.to_dict()
    assert (loaded.max_words, loaded.max_tokens, loaded.patch_size) == (40, 20, 16)
    assert loaded(text=["a red circle", "a"]).input_ids.tolist() == [[2, 5, 8, 12], [2, 5, 0, 0]]

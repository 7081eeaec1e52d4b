"""Tiny models learn from drawn scenes: in seconds better than the honest baselines by a margin, and in
minutes, by the examples as a user runs them (`pytest -m slow`), what a model of this size can.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_vlp import (
    LXMERTForGrounding,
    LXMERTForQuestionAnswering,
    LXMERTForVisualEntailment,
    LXMERTForVisualReasoning,
    LXMERTProcessor,
    SOHOForRetrieval,
    SOHOForVisualReasoning,
    SOHOProcessor,
    XVLMForCaptioning,
    XVLMForPreTraining,
    XVLMForWeakGrounding,
    XVLMProcessor,
)
from hf_vlp.data.collators import ImageTextCollator
from hf_vlp.data.lxmert_collators import (
    LXMERTEntailmentCollator,
    LXMERTGroundingCollator,
    LXMERTPairCollator,
    LXMERTQuestionCollator,
)
from hf_vlp.data.shapes import shapes_dataset, vocabulary
from hf_vlp.data.task_collators import PairCollator
from hf_vlp.evaluation import (
    evaluate_entailment,
    evaluate_foils,
    evaluate_grounding,
    evaluate_proposals,
    evaluate_question_answering,
    evaluate_reasoning,
    evaluate_retrieval,
    majority_answer_accuracy,
    majority_label_accuracy,
    random_object_accuracy,
)
from hf_vlp.quickstart import tiny_config, tiny_processor
from hf_vlp.training import VLPTrainer, VLPTrainingArguments


def test_pretraining_beats_chance(tmp_path):
    processor = tiny_processor(vocabulary(), image_size=48)
    model = XVLMForPreTraining(tiny_config(processor))
    arguments = VLPTrainingArguments(
        tmp_path,
        max_steps=200,
        per_device_train_batch_size=64,
        learning_rate=2e-3,
        warmup_steps=20,
        use_cpu=True,
    )
    VLPTrainer(
        model,
        arguments,
        train_dataset=shapes_dataset("captions", "train", 20_000),
        data_collator=ImageTextCollator(processor=processor, augment=False),
    ).train()
    retrieval = evaluate_retrieval(model, processor, shapes_dataset("retrieval", "test", 256), top_k=16)
    assert retrieval.itc_metrics["text_recall_at_10"] > 0.3  # random order: 0.04
    assert retrieval.itc_metrics["image_recall_at_10"] > 0.3
    assert (
        evaluate_foils(model, processor, shapes_dataset("foils", "test", 256)).accuracy > 0.65
    )  # a coin: 0.5


def fine_tune(model, rows, collator, folder: Path, steps: int, learning_rate: float):
    arguments = VLPTrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=64,
        learning_rate=learning_rate,
        warmup_steps=steps // 16,
        lr_scheduler_type="cosine",
        save_strategy="no",
        use_cpu=True,
    )
    VLPTrainer(model, arguments, train_dataset=rows, data_collator=collator).train()


def train_lxmert(model, task: str, collator, folder: Path, steps: int, learning_rate: float):
    """Fine-tune on drawn scenes whose regions are given; the rows to score on."""
    rows = shapes_dataset(task, "train", 20_000, regions=True)
    rows = rows.remove_columns("images" if task == "pairs" else "image")  # nobody looks at them
    fine_tune(model, rows, collator, folder, steps, learning_rate)
    return shapes_dataset(task, "test", 256, regions=True)


def test_answers_from_nothing_beat_the_most_frequent_ones(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    from small_lxmert import tiny_lxmert

    model, processor = tiny_lxmert(LXMERTForQuestionAnswering)
    collator = LXMERTQuestionCollator(processor=processor, answers=model.config.answers)
    test = train_lxmert(model, "questions", collator, tmp_path, 200, 2e-3)
    frequent = majority_answer_accuracy(shapes_dataset("questions", "train", 1000), test)
    assert evaluate_question_answering(model, processor, test).accuracy > frequent + 0.2


EXAMPLES = Path(__file__).parents[1] / "examples"


def printed(script: str, output_dir: Path, *options: str) -> str:
    """What an example prints."""
    command = [sys.executable, str(EXAMPLES / f"{script}.py"), "--output_dir", str(output_dir), *options]
    done = subprocess.run([*command, "--use_cpu", "--disable_tqdm", "true"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(script: str, output_dir: Path, *options: str) -> list[float]:
    """The scores that an example prints, in its order, each beside its baseline."""
    output = printed(script, output_dir, *options)
    return [float(number) for number in re.findall(r"[:,] +([01]\.\d{3})\b", output)]


@pytest.fixture(scope="module")
def pretrained_albef(tmp_path_factory) -> tuple[Path, list[float]]:
    folder = tmp_path_factory.mktemp("albef")
    return folder, run("pretrain_albef", folder)


@pytest.mark.slow
def test_albef_pretraining(pretrained_albef):
    *recalls, chance, foils, coin = pretrained_albef[1]
    assert min(recalls) >= 0.9 and chance < 0.05
    assert foils >= 0.85 and coin == 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "steps", "wanted"),
    [
        ("finetune_question_answering", 800, 0.8),
        ("finetune_entailment", 800, 0.8),
        ("finetune_reasoning", 1500, 0.8),
        ("finetune_weak_grounding", 600, 0.5),
    ],
)
def test_albef_fine_tuning(script, steps, wanted, pretrained_albef, tmp_path):
    score, baseline, *_ = run(
        script, tmp_path, "--model", str(pretrained_albef[0]), "--max_steps", str(steps)
    )
    assert score >= wanted and score > baseline + 0.05


@pytest.fixture(scope="module")
def pretrained_xvlm(tmp_path_factory) -> tuple[Path, list[float]]:
    folder = tmp_path_factory.mktemp("xvlm")
    return folder, run("pretrain", folder, "--max_steps", "1600", "--warmup_steps", "100")


@pytest.mark.slow
def test_xvlm_pretraining(pretrained_xvlm):
    *recalls, chance = pretrained_xvlm[1]
    assert min(recalls) >= 0.9 and chance < 0.05


@pytest.mark.slow
def test_xvlm_points_by_heat_before_any_fine_tuning(pretrained_xvlm):
    model = XVLMForWeakGrounding.from_pretrained(pretrained_xvlm[0])
    processor = XVLMProcessor.from_pretrained(pretrained_xvlm[0])
    test = shapes_dataset("grounding", "test", 256)
    score = evaluate_proposals(model, processor, test).accuracy
    assert score >= 0.6 and score > random_object_accuracy(test) + 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "steps", "wanted"),
    [("finetune_question_answering", 800, 0.8), ("finetune_reasoning", 1500, 0.8)],
)
def test_xvlm_fine_tuning(script, steps, wanted, pretrained_xvlm, tmp_path):
    score, baseline, *_ = run(script, tmp_path, "--model", str(pretrained_xvlm[0]), "--max_steps", str(steps))
    assert score >= wanted and score > baseline + 0.05


@pytest.fixture(scope="module")
def pretrained_lxmert(tmp_path_factory) -> tuple[Path, list[float]]:
    folder = tmp_path_factory.mktemp("lxmert")
    return folder, run("pretrain_lxmert", folder)


@pytest.mark.slow
def test_lxmert_pretraining(pretrained_lxmert):
    *recalls, chance, foils, coin = pretrained_lxmert[1]
    assert min(recalls) >= 0.9 and chance < 0.1
    assert foils >= 0.85 and coin == 0.5


@pytest.mark.slow
def test_lxmert_answers_about_files_of_images(pretrained_lxmert, tmp_path):
    score, baseline = run("finetune_lxmert", tmp_path, "--model", str(pretrained_lxmert[0]))[:2]
    assert score >= 0.85 and score > baseline + 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "task", "collator", "evaluate", "baseline", "wanted"),
    [
        (
            LXMERTForGrounding,
            "grounding",
            LXMERTGroundingCollator,
            evaluate_grounding,
            random_object_accuracy,
            0.85,
        ),
        (
            LXMERTForVisualReasoning,
            "pairs",
            LXMERTPairCollator,
            evaluate_reasoning,
            majority_label_accuracy,
            0.8,
        ),
        (
            LXMERTForVisualEntailment,
            "entailment",
            LXMERTEntailmentCollator,
            evaluate_entailment,
            majority_label_accuracy,
            0.85,
        ),
    ],
    ids=["grounding", "pairs", "entailment"],
)
def test_lxmert_fine_tuning(head, task, collator, evaluate, baseline, wanted, pretrained_lxmert, tmp_path):
    processor = LXMERTProcessor.from_pretrained(pretrained_lxmert[0])
    model = head.from_pretrained(pretrained_lxmert[0])
    test = train_lxmert(model, task, collator(processor=processor), tmp_path, 800, 5e-4)
    score = evaluate(model, processor, test).accuracy
    assert score >= wanted and score > baseline(test) + 0.05


@pytest.fixture(scope="module")
def pretrained_soho(tmp_path_factory) -> tuple[Path, list[float]]:
    folder = tmp_path_factory.mktemp("soho")
    return folder, run("pretrain_soho", folder)


@pytest.mark.slow
def test_soho_pretraining(pretrained_soho):
    """More than half of the dictionary's entries are in use in unseen scenes, and its figure is drawn."""
    folder, (used, foils, coin) = pretrained_soho
    assert used > 0.5 and foils >= 0.85 and coin == 0.5
    assert len(list(folder.glob("dictionary_*.png"))) == 3


@pytest.mark.slow
def test_soho_answers(pretrained_soho, tmp_path):
    score, baseline = run("finetune_soho", tmp_path, "--model", str(pretrained_soho[0]))
    assert score >= 0.8 and score > baseline + 0.05


@pytest.mark.slow
def test_soho_retrieval(pretrained_soho):
    """By the matching head of pretraining; by chance the right one is among the first five in 0.05."""
    model = SOHOForRetrieval.from_pretrained(pretrained_soho[0])
    processor = SOHOProcessor.from_pretrained(pretrained_soho[0])
    test = shapes_dataset("retrieval", "test", 96, image_size=64)
    found = evaluate_retrieval(model, processor, test).metrics
    assert min(found["text_recall_at_5"], found["image_recall_at_5"]) >= 0.9


@pytest.mark.slow
def test_soho_reasoning(pretrained_soho, tmp_path):
    model = SOHOForVisualReasoning.from_pretrained(pretrained_soho[0])
    processor = SOHOProcessor.from_pretrained(pretrained_soho[0])
    train, test = (
        shapes_dataset("pairs", split, count, image_size=64)
        for split, count in (("train", 40_000), ("test", 256))
    )
    fine_tune(model, train, PairCollator(processor=processor, augment=False), tmp_path, 800, 5e-4)
    assert evaluate_reasoning(model, processor, test).accuracy >= majority_label_accuracy(test) + 0.2


@pytest.fixture(scope="module")
def captioning(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("captioning")
    return folder, printed("caption_xvlm", folder)


def caption_scores(output: str) -> tuple[float, float, float]:
    """CIDEr-D, that of the most frequent caption, and the share of scenes all of whose objects are right."""
    patterns = (r"CIDEr-D: +([\d.]+) of", r"frequent caption: +([\d.]+)", r"objects right: +([\d.]+) of")
    return tuple(float(re.search(pattern, output)[1]) for pattern in patterns)


@pytest.mark.slow
def test_captions_say_what_is_where(captioning):
    cider, frequent, right = caption_scores(captioning[1])
    assert cider > frequent + 3 and right >= 0.8


@pytest.mark.slow
def test_beams_find_likelier_captions_than_greed(captioning):
    model = XVLMForCaptioning.from_pretrained(captioning[0]).eval()
    processor = XVLMProcessor.from_pretrained(captioning[0])
    images = list(shapes_dataset("captions", "test", 64)["image"])
    batch = dict(processor(images=images, text=processor.prompt))
    prompt_length = batch["input_ids"].shape[1]
    means = []
    for beams in ({"num_beams": 3, "length_penalty": 0.0, "early_stopping": "never"}, {}):
        ids = model.generate(**batch, max_length=40, **beams)
        is_end = ids == processor.tokenizer.sep_token_id
        labels = ids.masked_fill(is_end.cumsum(1) - is_end.long() > 0, -100)
        labels[:, :prompt_length] = -100
        with torch.no_grad():
            losses = model(batch["pixel_values"], ids, labels=labels).caption_losses
        means.append(float((losses * (labels != -100).sum(1)).mean()))
    assert means[0] <= means[1] + 1e-4


@pytest.mark.slow
def test_self_critical_training_draws_better_captions(captioning, tmp_path):
    output = printed("caption_xvlm", tmp_path, "--self-critical", "--model", str(captioning[0]))
    rewards = [float(reward) for reward in re.findall(r"'reward_sample': '([\d.]+)'", output)]
    assert rewards[-1] > rewards[0] + 0.2
    cider, frequent, right = caption_scores(output)
    assert cider > frequent + 3 and right >= 0.8

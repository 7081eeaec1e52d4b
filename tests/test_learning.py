"""A tiny model learns from drawn scenes in seconds: better than the honest baselines by a margin."""

from hf_vlp import XVLMForPreTraining
from hf_vlp.data.collators import ImageTextCollator
from hf_vlp.data.shapes import shapes_dataset, vocabulary
from hf_vlp.evaluation import evaluate_foils, evaluate_retrieval
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

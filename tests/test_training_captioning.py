"""Training of captions: the Trainer with labels, and self-critical training against its definition."""

import datasets
import pytest
import torch
from data_fixtures import picture
from heads import make_head
from training_run import arguments

from hf_vlp import XVLMForCaptioning
from hf_vlp.data.caption_collators import CaptioningCollator, SelfCriticalCollator
from hf_vlp.training import RECIPES, SelfCriticalTrainer, VLPTrainer

COLOURS = ("red", "green", "blue", "yellow")


def rows(count: int = 8) -> datasets.Dataset:
    captions = [[f"the {COLOURS[i % 4]} circle", "a square"] for i in range(count)]
    return datasets.Dataset.from_list(
        [{"image": picture(i), "caption": caption} for i, caption in enumerate(captions)]
    )


def head():
    torch.manual_seed(0)
    model, processor = make_head(XVLMForCaptioning)
    processor.prompt = "a"
    return model, processor


def red_words(captions, references) -> list[float]:
    assert len(captions) == len(references)
    return [float(caption.split().count("red")) for caption in captions]


def trainer(output_dir, reward=red_words, settings=None, **fields) -> SelfCriticalTrainer:
    model, processor = head()
    return SelfCriticalTrainer(
        model,
        arguments(output_dir, **{"max_steps": 2} | fields),
        reward=reward,
        **{"num_samples": 3, "max_length": 6} | (settings or {}),
        train_dataset=rows(),
        eval_dataset=rows(5),
        data_collator=SelfCriticalCollator(processor=processor, augment=False),
        processing_class=processor,
    )


def test_captions_train_and_are_evaluated(tmp_path):
    model, processor = head()
    collator = CaptioningCollator(processor=processor)
    run = VLPTrainer(model, arguments(tmp_path, max_steps=3), train_dataset=rows(), data_collator=collator)
    run.eval_dataset = rows(5)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before


def batch_of(run) -> dict:
    return next(iter(run.get_train_dataloader()))


def test_the_loss_is_that_of_the_definition(tmp_path, monkeypatch):
    """Advantage of each sample, times the mean negative log-probability of its words, [SEP] included."""
    run = trainer(tmp_path)
    writer, batch = run.model.train(), batch_of(run)
    writer.config.text_config.attention_probs_dropout_prob = 0.0
    for module in writer.modules():
        for name in {"p", "drop_prob"} & set(vars(module)):
            setattr(module, name, 0.0)
    written = []
    generate = writer.generate

    def keep(*inputs, **settings):
        assert not torch.is_grad_enabled()
        assert writer.training == ("do_sample" in settings)
        written.append(generate(*inputs, **settings))
        return written[-1]

    monkeypatch.setattr(writer, "generate", keep)
    loss, outputs = run.compute_loss(writer, dict(batch), return_outputs=True)
    assert writer.training
    loss.backward()
    assert any(parameter.grad is not None for parameter in writer.vision_model.parameters())
    greedy, samples = written
    assert len(samples) == 3 * len(greedy)
    decode = run.processing_class.decode_captions
    expected = []
    for i, sample in enumerate(samples):
        advantage = decode(sample[None])[0].split().count("red")
        advantage -= decode(greedy[i // 3][None])[0].split().count("red")
        end = next((n for n, word in enumerate(sample.tolist()) if word == 3), len(sample) - 1)
        words = sample[None, : end + 1]
        labels = words.masked_fill(torch.arange(end + 1) < 2, -100)
        alone = writer(batch["pixel_values"][i // 3][None], words, labels=labels)
        expected.append(advantage * alone.caption_losses[0])
    assert len(set(expected)) > 2
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    assert outputs["reward_sample"] == pytest.approx(
        sum(text.split().count("red") for text in decode(samples)) / len(samples)
    )


def test_the_reward_rises(tmp_path):
    """And is logged, with that of the greedy caption."""
    settings = {"max_steps": 40, "learning_rate": 3e-3, "logging_steps": 10, "per_device_train_batch_size": 8}
    run = trainer(tmp_path, settings={"num_samples": 5}, **settings)
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    assert after["eval_reward_greedy"] > before["eval_reward_greedy"] + 1
    assert after["eval_loss"] == pytest.approx(-after["eval_reward_greedy"])
    logged = [entry for entry in run.state.log_history if "reward_sample" in entry]
    assert len(logged) == 4 and logged[-1]["reward_sample"] > logged[0]["reward_sample"]


def test_what_it_cannot_do(tmp_path):
    with pytest.raises(ValueError, match="num_samples is 0"):
        trainer(tmp_path, settings={"num_samples": 0})
    model, _ = head()
    with pytest.raises(ValueError, match="processing_class is NoneType"):
        SelfCriticalTrainer(model, arguments(tmp_path), reward=red_words)


def test_recipes_are_those_of_the_official_configurations():
    pretrain, tune, critical = (RECIPES[f"xvlm_caption{name}"] for name in ("_pretrain", "", "_scst"))
    assert (pretrain["learning_rate"], pretrain["max_grad_norm"]) == (3e-5, 1.0)
    assert pretrain["max_steps"] == 2 * -(-5_114_489 // (8 * pretrain["per_device_train_batch_size"]))
    assert tune["max_steps"] == 5 * -(-566_747 // (8 * tune["per_device_train_batch_size"]))
    assert critical["max_steps"] == 5 * (566_747 // (8 * critical["per_device_train_batch_size"]))
    assert tune["learning_rate"] == critical["learning_rate"] == 1e-5

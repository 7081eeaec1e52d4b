"""Adapters of peft: only they are trained, and every path through a model counts them."""

import re

import peft
import pytest
import torch
from test_models import CASES, CONFIGS, _build, _close, _paper, _with_trunks

from hf_vlp.training import VLPTrainer, VLPTrainingArguments

TRAINED = {  # a head of each paper, and what of it is new
    "xvlm-grounding": ["bbox_head"],
    "albef-reasoning": ["cls_head"],
    "lxmert-answering": ["answer_head"],
    # and what follows the images in training without gradients: statistics of batches, and the dictionary
    "soho-answering": ["answer_head", "visual_projection", "visual_gate", "visual_dictionary"],
}
FIELDS = {"albef": {"momentum_teacher": False}, "soho": {"frozen_stages": 4}}  # so that nothing else moves


def _config(model, **options) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, lora_alpha=16, target_modules=model.LORA_TARGET_MODULES, **options)


def _adapt(model, **options) -> peft.PeftModel:
    """With adapters that say something: new ones add nothing."""
    adapted = peft.get_peft_model(model, _config(model, **options))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return adapted.eval()


def _fresh(name: str):
    model_class, _, batch = CASES[name]
    torch.manual_seed(0)
    return model_class(CONFIGS[_paper(name)](**FIELDS.get(_paper(name), {}))), batch()


@pytest.mark.parametrize("name", TRAINED)
def test_fine_tune(name, tmp_path):
    model, batch = _fresh(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adapted = peft.get_peft_model(model, _config(model, modules_to_save=TRAINED[name]))
    trained = {key for key, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in key or "modules_to_save" in key for key in trained)
    arguments = VLPTrainingArguments(
        tmp_path / "run", max_steps=40, learning_rate=2e-2, use_cpu=True, per_device_train_batch_size=1,
        warmup_steps=0, logging_steps=1, report_to=[], disable_tqdm=True, remove_unused_columns=False,
        save_strategy="no",
    )  # fmt: skip
    trainer = VLPTrainer(adapted, arguments, train_dataset=[0], data_collator=lambda rows: batch)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    for key, value in adapted.get_base_model().state_dict().items():
        plain = key.replace("base_layer.", "").replace("original_module.", "")
        if plain in before:
            assert torch.equal(value, before[plain]), key

    trainer.save_model(tmp_path / "adapter")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        path.name for path in (tmp_path / "adapter").iterdir()
    }
    with torch.no_grad():
        expected = adapted.eval()(**batch)
        loaded = peft.PeftModel.from_pretrained(_fresh(name)[0], tmp_path / "adapter")
        _close(loaded.eval()(**batch), expected, atol=0, rtol=0)
        merged = loaded.merge_and_unload()
        assert type(merged) is CASES[name][0]
        _close(merged(**batch), expected, atol=1e-5, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = CASES[name][0].from_pretrained(tmp_path / "merged")
    saved, kept = again.state_dict(), merged.state_dict()
    assert saved.keys() == kept.keys() and all(torch.equal(saved[key], kept[key]) for key in kept)
    with torch.no_grad():  # the last bits depend on where weights lie in memory
        _close(again(**batch), merged(**batch), atol=1e-6, rtol=1e-6)


BLOCKS = (
    r"\.(layer|plain_layer|second_layer|layers|r_layers|x_layers|key_values|image_key_values|blocks)\.\d+\."
)


@pytest.mark.parametrize(
    ("name", "trunk"), [*((name, None) for name in CASES), *_with_trunks(["xvlm", "albef"])[1:]]
)
def test_adapted_equals_merged(name, trunk):
    """With gradients and without, which takes the fast paths; all layers of blocks, and no others, adapt."""
    model, batch = _build(name, trunk, loud=False)
    linear = {key for key, module in model.named_modules() if type(module) is torch.nn.Linear}
    adapted = _adapt(model)
    assert set(adapted.targeted_module_names) == {
        key for key in linear if re.search(BLOCKS, f".{key}") and not re.search("^teacher|downsample", key)
    }
    with_gradients = {key: value.detach() for key, value in adapted(**batch).items()}
    with torch.no_grad():
        without = dict(adapted(**batch).items())
        plain = {key: value.detach() for key, value in _build(name, trunk, loud=False)[0](**batch).items()}
        merged = adapted.merge_and_unload()(**batch)
    _close(with_gradients, dict(merged.items()), atol=1e-5, rtol=1e-4)
    _close(without, dict(merged.items()), atol=1e-5, rtol=1e-4)
    assert any(not torch.allclose(plain[key], without[key], atol=1e-3) for key in plain)


@torch.no_grad()
@pytest.mark.parametrize("name", ["xvlm-retrieval", "albef-retrieval"])
def test_many_texts_of_one_image(name):
    """As they are re-ranked: packed, and the last layer reads for the first word alone."""
    model, batch = _build(name)
    texts = {key: batch[key] for key in ("input_ids", "attention_mask")}
    texts["attention_mask"][:, 4:] = 0

    def score(one):
        image = one.get_image_features(batch["pixel_values"][:1]).last_hidden_state
        words = one.get_text_features(**texts).last_hidden_state
        return one.match(words, texts["attention_mask"], one.model.project_image(image))

    plain = score(model)
    adapted = _adapt(model)
    ours = score(adapted)
    torch.testing.assert_close(ours, score(adapted.merge_and_unload()), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(ours, plain, atol=1e-3)

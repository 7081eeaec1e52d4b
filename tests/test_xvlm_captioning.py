"""What X-VLM's captioning does beside its loss: starts from pretraining, writes, shares its images."""

import pytest
import torch
import torch.nn.functional as F
from tiny import TRUNKS, caption_batch, image_batch, tiny_config, tiny_processor
from transformers import BertConfig, BertForMaskedLM, ViTModel

import hf_vlp
from hf_vlp.models.layers_bert import KeyValueProjection
from hf_vlp.models.objectives import smoothed_losses

PROMPT = torch.tensor([[2, 5, 8]])
SEP = 3


@pytest.fixture
def model():
    """Weights large enough that a lost term shows."""
    torch.manual_seed(0)
    model = hf_vlp.XVLMForCaptioning(tiny_config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def pixels(images: int = 3) -> torch.Tensor:
    return image_batch(images)["pixel_values"]


# Where weights come from


@pytest.mark.parametrize("start", [hf_vlp.XVLMForPreTraining, hf_vlp.XVLMModel])
def test_text_and_fusion_layers_become_the_decoder(start, tmp_path):
    pretrained = start(tiny_config())
    pretrained.save_pretrained(tmp_path)
    model = hf_vlp.XVLMForCaptioning.from_pretrained(tmp_path)
    base, decoder = pretrained.base_model, model.decoder
    pairs = [
        (base.vision_model, model.vision_model),
        (base.text_model.embeddings, decoder.embeddings),
        (base.text_model.layer, decoder.plain_layer),
        (base.fusion_model.layer, decoder.layer),
        (base.fusion_model.image_key_values, decoder.key_values),
    ]
    if start is hf_vlp.XVLMForPreTraining:
        pairs.append((pretrained.lm_head, decoder.lm_head))
        assert model.new_parameters == frozenset()
    else:
        assert {name.split(".")[1] for name in model.new_parameters} == {"lm_head"}
    for theirs, ours in pairs:
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name
    assert decoder.lm_head.decoder.weight is decoder.embeddings.word_embeddings.weight


def test_from_public_backbones(tmp_path):
    ViTModel(TRUNKS["vit"]()).save_pretrained(tmp_path / "vit")
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertForMaskedLM(BertConfig(num_hidden_layers=4, **sizes))
    bert.save_pretrained(tmp_path / "bert")
    model = hf_vlp.XVLMForCaptioning.from_backbones(
        str(tmp_path / "vit"), str(tmp_path / "bert"), num_fusion_layers=2
    )
    ours, theirs = model.decoder, bert.bert.encoder.layer
    for i, layer in enumerate([*ours.plain_layer, *ours.layer]):
        assert torch.equal(layer.output.dense.weight, theirs[i].output.dense.weight)
    assert torch.equal(ours.lm_head.dense.weight, bert.cls.predictions.transform.dense.weight)
    of_images = {"crossattention", "key_values"}
    assert all(of_images & set(name.split(".")) for name in model.new_parameters)


# The loss


def test_smoothed_losses_are_those_of_torch_but_for_the_share_of_the_label():
    logits, labels = torch.randn(6, 9), torch.randint(9, (6,))
    plain, smoothed = smoothed_losses(logits, labels, 0.2)
    torch.testing.assert_close(plain, F.cross_entropy(logits, labels, reduction="none"))
    torchs = F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.2)
    torch.testing.assert_close(smoothed, torchs - 0.2 / 9 * plain)
    assert smoothed_losses(logits, labels)[1].equal(plain)


def test_losses_of_captions_are_means_over_their_labelled_words(model):
    batch = caption_batch()
    output = model(**batch)
    with torch.no_grad():
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).lm_logits
    expected = F.cross_entropy(logits[:, :-1].mT, batch["labels"][:, 1:], reduction="none")
    labelled = batch["labels"][:, 1:] != -100
    torch.testing.assert_close(output.caption_losses, expected.sum(1) / labelled.sum(1))
    model.config.label_smoothing = 0.0
    torch.testing.assert_close(model(**batch).loss, expected.sum() / labelled.sum())


def test_captions_in_another_order(model):
    batch, order = caption_batch(), torch.tensor([2, 0, 3, 1])
    texts = {name: batch[name][order] for name in ("input_ids", "attention_mask", "labels")}
    ours = model(batch["pixel_values"], **texts, image_index=order // 2)
    expected = model(**batch)
    torch.testing.assert_close(ours.loss, expected.loss)
    torch.testing.assert_close(ours.caption_losses, expected.caption_losses[order])


def test_a_batch_without_labels_is_finite(model):
    batch = caption_batch()
    output = model(**batch | {"labels": torch.full_like(batch["labels"], -100)})
    assert output.loss == 0 and not output.caption_losses.any()


def test_captions_that_do_not_fit(model):
    batch = caption_batch()
    with pytest.raises(ValueError, match="4 captions for 3 images"):
        model(**batch | {"pixel_values": pixels(3)})
    with pytest.raises(ValueError, match="image 2, but"):
        model(**batch, image_index=torch.tensor([0, 1, 2, 0]))
    with pytest.raises(ValueError, match="labels is"):
        model(**batch | {"labels": batch["labels"][:, 1:]})


# Writing


def scores(model, pixel_values, texts) -> torch.Tensor:
    """Log-probability (R, L - 1) of every word of captions (R, L) after those before it."""
    with torch.no_grad():
        logits = model(pixel_values, texts).lm_logits[:, :-1]
    return logits.log_softmax(-1).gather(2, texts[:, 1:, None])[..., 0]


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT.expand(3, -1), None])
def test_greedy_words_are_the_most_probable_ones(model, prompt):
    written = model.generate(pixels(), prompt)
    words = PROMPT.expand(3, -1) if prompt is not None else torch.full((3, 1), 2)
    while words.shape[1] < written.shape[1]:
        with torch.no_grad():
            best = model(pixels(), words).lm_logits[:, -1].argmax(-1, keepdim=True)
        over = (words[:, 1:] == SEP).any(1, keepdim=True)
        words = torch.cat([words, best.masked_fill(over, 0)], 1)
    assert torch.equal(written, words)
    assert written.shape[1] == 20 or (written[:, 1:] == SEP).any(1).all()


@pytest.mark.parametrize("official", [False, True])
def test_an_image_is_projected_once_for_all_beams(model, official, monkeypatch):
    calls = []
    project = KeyValueProjection.forward

    def count(self, context):
        calls.append(context.shape)
        return project(self, context)

    monkeypatch.setattr(KeyValueProjection, "forward", count)
    model.generate(pixels(), PROMPT, num_beams=3, min_length=12, official_length=official)
    assert calls == [(3, 5, model.vision_model.width)] * 2  # fusion layers
    calls.clear()
    written = model.generate(pixels(), PROMPT, do_sample=True, num_return_sequences=4, top_k=0)
    assert len(calls) == 2 and len(written) == 12


def test_samples_of_an_image_are_next_to_one_another(model):
    """Greedy captions, so to say: one word with all probability."""
    images = pixels()
    samples = model.generate(images, PROMPT, do_sample=True, num_return_sequences=2, top_k=1)
    greedy = model.generate(images, PROMPT)
    assert torch.equal(samples[:, : greedy.shape[1]], greedy.repeat_interleave(2, 0))


@pytest.mark.parametrize("official", [False, True])
def test_beams_search_every_caption(model, official):
    """As many beams as there are beginnings find the best caption of up to two words by the rule."""
    images, words = pixels(), 40
    rule = {"early_stopping": "never"} | ({"official_length": True} if official else {})
    found = model.generate(images, PROMPT, num_beams=words, max_new_tokens=2, **rule)
    found = F.pad(found, (0, 5 - found.shape[1]))
    first, second = torch.meshgrid(torch.arange(words), torch.arange(words), indexing="ij")
    every = torch.cat([PROMPT.expand(words**2, -1), first.reshape(-1, 1), second.reshape(-1, 1)], 1)
    every = every[(first.flatten() != SEP) | (second.flatten() == 0)]  # nothing after [SEP]
    ends_first = every[:, 3] == SEP
    ends = every[:, 3:] == SEP
    for i, image in enumerate(images):
        of_words = scores(model, image[None], every)[:, 2:]
        total = of_words.sum(1).where(~ends_first, of_words[:, 0])
        new_words = 2 - ends_first.long()
        length = 3 + new_words - ends.any(1).long() if official else new_words
        assert torch.equal(found[i], every[(total / length).argmax()])


def official_beams(
    model, image, prompt: list[int], beams: int, max_length: int, min_length: int
) -> list[int]:
    """The search of transformers 4.12 for one image, one candidate at a time."""
    live, finished, done = [(0.0, prompt)], [], False
    for _ in range(max_length - len(prompt)):
        candidates = []
        for total, words in live:
            with torch.no_grad():
                of_words = model(image[None], torch.tensor([words])).lm_logits[0, -1].log_softmax(-1)
            if len(words) < min_length:
                of_words[SEP] = -torch.inf
            candidates += [(total + score, words, word) for word, score in enumerate(of_words.tolist())]
        candidates = sorted(candidates, key=lambda one: -one[0])[: 2 * beams]
        length, live = len(candidates[0][1]), []
        for rank, (total, words, word) in enumerate(candidates):
            if word != SEP:
                live.append((total, [*words, word]))
            elif rank < beams:
                finished.append((total / length, [*words, SEP]))
                finished = sorted(finished, key=lambda one: -one[0])[:beams]
            if len(live) == beams:
                break
        if len(finished) == beams and finished[-1][0] >= candidates[0][0] / length:
            done = True
            break
    if not done:
        finished += [(total / len(words), words) for total, words in live]
    return max(finished, key=lambda one: one[0])[1]


@pytest.mark.parametrize(
    ("beams", "max_length", "min_length"), [(3, 20, 5), (2, 9, 7), (4, 5, 0), (5, 12, 12)]
)
def test_the_official_rule_is_that_of_transformers_4(model, beams, max_length, min_length):
    with torch.no_grad():  # so that captions end
        model.decoder.lm_head.decoder.bias[SEP] += 1.5
    images = pixels(6)
    limits = {"max_length": max_length, "min_length": min_length}
    written = model.generate(images, PROMPT, num_beams=beams, official_length=True, **limits)
    lengths = set()
    for image, ours in zip(images, written.tolist(), strict=True):
        expected = official_beams(model, image, PROMPT[0].tolist(), beams, max_length, min_length)
        lengths.add(len(expected))
        assert ours == expected + [0] * (written.shape[1] - len(expected))
    assert len(lengths) > 1 or max_length < 13


def test_ids_may_become_known_later(model):
    """The config is asked when captions are written."""
    text, images = model.config.text_config, pixels()
    with torch.no_grad():  # so that captions end
        model.decoder.lm_head.decoder.bias[SEP] += 3
    expected = model.generate(images, PROMPT, num_beams=2)
    text.bos_token_id = text.eos_token_id = None
    late = hf_vlp.XVLMForCaptioning(model.config).eval()
    late.load_state_dict(model.state_dict())
    text.bos_token_id, text.eos_token_id = 2, SEP
    assert expected.shape[1] < 20 and torch.equal(late.generate(images, PROMPT, num_beams=2), expected)


def test_more_than_one_caption_of_each_image_by_the_official_rule(model):
    settings = {"num_beams": 4, "max_length": 8, "official_length": True}
    best = model.generate(pixels(), PROMPT, **settings)
    several = model.generate(pixels(), PROMPT, num_return_sequences=3, **settings)
    first = several[::3]
    assert len(several) == 9 and torch.equal(first[:, : best.shape[1]], best)
    assert all(len(set(map(tuple, rows.tolist()))) == 3 for rows in several.split(3))


def test_writing_by_eager_attention(model):
    settings = {"num_beams": 3, "official_length": True}
    expected = model.generate(pixels(), PROMPT, **settings)
    model.set_attn_implementation("eager")
    assert torch.equal(model.generate(pixels(), PROMPT, **settings), expected)


def test_what_cannot_be_written(model):
    with pytest.raises(ValueError, match="2 prompts for 3 images"):
        model.generate(pixels(), PROMPT.expand(2, -1))
    for wrong in ({"num_beams": 1}, {"num_beams": 2, "do_sample": True}):
        with pytest.raises(ValueError, match="at least two without sampling"):
            model.generate(pixels(), PROMPT, official_length=True, **wrong)
    model.config.text_config.bos_token_id = None
    with pytest.raises(ValueError, match="bos_token_id"):
        model.generate(pixels())


# Texts


def test_captions_with_their_prompt():
    processor = tiny_processor()
    processor.prompt = "a the"
    batch = processor.encode_captions(["red circle", "cross"])
    assert batch["input_ids"].tolist() == [[2, 5, 7, 8, 12, 3], [2, 5, 7, 15, 3, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1] * 5 + [0]]
    assert batch["labels"].tolist() == [[-100] * 3 + [8, 12, 3], [-100] * 3 + [15, 3, -100]]
    assert processor.encode_prompt()["input_ids"].tolist() == [[2, 5, 7]]
    assert processor.decode_captions(batch["input_ids"]) == ["red circle", "cross"]
    processor.prompt = ""
    batch = processor.encode_captions(["red circle"])
    assert batch["labels"].tolist() == [[-100, 8, 12, 3]]
    assert processor.decode_captions(batch["input_ids"]) == ["red circle"]
    with pytest.raises(ValueError, match="captions holds ''"):
        processor.encode_captions(["red", ""])


def test_long_captions_keep_their_end(tmp_path):
    processor = tiny_processor()
    processor.prompt = "the"
    batch = processor.encode_captions(["red " * 30])
    assert batch["input_ids"].shape == (1, 20) and batch["input_ids"][0, -1] == SEP
    processor.save_pretrained(tmp_path)
    assert hf_vlp.XVLMProcessor.from_pretrained(tmp_path).prompt == "the"

"""What the heads of ALBEF and X-VLM do beside their losses: rank and write answers, assign texts, point."""

import pytest
import torch
from tiny import (
    IMAGE_SIZE,
    answer_batch,
    assignment_batch,
    entailment_batch,
    image_batch,
    reasoning_batch,
    retrieval_batch,
    text_batch,
    tiny_albef_config,
    tiny_albef_processor,
    tiny_config,
)
from transformers import DynamicCache

import hf_vlp
from hf_vlp.evaluation.inference import evaluating
from hf_vlp.models.boxes import heatmap_boxes
from hf_vlp.models.layers_bert import Context, Packing, split_heads

CANDIDATES = ["red", "blue circle", "a top left cross", "blue", "the", "blue square", "of"]
CONFIGS = {"ALBEF": tiny_albef_config, "XVLM": tiny_config}


@pytest.fixture(params=CONFIGS)
def make(request):
    """Builds a head of one paper, then of the other: `make("ForRetrieval")`."""
    return lambda head: getattr(hf_vlp, request.param + head)(CONFIGS[request.param]())


def loud(model):
    """Weights large enough that a lost term shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def answering(make):
    model = loud(make("ForQuestionAnswering"))
    model.distillation_weight = 0.0  # losses are log-probabilities then
    return model


def questions() -> dict[str, torch.Tensor]:
    return {**image_batch(3), **text_batch(3)}


def answers() -> dict[str, torch.Tensor]:
    return dict(tiny_albef_processor().encode_answers(CANDIDATES))


# Question answering


def negative_log_likelihood(model, batch, question: int, answer: str) -> torch.Tensor:
    one = {name: value[question : question + 1] for name, value in batch.items()}
    return model(**one, **tiny_albef_processor().encode_answers([answer])).answer_losses[0]


@pytest.mark.parametrize("twice", [True, False])
@pytest.mark.parametrize("top_k", [4, 100])
def test_ranking_is_scoring_answer_by_answer(answering, twice, top_k):
    """Shared keys and values, a shared first step and packing change nothing."""
    model, batch = answering, questions()
    model.config.count_first_token_twice = twice
    ranked = model.rank_answers(**batch, **answers(), top_k=top_k)
    count = min(top_k, len(CANDIDATES))
    assert ranked.indices.shape == ranked.probabilities.shape == (3, count)
    for question in range(3):
        chosen = [CANDIDATES[i] for i in ranked.indices[question].tolist()]
        assert len(set(chosen)) == count
        scores = []
        for answer in chosen:
            score = -negative_log_likelihood(model, batch, question, answer)
            if twice:
                score = score - first_token_loss(model, batch, question, answer)
            scores.append(score)
        expected = torch.stack(scores).softmax(0)
        torch.testing.assert_close(ranked.probabilities[question], expected, atol=1e-6, rtol=1e-4)
        assert (expected.diff() <= 1e-6).all()  # best first


def first_token_loss(model, batch, question: int, answer: str) -> torch.Tensor:
    one = {name: value[question : question + 1] for name, value in batch.items()}
    tokens = tiny_albef_processor().encode_answers([answer])
    first = {name: value[:, :2] for name, value in tokens.items()}
    return model(**one, **first).answer_losses[0]


def test_ranking_in_chunks(answering, monkeypatch):
    expected = answering.rank_answers(**questions(), **answers())
    monkeypatch.setattr("hf_vlp.models.image_text_answering.ROWS_PER_CALL", 2)
    ranked = answering.rank_answers(**questions(), **answers())
    assert torch.equal(ranked.indices, expected.indices)
    torch.testing.assert_close(ranked.probabilities, expected.probabilities)


def test_ranking_and_writing_by_eager_attention(answering):
    ranked, written = answering.rank_answers(**questions(), **answers()), answering.generate(**questions())
    answering.set_attn_implementation("eager")
    again = answering.rank_answers(**questions(), **answers())
    assert torch.equal(again.indices, ranked.indices)
    torch.testing.assert_close(again.probabilities, ranked.probabilities)
    assert torch.equal(answering.generate(**questions()), written)


def test_ranking_needs_a_number(answering):
    with pytest.raises(ValueError, match="top_k is 0"):
        answering.rank_answers(**questions(), **answers(), top_k=0)


def test_greedy_answers_are_the_most_probable_words(answering):
    batch = questions()
    written = answering.generate(**batch, max_new_tokens=4)
    for question in range(3):
        one = {name: value[question : question + 1] for name, value in batch.items()}
        words = torch.tensor([[2]])
        while words.shape[1] < 5 and words[0, -1] != 3:
            # the loss of each possible next word, as an answer that ends there
            candidates = torch.cat([words.expand(40, -1), torch.arange(40)[:, None]], 1)
            losses = answering(
                **one,
                answer_input_ids=candidates,
                answer_question_index=torch.zeros(40, dtype=torch.long),
            ).answer_losses
            words = torch.cat([words, losses.argmin().view(1, 1)], 1)
        expected = torch.nn.functional.pad(words[0], (0, written.shape[1] - words.shape[1]))
        assert torch.equal(written[question], expected)


def test_beams_find_the_most_probable_answer(answering):
    """As many beams as words search all answers of up to two words."""
    batch = questions()
    beams = {"num_beams": 40, "length_penalty": 0.0, "early_stopping": "never"}
    found = answering.generate(**batch, max_new_tokens=2, **beams)
    found = torch.nn.functional.pad(found, (0, 3 - found.shape[1]))
    found[found[:, 1] == 3, 2] = 0  # beams go on with [SEP] or [PAD]
    first, second = torch.meshgrid(torch.arange(40), torch.arange(40), indexing="ij")
    every = torch.stack([torch.full((1600,), 2), first.flatten(), second.flatten()], 1)
    every[every[:, 1] == 3, 2] = 0
    for question in range(3):
        one = {name: value[question : question + 1] for name, value in batch.items()}
        mask = torch.cat([torch.ones(1600, 2), (every[:, 1] != 3)[:, None]], 1).long()
        losses = answering(
            **one,
            answer_input_ids=every,
            answer_attention_mask=mask,
            answer_question_index=torch.zeros(1600, dtype=torch.long),
        ).answer_losses
        assert torch.equal(found[question], every[losses.argmin()])


def test_decoded_answers_are_what_was_encoded():
    processor = tiny_albef_processor()
    assert processor.decode_answers(answers()["answer_input_ids"]) == CANDIDATES
    with pytest.raises(ValueError, match="answers holds ' '"):
        processor.encode_answers(["red", " "])


def test_generation_needs_to_know_its_ids(answering):
    answering.config.text_config.bos_token_id = None
    with pytest.raises(ValueError, match="bos_token_id"):
        answering.generate(**questions())


def test_answers_that_do_not_fit(answering):
    batch = answer_batch()
    with pytest.raises(ValueError, match="answer_input_ids is None"):
        answering(**questions())
    with pytest.raises(ValueError, match="answer_question_index"):
        answering(**{name: value for name, value in batch.items() if name != "answer_question_index"})
    with pytest.raises(ValueError, match="answer_weights"):
        answering(**batch | {"answer_weights": torch.ones(2)})


def test_weights_and_questions_of_answers(answering):
    """The loss is the weighed sum over the answers of all questions, by the number of questions."""
    batch = answer_batch()
    losses = []
    for answer, question in enumerate(batch["answer_question_index"].tolist()):
        one = {n: v[question : question + 1] for n, v in batch.items() if not n.startswith("answer_")}
        ids, mask = batch["answer_input_ids"][answer : answer + 1], batch["answer_attention_mask"][[answer]]
        losses.append(answering(**one, answer_input_ids=ids, answer_attention_mask=mask).loss)
    expected = (torch.stack(losses) * batch["answer_weights"]).sum() / 4
    torch.testing.assert_close(answering(**batch).loss, expected)


@pytest.mark.parametrize("packed", [False, True])
def test_a_decoder_with_a_cache_is_one_without(answering, packed):
    decoder = answering.decoder
    ids = torch.randint(5, 40, (4, 6))
    context = decoder.read_context(torch.randn(2, 5, 16), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]))
    whole = decoder.decode(ids, context)
    cache = DynamicCache()
    first = decoder.decode(ids[:, :2], context, cache)
    packing = Packing.of(torch.ones(4, 4)) if packed else None
    rest = decoder.decode(ids[:, 2:], context, cache, packing)
    rest = packing.pad(rest) if packed else rest
    torch.testing.assert_close(torch.cat([first, rest], 1), whole, atol=1e-5, rtol=1e-5)
    swapped = Context([(k.flip(0), v.flip(0)) for k, v in context.key_values], context.mask.flip(0))
    torch.testing.assert_close(decoder.decode(ids.roll(2, 0), swapped).roll(-2, 0), whole)


# Several texts of one image


@pytest.mark.parametrize("head", ["ForVisualEntailment", "ForQuestionAnswering"])
def test_texts_share_an_image(head, make):
    model = loud(make(head))
    batch = entailment_batch() if head == "ForVisualEntailment" else answer_batch()
    index = torch.tensor([1, 0, 1, 1])
    shared = batch | {"pixel_values": batch["pixel_values"][:2], "image_index": index}
    repeated = batch | {"pixel_values": batch["pixel_values"][index], "image_index": None}
    torch.testing.assert_close(model(**shared).loss, model(**repeated).loss)
    with pytest.raises(ValueError, match="names image 5"):
        model(**shared | {"image_index": torch.tensor([0, 1, 5, 0])})


@pytest.mark.parametrize("classes", [{"num_labels": 2}, {"id2label": {0: "false", 1: "true"}}, {}])
def test_classes_of_entailment(classes, make, tmp_path):
    """Those of SNLI-VE, or one's own; also two unnamed ones, which transformers does not write by itself."""
    make("ForPreTraining").save_pretrained(tmp_path / "pretrained")
    head = type(make("ForVisualEntailment"))
    model = head.from_pretrained(tmp_path / "pretrained", **classes)
    model.save_pretrained(tmp_path)
    loaded = head.from_pretrained(tmp_path)
    assert loaded.config.id2label == model.config.id2label and len(loaded.config.id2label) == (
        2 if classes else 3
    )
    assert loaded.config.label2id == {name: i for i, name in loaded.config.id2label.items()}
    assert torch.equal(loaded.cls_head.fc2.weight, model.cls_head.fc2.weight)


# Two images


def test_the_order_of_images_matters(make):
    model = loud(make("ForVisualReasoning"))
    batch = reasoning_batch()
    swapped = batch | {"pixel_values": batch["pixel_values"].flip(1)}
    assert not torch.allclose(model(**batch).logits, model(**swapped).logits, atol=1e-3)
    with pytest.raises(ValueError, match="two images per sentence"):
        model(**batch | {"pixel_values": batch["pixel_values"][:, 0]})


def test_text_assignment_is_reasoning_on_chosen_pairs(make):
    model = loud(make("ForTextAssignment"))
    batch = assignment_batch()
    images, own = batch["pixel_values"], range(4)
    reasoning = make("ForVisualReasoning").eval()
    reasoning.model.load_state_dict(model.model.state_dict(), strict=False)
    reasoning.cls_head = model.ta_head
    pairs = []
    for i, label, (other, third) in zip(own, batch["labels"], batch["negative_image_index"], strict=True):
        pairs.append(images[[(i, other), (other, i), (other, third)][label], :])
    expected = reasoning(torch.stack(pairs), batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(model(**batch).logits, expected.logits)


def test_text_assignment_draws_two_other_images(make):
    model = make("ForTextAssignment")
    features = torch.nn.functional.normalize(torch.randn(5, 8), dim=1)
    for _ in range(50):
        drawn = model._draw_two_negatives(features)
        own = torch.arange(5)
        assert (
            (drawn[:, 0] != own).all() and (drawn[:, 1] != own).all() and (drawn[:, 0] != drawn[:, 1]).all()
        )
    batch = {**image_batch(2), **text_batch(2)}
    with pytest.raises(ValueError, match="at least three"):
        model(**batch)


# Pointing


@pytest.fixture(params=[hf_vlp.ALBEFForGrounding, hf_vlp.XVLMForWeakGrounding])
def grounding(request):
    return loud(request.param(CONFIGS["ALBEF" if request.param is hf_vlp.ALBEFForGrounding else "XVLM"]()))


def test_phrases_share_an_image_and_its_heat_is_their_own(grounding):
    batch = {**image_batch(2), **text_batch(3)}
    index = torch.tensor([0, 1, 1])
    shared = grounding(**batch, region_image_index=index)
    repeated = grounding(**batch | {"pixel_values": batch["pixel_values"][index]})
    assert shared.heatmap.shape == (3, 2, 2) and shared.pred_boxes.shape == (3, 4)
    torch.testing.assert_close(shared.heatmap, repeated.heatmap)
    text_embeds = grounding.get_text_features(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    images = grounding.get_image_features(batch["pixel_values"]).last_hidden_state[index]
    logits = grounding.match(text_embeds, batch["attention_mask"], grounding.project_image(images))
    torch.testing.assert_close(shared.itm_logits, logits)


def test_pointing_leaves_no_trace(grounding):
    batch = {**image_batch(2), **text_batch(2)}
    with evaluating(grounding):
        grounding(**batch)
    assert all(parameter.grad is None for parameter in grounding.parameters())
    trained = {name for name, p in grounding.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in grounding.named_parameters() if not n.startswith("teacher.")}
    assert grounding.config.text_config._attn_implementation == "sdpa"
    assert not any(hasattr(module, "recorded_maps") for module in grounding.modules())


def test_heat_of_the_contrastive_score():
    grounding = loud(hf_vlp.ALBEFForGrounding(tiny_albef_config()))
    batch = {**image_batch(2), **text_batch(2)}
    heat = grounding.contrastive_heatmaps(**batch)
    assert heat.shape == (2, 2, 2) and (heat >= 0).all() and heat.max() > 0
    first = grounding.contrastive_heatmaps(**batch, layer=0)
    assert not torch.allclose(first, heat)


def test_grounding_trains_as_retrieval(grounding):
    is_albef = isinstance(grounding, hf_vlp.ALBEFForGrounding)
    retrieval = hf_vlp.ALBEFForRetrieval if is_albef else hf_vlp.XVLMForRetrieval
    retrieval = retrieval(grounding.config).eval()
    retrieval.load_state_dict(grounding.state_dict())
    torch.testing.assert_close(
        dict(grounding(**retrieval_batch()).items()), dict(retrieval(**retrieval_batch()).items())
    )


def test_the_layer_that_points():
    """By default the third of six fusion layers in ALBEF, the fourth, its block 9, in X-VLM."""
    texts = {"num_fusion_layers": 6}
    assert hf_vlp.ALBEFConfig(text_config=texts).gradcam_layer == 2
    assert hf_vlp.XVLMConfig(text_config=texts).gradcam_layer == 3
    for config in CONFIGS.values():
        assert config(gradcam_layer=0).gradcam_layer == 0
        with pytest.raises(ValueError, match="gradcam_layer=2 is none of 0 to 1"):
            config(gradcam_layer=2)


def test_the_chosen_layer_points(grounding):
    batch, heat = {**image_batch(2), **text_batch(2)}, []
    for layer in (0, 1):
        grounding.config.gradcam_layer = layer
        heat.append(grounding(**batch).heatmap)
    assert not torch.allclose(*heat)


def test_heat_is_attention_times_its_positive_gradient(grounding, monkeypatch):
    """By hand: a graph from the attention of the layer to the logits."""
    batch, maps = {**image_batch(2), **text_batch(2)}, []
    module = grounding.model.fusion_model.layer[grounding.config.gradcam_layer].crossattention.self

    def attend(queries, key_values, mask):
        keys, values = key_values
        scores = split_heads(queries, module.num_heads) @ keys.mT * module.scaling
        maps.append(scores.softmax(dim=-1).detach().requires_grad_())
        return (maps[0] @ values).transpose(1, 2).flatten(2)

    text_embeds = grounding.get_text_features(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    images = grounding.get_image_features(batch["pixel_values"]).last_hidden_state
    with monkeypatch.context() as patch:
        patch.setattr(module, "attend", attend)
        fused = grounding.model.fuse(text_embeds, batch["attention_mask"], grounding.project_image(images))
    grounding.itm_head(fused[:, 0])[:, 1].sum().backward()
    expected = (maps[0] * maps[0].grad.clamp(min=0))[..., 1:].mean(dim=1) * batch["attention_mask"][..., None]
    torch.testing.assert_close(grounding(**batch).heatmap, expected.mean(dim=1).unflatten(-1, (2, 2)))


def test_boxes_around_heat():
    heat = torch.zeros(2, 4, 4)
    heat[0, 1, 2:] = 1.0
    heat[0, 3, 0] = 0.4
    heat[1, 2, 1] = heat[1, 3, 3] = 2.0
    expected = torch.tensor([[0.75, 0.375, 0.5, 0.25], [0.625, 0.75, 0.75, 0.5]])
    torch.testing.assert_close(heatmap_boxes(heat), expected)


def test_proposals_are_ranked_by_the_official_rule():
    """Heat inside, over the root of the area, on the map resampled to the image."""
    torch.manual_seed(0)
    heat, size = torch.rand(2, 3, 3), (21, 30)
    boxes = [[[0, 0, 10, 7], [2.6, 3.2, 15.5, 10.1]], [[5, 5, 20, 15]]]
    scores = tiny_albef_processor().rank_proposals(heat, boxes, [size, size])
    assert [len(one) for one in scores] == [2, 1]
    for one, some, of_image in zip(heat, boxes, scores, strict=True):
        pixels = torch.nn.functional.interpolate(one[None, None], size, mode="bicubic")[0, 0]
        for (x, y, w, h), score in zip(some, of_image, strict=True):
            inside = pixels[int(y) : int(y + h), int(x) : int(x + w)].sum()
            torch.testing.assert_close(score, inside / (w * h) ** 0.5)
    with pytest.raises(ValueError, match="without area"):
        tiny_albef_processor().rank_proposals(heat, [[[0, 0, 0, 5]], boxes[1]], [size, size])
    with pytest.raises(ValueError, match="2 maps"):
        tiny_albef_processor().rank_proposals(heat, boxes[:1], [size])


def test_questions_are_cleaned_by_their_own_rule():
    processor = tiny_albef_processor()
    processor.max_words = 3
    assert processor.clean_question("What's that -- a CAT/dog?") == "whats that "  # every space ends a word
    assert processor.clean_text("What's that -- a CAT/dog?") == "whats that a"
    with pytest.raises(ValueError, match="question='[?]'"):
        processor.clean_question("?")


def test_image_size_of_the_processor_is_that_of_the_config():
    processor = hf_vlp.ALBEFProcessor.from_config(tiny_albef_config(), tiny_albef_processor().tokenizer)
    assert processor.image_processor.size == {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    assert hf_vlp.ALBEFImageProcessor().size == {"height": 256, "width": 256}

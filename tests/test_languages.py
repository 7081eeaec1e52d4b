"""Other text encoders and tokenizers, and texts in another language than English."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import IMAGE_SIZE, STRIDE, TEXT, TRUNKS, tiny_tokenizer
from tokenizers_of_languages import byte_level_tokenizer, sentencepiece_tokenizer
from transformers import (
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    DistilBertConfig,
    DistilBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
    ViTModel,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

import hf_vlp
from hf_vlp.data.collators import ImageTextCollator, RegionCollator
from hf_vlp.data.masking import WholeWordMasking, continuations
from hf_vlp.data.shapes import shapes_dataset
from hf_vlp.models.public_weights import split_bert_config

COLOURS = {"red": "rot", "green": "grün", "blue": "blau", "yellow": "gelb"}
SHAPES = {"circle": "ein {}er Kreis", "square": "ein {}es Quadrat", "triangle": "ein {}es Dreieck"}
PLACES = {"top": "oben", "bottom": "unten", "left": "links", "right": "rechts"}


def german(text: str) -> str:
    """A caption or phrase of level 0: "a red circle top left" is "ein roter Kreis oben links"."""
    objects = []
    for words in (part.split() for part in text.split(" and ")):
        _, colour, shape, *place = words
        objects.append(" ".join([SHAPES[shape].format(COLOURS[colour]), *(PLACES[word] for word in place)]))
    return " und ".join(objects)


CAPTIONS = [german(row["caption"]) for row in shapes_dataset("captions", "train", 60)]
TOKENIZERS = {"byte level": byte_level_tokenizer, "sentencepiece": sentencepiece_tokenizer}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param](CAPTIONS)


def _processor(tokenizer, **settings) -> hf_vlp.XVLMProcessor:
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = hf_vlp.XVLMImageProcessor(size=size)
    settings = {"patch_size": STRIDE, "clean": False, **settings}
    return hf_vlp.XVLMProcessor(image_processor, tokenizer, **settings)


def test_captions():
    assert german("a red circle top left and a blue square bottom right") == (
        "ein roter Kreis oben links und ein blaues Quadrat unten rechts"
    )


# Texts


def test_a_text_is_start_and_words(tokenizer, tmp_path):
    _processor(tokenizer).save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor.tokenizer) is type(tokenizer) and not processor.clean
    batch = processor(text=["ein grünes Dreieck", "ein grünes Dreieck oben links"])
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    assert (ids[:, 0] == tokenizer.cls_token_id).all() and not (ids == tokenizer.sep_token_id).any()
    assert (ids[~mask] == 1).all() and not mask.all()
    assert tokenizer.decode(ids[0][mask[0]][1:]).strip() == "ein grünes Dreieck"
    answers = processor.encode_answers(["rot", "oben links"])["answer_input_ids"]
    assert processor.decode_answers(answers) == ["rot", "oben links"]
    words = tokenizer("rot", add_special_tokens=False).input_ids
    assert answers[0, : len(words) + 2].tolist() == [0, *words, 2]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("  L'été, où est   la Tour-Eiffel?\n", "L'été, où est la Tour-Eiffel?"),
        ("İstanbul'da bir köpek", "İstanbul'da bir köpek"),
        ("一只狗。", "一只狗。"),
        ("Wort " * 50, " ".join(["Wort"] * 40)),
    ],
)
def test_texts_that_are_not_cleaned(text, kept):
    processor = _processor(tiny_tokenizer())
    assert processor.clean_text(text) == processor.clean_question(text) == kept
    with pytest.raises(ValueError, match="no word"):
        processor.clean_text("  ")


def test_tokenizers_that_do_not_fit():
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="mask_token"):
        WholeWordMasking(tokenizer)
    tokenizer.sep_token = None
    with pytest.raises(ValueError, match="sep_token=None"):
        _processor(tokenizer)


# Whole words

TRAINED = [(one, continuations(one)) for one in (make(CAPTIONS) for make in TOKENIZERS.values())]


@given(st.lists(st.sampled_from("ein roter grünes Dreieck Kreis rechts und".split()), min_size=1, max_size=9))
def test_continuations_are_pieces_after_the_first_of_each_word(words):
    for tokenizer, is_continuation in TRAINED:
        ids = tokenizer(" ".join(words), add_special_tokens=False).input_ids
        begins = [not is_continuation[token] for token in ids]
        begins[0] = True  # the first word of a text has no space before it in byte-level BPE
        assert sum(begins) == len(words)
        start = [position for position, begun in enumerate(begins) if begun] + [len(ids)]
        pieces = [ids[a:b] for a, b in zip(start, start[1:], strict=False)]
        assert [tokenizer.decode(piece).strip() for piece in pieces] == words


def test_special_tokens_and_whole_words_continue_nothing(tokenizer):
    is_continuation = continuations(tokenizer)
    assert not any(is_continuation[token] for token in tokenizer.all_special_ids) and any(is_continuation)
    assert not any(continuations(tiny_tokenizer()))


def test_words_are_masked_whole(tokenizer):
    masking = WholeWordMasking(tokenizer, mask_probability=0.3, max_masks=100, span_probability=0.0)
    is_continuation = continuations(tokenizer)
    batch = _processor(tokenizer, max_tokens=200)(text=CAPTIONS)
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
        ids = ids[mask].tolist()
        masked = masking.choose_positions(ids, random.Random(0))
        word = torch.tensor([not is_continuation[token] or i == 1 for i, token in enumerate(ids)]).cumsum(0)
        of_words = torch.isin(word, word[masked])  # all tokens of the words that are masked, [CLS] not
        assert 0 not in masked and not of_words[0]
        # the count is exact, so what is cut is less than the one word drawn last
        assert int(of_words.sum()) - len(masked) < word[of_words].unique(return_counts=True)[1].max()


# Public weights

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
SIZES |= {"num_hidden_layers": 4, "max_position_embeddings": 20}


@pytest.mark.parametrize(
    ("config", "model_class"),
    [(RobertaConfig, RobertaForMaskedLM), (XLMRobertaConfig, XLMRobertaForMaskedLM)],
)
def test_from_a_public_roberta_and_a_public_clip(config, model_class, tmp_path):
    vision = TRUNKS["clip"]()
    text = CLIPTextConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    clip = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())).eval()
    roberta = model_class(config(**SIZES, type_vocab_size=1, layer_norm_eps=1e-5)).eval()
    with torch.no_grad():
        for parameter in roberta.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    clip.save_pretrained(tmp_path / "clip")
    roberta.save_pretrained(tmp_path / "text")
    model = hf_vlp.XVLMForPreTraining.from_backbones(
        str(tmp_path / "clip"), str(tmp_path / "text"), num_fusion_layers=2, projection_dim=8
    )
    fields = model.config.text_config
    assert (fields.position_offset, fields.pad_token_id, fields.bos_token_id, fields.eos_token_id) == (
        2,
        1,
        0,
        2,
    )
    ids = torch.tensor([[0, 7, 8, 9], [0, 9, 1, 1]])
    mask = (ids != 1).long()
    images = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    with torch.no_grad():
        states = roberta.roberta(ids, mask, output_hidden_states=True).hidden_states
        ours = model.model.text_model(ids, mask)
        torch.testing.assert_close(ours[mask.bool()], states[2][mask.bool()], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.lm_head(states[4]), roberta.lm_head(states[4]), atol=1e-5, rtol=1e-5)
        seen = clip.vision_model(images)
        torch.testing.assert_close(model.model.vision_model(images)[:, 0], seen.pooler_output)
    fusion = model.model.fusion_model.layer[1].output.dense.weight
    assert torch.equal(fusion, roberta.roberta.encoder.layer[3].output.dense.weight)
    assert not any(
        name.startswith(("lm_head", "model.text_model", "model.vision")) for name in model.new_parameters
    )


def test_other_public_models_are_refused(tmp_path):
    ViTModel(TRUNKS["vit"]()).save_pretrained(tmp_path / "vit")
    config = DistilBertConfig(vocab_size=40, dim=16, n_heads=2, n_layers=2, hidden_dim=32)
    DistilBertForMaskedLM(config).save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="text is a distilbert model"):
        hf_vlp.XVLMForPreTraining.from_backbones(str(tmp_path / "vit"), str(tmp_path / "text"))
    with pytest.raises(ValueError, match="num_fusion_layers"):
        split_bert_config(XLMRobertaConfig(), 4)


# Training


def test_a_few_steps_on_german_captions(tokenizer):
    torch.manual_seed(0)
    processor = _processor(tokenizer, max_tokens=60)
    text = TEXT | {
        "vocab_size": len(tokenizer),
        "position_offset": 2,
        "pad_token_id": 1,
        "max_position_embeddings": 80,
    }
    text |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2}
    config = hf_vlp.XVLMConfig(vision_config=TRUNKS["clip"](), text_config=text, projection_dim=8)
    model = hf_vlp.XVLMForPreTraining(config).train()
    captions = [
        {"image": row["image"], "caption": german(row["caption"])}
        for row in shapes_dataset("captions", "train", 16, image_size=IMAGE_SIZE)
    ]
    regions = [
        {"image": row["image"], "boxes": row["boxes"], "phrases": [german(p) for p in row["phrases"]]}
        for row in shapes_dataset("regions", "train", 8, image_size=IMAGE_SIZE)
    ]
    batches = [
        ImageTextCollator(processor=processor, augment=False)(captions),
        RegionCollator(processor=processor, augment=False, group_equal_texts=True)(regions),
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(30):
        losses.append(0.0)
        for batch in batches:
            loss = model(**batch).loss
            loss.backward()
            losses[-1] += loss.item()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])

"""Pre-train X-VLM on texts that are not English, read by a SentencePiece tokenizer, with a ViT for images.

    python examples/other_language_xvlm.py

It changes three things in `pretrain.py`: the tokenizer is one of XLM-R's kind, trained here on the captions;
the processor leaves texts as they are (`clean=False`), umlauts, capitals and all; and the image trunk is a
small ViT, whose last layer attends within each region. Captions are German sentences about drawn scenes. With
photographs and captions of yours you would start from public weights instead, of any vision model and of
XLM-R, which knows a hundred languages:

    model = XVLMForPreTraining.from_backbones("openai/clip-vit-base-patch16", "xlm-roberta-base")
    tokenizer = AutoTokenizer.from_pretrained("xlm-roberta-base")
    processor = XVLMProcessor.from_config(model.config, tokenizer, clean=False)

Every option goes to `VLPTrainingArguments`.
"""

from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import HfArgumentParser, ViTConfig, XLMRobertaTokenizer, set_seed

from hf_vlp import VLPTextConfig, XVLMConfig, XVLMForPreTraining, XVLMProcessor
from hf_vlp.data.collators import ImageTextCollator, RegionCollator
from hf_vlp.data.mixing import MixedCollator, MixedDataset
from hf_vlp.data.shapes import shapes_dataset
from hf_vlp.evaluation import evaluate_retrieval
from hf_vlp.training import VLPTrainer, VLPTrainingArguments

# Adjectives and articles follow the noun's gender
NOUNS = {"circle": "ein {}er Kreis", "square": "ein {}es Quadrat", "triangle": "ein {}es Dreieck"}
COLOURS = {"red": "rot", "green": "grün", "blue": "blau", "yellow": "gelb"}
PLACES = {"top": "oben", "bottom": "unten", "left": "links", "right": "rechts"}

# 36 patches of 8 pixels; weights of 0.02, right for a width of 768, are too quiet for one of 64
SIZE = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "initializer_range": 0.1}
VISION = SIZE | {"image_size": 48, "patch_size": 8, "num_hidden_layers": 2}
TEXT = SIZE | {"num_text_layers": 2, "num_fusion_layers": 2, "max_position_embeddings": 64}
TEXT |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

SCENES, TEST_SCENES = 500_000, 256
SCHEDULE = {
    "output_dir": "runs/other_language",
    "max_steps": 400,
    "per_device_train_batch_size": 64,
    "per_device_region_batch_size": 16,  # images, with two or three region-text pairs each
    "learning_rate": 2e-3,
    "warmup_steps": 50,
    "lr_scheduler_type": "cosine",
    "logging_steps": 50,
    "save_strategy": "no",
}


def in_german(text: str) -> str:
    """Such as "ein roter Kreis oben links" for "a red circle top left"."""
    objects = []
    for _, colour, noun, *place in (part.split() for part in text.split(" and ")):
        objects.append(" ".join([NOUNS[noun].format(COLOURS[colour]), *(PLACES[word] for word in place)]))
    return " und ".join(objects)


def translate(batch: dict[str, list]) -> dict[str, list]:
    """Rows as they are read, their texts in German."""
    translated = dict(batch)
    for column in batch.keys() & {"caption", "phrases"}:
        translated[column] = [
            in_german(texts) if isinstance(texts, str) else [in_german(text) for text in texts]
            for texts in batch[column]
        ]
    return translated


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> XLMRobertaTokenizer:
    """Pieces of words, learnt from texts of any language; "▁" marks those that begin a word."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    pieces = sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)
    # equally likely, so that a word is cut into as few as possible
    return XLMRobertaTokenizer(vocab=[(piece, 0.0 if piece in special else -1.0) for piece in pieces])


# 1. What to do
parser = HfArgumentParser(VLPTrainingArguments)
parser.set_defaults(**SCHEDULE)
(training,) = parser.parse_args_into_dataclasses()
set_seed(training.seed)

# 2. Drawn scenes with German captions and phrases
captions, regions = (
    shapes_dataset(task, "train", SCENES, seed=training.seed) for task in ("captions", "regions")
)
captions, regions = (
    captions.with_transform(translate),
    regions.remove_columns("caption").with_transform(translate),
)
test = shapes_dataset("retrieval", "test", TEST_SCENES, seed=training.seed).with_transform(translate)

# 3. The tokenizer, the processor and the model that fits both
tokenizer = train_tokenizer((captions[i]["caption"] for i in range(500)), vocab_size=80)
config = XVLMConfig(
    vision_config=ViTConfig(**VISION),
    text_config=VLPTextConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        **TEXT,
    ),
    projection_dim=64,
    local_attn_depth=1,
)
model = XVLMForPreTraining(config)
processor = XVLMProcessor.from_config(config, tokenizer, clean=False)
example = test[0]["caption"][0]
print(f"{example}: {' '.join(tokenizer.tokenize(example))}")

# 4. Training; phrases that are equal are no negatives of one another
trainer = VLPTrainer(
    model,
    training,
    train_dataset=MixedDataset(captions, regions),
    data_collator=MixedCollator(
        image=ImageTextCollator(processor=processor, augment=False),
        region=RegionCollator(processor=processor, augment=False, group_equal_texts=True),
    ),
    processing_class=processor,
)
trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
if not trainer.is_world_process_zero():
    raise SystemExit

# 5. The score beside chance, on scenes that were not trained on
metrics = evaluate_retrieval(model, processor, test, top_k=1).itc_metrics
texts, images = (metrics[f"{kind}_recall_at_1"] for kind in ("text", "image"))
print(f"R@1 by similarity: {texts:.3f} of texts, {images:.3f} of images")
print(f"R@1 in a random order: {1 / len(test):.3f}")

# 6. Saving: model, processor, and the code that reads them
model.save_pretrained(training.output_dir)
processor.save_pretrained(training.output_dir)
print(f"saved to {training.output_dir}")

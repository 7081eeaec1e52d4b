"""Pre-train SOHO on images and captions: words, entries of the visual dictionary, and matching; and draw what
the dictionary has learned.

    python examples/pretrain_soho.py
    python examples/finetune_soho.py --model runs/pretrain_soho
    python examples/pretrain_soho.py --model soho --train coco_cap_train_pre.json --image-root coco/train2014

The first line trains a tiny new model on drawn scenes; the second fine-tunes what it learned. The last goes
on with a model on SOHO's JSON lists, by the paper's schedule, which keeps the trunk as it is at first. Every
option not listed here goes to `VLPTrainingArguments`.
"""

import argparse
from pathlib import Path

from small_soho import IMAGE_SIZE, tiny_soho
from transformers import HfArgumentParser, set_seed

from hf_vlp import SOHOForPreTraining, SOHOForRetrieval, SOHOProcessor
from hf_vlp.data.masking import TokenMasking
from hf_vlp.data.orientation import with_image_sizes
from hf_vlp.data.shapes import shapes_dataset
from hf_vlp.data.soho_collators import SOHOPretrainingCollator
from hf_vlp.data.soho_readers import read_soho_pretraining
from hf_vlp.evaluation import evaluate_foils
from hf_vlp.training import RECIPES, VLPTrainer, VLPTrainingArguments
from hf_vlp.visualization import collect_entries, draw_entry_map, draw_entry_patches, draw_usage

PRETRAINING_ON_SHAPES = {
    "max_steps": 1000,
    "per_device_train_batch_size": 64,
    "learning_rate": 2e-3,
    "warmup_steps": 100,
    "lr_scheduler_type": "cosine",
    "logging_steps": 100,
    "save_strategy": "no",
}
SCENES = PRETRAINING_ON_SHAPES["max_steps"] * PRETRAINING_ON_SHAPES["per_device_train_batch_size"]
# Drawn scenes have few words: the more are masked, the more there is to look for
DRAWN = {"captions_per_image": 2}  # of which one belongs to the image
MASKED_WORDS = 0.4

# 1. What to do
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
)
parser.add_argument("--model", help="folder or Hub name to start from; without it a tiny new model")
parser.add_argument("--train", nargs="+", help="SOHO's JSON lists")
parser.add_argument("--image-root", default=".", help="folder of the images that the lists name")
parser.add_argument("--push-to-hub", metavar="ORG/NAME", help="repository on the Hub to push the result to")
options, rest = parser.parse_known_args()
has_own_rows = bool(options.train)
if has_own_rows and not options.model:
    parser.error("your own rows need --model: the tiny new model knows few words")

training_parser = HfArgumentParser(VLPTrainingArguments)
training_parser.set_defaults(output_dir="runs/pretrain_soho")
training_parser.set_defaults(**(RECIPES["soho_pretrain_paper"] if has_own_rows else PRETRAINING_ON_SHAPES))
(training,) = training_parser.parse_args_into_dataclasses(rest)
set_seed(training.seed)
output_dir = Path(training.output_dir)

# 2. The rows
if has_own_rows:
    train = read_soho_pretraining(options.train, options.image_root)
    train = train if "width" in train.column_names else with_image_sizes(train)
else:
    train = shapes_dataset("captions", "train", SCENES, image_size=IMAGE_SIZE, seed=training.seed)

# 3. The model, and its processor
if options.model:
    processor = SOHOProcessor.from_pretrained(options.model)
    model = SOHOForPreTraining.from_pretrained(options.model)
else:
    model, processor = tiny_soho(SOHOForPreTraining)

# 4. Training; words are masked where the text belongs to the image
drawn = {} if has_own_rows else DRAWN | {"masking": TokenMasking(processor.tokenizer, MASKED_WORDS)}
trainer = VLPTrainer(
    model,
    training,
    train_dataset=train,
    data_collator=SOHOPretrainingCollator(
        processor=processor, **({"balanced": True, "predict_mismatched": False} | drawn)
    ),
    processing_class=processor,
)
trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
if not trainer.is_world_process_zero():
    raise SystemExit

# 5. Saving and sharing: model, processor, and the code that reads them
model.save_pretrained(output_dir)
processor.save_pretrained(output_dir)
print(f"saved to {output_dir}")
if options.push_to_hub:
    model.push_to_hub(options.push_to_hub)
    processor.push_to_hub(options.push_to_hub)

# 6. What the dictionary has learned, in pictures
if has_own_rows:
    shown = train.select(range(min(256, len(train))))
else:
    shown = shapes_dataset("captions", "test", 256, image_size=IMAGE_SIZE, seed=training.seed)
images = [row["image"] for row in shown]
found = collect_entries(model, processor, images)
draw_entry_patches(found).save(output_dir / "dictionary_patches.png")
draw_entry_map(images[0], found.maps[0]).save(output_dir / "dictionary_map.png")
draw_usage(model, found.counts).save(output_dir / "dictionary_usage.png")
used = (found.counts > 0).float().mean()
print(f"entries in use, in {len(images)} images: {used:.3f}")

# 7. The score of the matching head, before any fine-tuning
if not has_own_rows:
    matching = SOHOForRetrieval.from_pretrained(output_dir)
    rows = shapes_dataset("foils", "test", 512, image_size=IMAGE_SIZE, seed=training.seed)
    foils = evaluate_foils(matching, processor, rows)
    print(f"captions above foils that differ in one word: {foils.accuracy:.3f}")
    print("a coin: 0.500")

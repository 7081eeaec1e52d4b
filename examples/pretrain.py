"""Pre-train X-VLM on whole images and on regions: contrast, match, complete and locate.

    python examples/pretrain.py
    python examples/pretrain.py --images cc3m/*.json --regions vg_regions/*.json --image-root images \\
        --vision microsoft/swin-base-patch4-window7-224-in22k --text bert-base-uncased
    python examples/pretrain.py --model xvlm-base --images my_rows --regions my_region_rows

It adds one idea to `finetune_retrieval.py`: two kinds of batches, mixed. Before an image batch comes, with
probability 0.5, a batch of regions, each with its own text and box. Rows of images have the columns image and
caption, rows of regions image, phrases, boxes ([x, y, w, h] in pixels) and, if there is one, caption. The
official JSON lines are read as they are. The first line above trains a tiny new model on drawn scenes, the
second starts as the paper does from a public Swin and BERT, with its schedule for 4 million images. Every
option not listed here goes to `VLPTrainingArguments`.
"""

import argparse
from pathlib import Path

import datasets
from transformers import AutoTokenizer, HfArgumentParser, set_seed

from hf_vlp import XVLMForPreTraining, XVLMProcessor
from hf_vlp.data.collators import ImageTextCollator, RegionCollator
from hf_vlp.data.masking import WholeWordMasking
from hf_vlp.data.mixing import MixedCollator, MixedDataset
from hf_vlp.data.readers import read_image_text, read_regions
from hf_vlp.evaluation import evaluate_retrieval
from hf_vlp.quickstart import shapes_rows, tiny_config, tiny_processor
from hf_vlp.training import RECIPES, VLPTrainer, VLPTrainingArguments

SCHEDULE_ON_SHAPES = {
    "max_steps": 300,
    "per_device_train_batch_size": 64,
    "per_device_region_batch_size": 16,  # images, with three or four region-text pairs each
    "learning_rate": 2e-3,
    "warmup_steps": 50,
    "lr_scheduler_type": "cosine",
    "logging_steps": 50,
    "save_strategy": "no",
}
# Drawn scenes have few words and all can be seen: the more are masked, the more there is to look for
MASKED_ON_SHAPES = 0.4


def read_rows(paths: list[str], read_official) -> datasets.Dataset:
    """Rows of a folder that `Dataset.save_to_disk` wrote, of parquet files, or of official JSON lines."""
    if Path(paths[0], "state.json").is_file():
        return datasets.load_from_disk(paths[0])
    if paths[0].endswith(".parquet"):
        return datasets.load_dataset("parquet", data_files=paths, split="train")
    return read_official(paths, options.image_root)


# 1. What to do
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
)
parser.add_argument("--model", help="folder or Hub name to start from; without it a tiny new model")
parser.add_argument("--vision", help="vision model to start from, with --text")
parser.add_argument("--text", help="BERT to start from")
parser.add_argument("--images", nargs="+", help="JSON lines, a saved Dataset, or parquet files of images")
parser.add_argument("--regions", nargs="+", help="the same of regions")
parser.add_argument("--image-root", help="folder of the images that JSON lines name")
parser.add_argument("--push-to-hub", metavar="ORG/NAME", help="repository on the Hub to push the result to")
options, rest = parser.parse_known_args()
has_own_rows = bool(options.images)
if has_own_rows != bool(options.regions) or bool(options.vision) != bool(options.text):
    parser.error("--images and --regions, and --vision and --text, go together")
if has_own_rows and not (options.model or options.vision):
    parser.error("your own rows need --model, or --vision and --text: the tiny new model knows few words")

training_parser = HfArgumentParser(VLPTrainingArguments)
training_parser.set_defaults(output_dir="runs/pretrain")
training_parser.set_defaults(**(RECIPES["xvlm_pretrain_4m"] if has_own_rows else SCHEDULE_ON_SHAPES))
(training,) = training_parser.parse_args_into_dataclasses(rest)
set_seed(training.seed)

# 2. The rows of both kinds
if has_own_rows:
    images, regions = read_rows(options.images, read_image_text), read_rows(options.regions, read_regions)
else:
    shapes = shapes_rows(training.seed)
    images, regions = shapes.captions, shapes.regions

# 3. The model and its processor
if options.model:
    processor = XVLMProcessor.from_pretrained(options.model)
    model = XVLMForPreTraining.from_pretrained(options.model)
elif options.vision:
    model = XVLMForPreTraining.from_backbones(options.vision, options.text)
    processor = XVLMProcessor.from_config(model.config, AutoTokenizer.from_pretrained(options.text))
else:
    processor = tiny_processor(shapes.words, shapes.image_size)
    model = XVLMForPreTraining(tiny_config(processor))

# 4. Training; a batch is of one kind and goes to that kind's collator. Regions with equal texts ("a red
# circle") are no negatives of one another.
masking = WholeWordMasking(processor.tokenizer, 0.25 if has_own_rows else MASKED_ON_SHAPES)
settings = {"processor": processor, "augment": has_own_rows, "masking": masking}
trainer = VLPTrainer(
    model,
    training,
    train_dataset=MixedDataset(images, regions),
    data_collator=MixedCollator(
        image=ImageTextCollator(**settings),
        region=RegionCollator(**settings, group_equal_texts=True),
    ),
    processing_class=processor,
)
trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
if not trainer.is_world_process_zero():
    raise SystemExit

# 5. The score: texts and images found by similarity, before any fine-tuning
if not has_own_rows:
    test = shapes.test_retrieval
    metrics = evaluate_retrieval(model, processor, test, top_k=1).itc_metrics
    texts, images = (metrics[f"{kind}_recall_at_10"] for kind in ("text", "image"))
    print(f"R@10 by similarity: {texts:.3f} of texts, {images:.3f} of images")
    print(f"R@10 of images in a random order: {10 / len(test):.3f}")

# 6. Saving and sharing: model, processor, and the code that reads them
model.save_pretrained(training.output_dir)
processor.save_pretrained(training.output_dir)
print(f"saved to {training.output_dir}")
if options.push_to_hub:
    model.push_to_hub(options.push_to_hub)
    processor.push_to_hub(options.push_to_hub)

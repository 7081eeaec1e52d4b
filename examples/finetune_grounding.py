"""Fine-tune X-VLM for grounding: a text goes in, the box of what it names comes out.

    python examples/finetune_grounding.py
    python examples/finetune_grounding.py --model runs/pretrain
    python examples/finetune_grounding.py --model xvlm-base --image-size 384 \\
        --refs "refcoco+/refs(unc).p" --instances refcoco+/instances.json --image-root train2014
    python examples/finetune_grounding.py --model xvlm-base --image-size 384 --train my_rows --test test_rows

The first line trains a tiny new model on drawn scenes for a minute, which shows every step but does not get
far; the second starts from what `pretrain.py` saved. The others train on your data with the paper's schedule;
rows have the columns image, text and box ([x, y, w, h] in pixels), those to score on also candidates (boxes
of all objects) if there are any. Every option not listed here goes to `VLPTrainingArguments`, such as
--max_steps 100, --learning_rate 1e-4, --bf16, --gradient_checkpointing.
"""

import argparse
from pathlib import Path

import datasets
from transformers import HfArgumentParser, set_seed

from hf_vlp import XVLMForGrounding, XVLMProcessor
from hf_vlp.data.collators import GroundingCollator
from hf_vlp.data.readers import read_refcoco
from hf_vlp.evaluation import evaluate_grounding, random_object_accuracy
from hf_vlp.quickstart import shapes_rows, tiny_config, tiny_processor
from hf_vlp.training import RECIPES, VLPTrainer, VLPTrainingArguments

SCHEDULE_ON_SHAPES = {
    "max_steps": 400,
    "per_device_train_batch_size": 32,
    "learning_rate": 1e-3,
    "warmup_steps": 50,
    "lr_scheduler_type": "cosine",
    "logging_steps": 50,
    "save_strategy": "no",
}


def read_rows(path: str) -> datasets.Dataset:
    """Rows of a folder that `Dataset.save_to_disk` wrote, or of a parquet file."""
    if Path(path, "state.json").is_file():
        return datasets.load_from_disk(path)
    return datasets.load_dataset("parquet", data_files=path, split="train")


# 1. What to do
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
)
parser.add_argument("--model", help="folder or Hub name to start from; without it a tiny new model")
parser.add_argument("--image-size", type=int, help="pixels a side, if others than the model's")
parser.add_argument("--train", help="rows to train on: a folder of Dataset.save_to_disk, or a parquet file")
parser.add_argument("--test", help="rows to score on, likewise")
parser.add_argument("--refs", help="REFER's refs(...).p: trains on its split train, scores on its split val")
parser.add_argument("--instances", help="REFER's instances.json")
parser.add_argument("--image-root", help="folder of the images that REFER names")
parser.add_argument("--push-to-hub", metavar="ORG/NAME", help="repository on the Hub to push the result to")
options, rest = parser.parse_known_args()
has_own_rows = bool(options.train or options.refs)
if has_own_rows and not options.model:
    parser.error("your own rows need --model: the tiny new model knows the words of the drawn scenes only")

training_parser = HfArgumentParser(VLPTrainingArguments)
training_parser.set_defaults(output_dir="runs/grounding")
training_parser.set_defaults(**(RECIPES["xvlm_grounding_refcoco"] if has_own_rows else SCHEDULE_ON_SHAPES))
(training,) = training_parser.parse_args_into_dataclasses(rest)
set_seed(training.seed)

# 2. The rows to train on and those to score on, whose images have to be decoded
if options.refs:
    train, test = (
        read_refcoco(options.refs, options.instances, options.image_root, split) for split in ("train", "val")
    )
elif options.train:
    train, test = read_rows(options.train), options.test and read_rows(options.test)
else:
    shapes = shapes_rows(training.seed)
    train, test = shapes.grounding, shapes.test_grounding
if has_own_rows and test:
    test = test.cast_column("image", datasets.Image(mode="RGB"))

# 3. The model and its processor
if options.model:
    processor = XVLMProcessor.from_pretrained(options.model)
    model = XVLMForGrounding.from_pretrained(options.model, image_size=options.image_size)
    if options.image_size:
        processor.image_processor.size = {"height": options.image_size, "width": options.image_size}
else:
    processor = tiny_processor(shapes.words, shapes.image_size)
    model = XVLMForGrounding(tiny_config(processor))

# 4. Training; photos are cropped and mirrored together with their boxes
trainer = VLPTrainer(
    model,
    training,
    train_dataset=train,
    data_collator=GroundingCollator(processor=processor, augment=has_own_rows),
    processing_class=processor,
)
trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
if not trainer.is_world_process_zero():
    raise SystemExit

# 5. The score, beside that of the box of a random object
if test:
    score = evaluate_grounding(model, processor, test)
    print(f"grounding accuracy at IoU 0.5: {score.accuracy:.3f} of {len(test)} texts")
    if "candidates" in test.column_names:
        print(f"box of a random object:        {random_object_accuracy(test):.3f}")

# 6. Saving and sharing: model, processor, and the code that reads them
model.save_pretrained(training.output_dir)
processor.save_pretrained(training.output_dir)
print(f"saved to {training.output_dir}")
if options.push_to_hub:
    model.push_to_hub(options.push_to_hub)
    processor.push_to_hub(options.push_to_hub)

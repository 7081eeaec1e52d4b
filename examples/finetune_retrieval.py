"""Fine-tune X-VLM for retrieval, in two stages: a shortlist by similarity, re-ranked by matching.

    python examples/finetune_retrieval.py
    python examples/finetune_retrieval.py --model runs/pretrain
    python examples/finetune_retrieval.py --model xvlm-base --image-size 384 --top-k 256 \\
        --train finetune/coco_train.json --test finetune/coco_test.json --image-root images
    python examples/finetune_retrieval.py --model xvlm-base --image-size 384 --train my_rows --test test_rows

It adds one idea to `finetune_grounding.py`: negatives. Each image of a batch is told from the texts of all
others, so that a batch must be large, and rows of one image carry one image_id, which keeps them from being
negatives of one another. On drawn scenes one minute teaches a new model similarity but not yet matching, so
that re-ranking helps only one that was pre-trained for longer. Rows to train on have the columns image,
caption and image_id, those to score on image and caption (a list). Karpathy's JSON files are read as they
are. Every option not listed here goes to `VLPTrainingArguments`.
"""

import argparse
from pathlib import Path

import datasets
from transformers import HfArgumentParser, set_seed

from hf_vlp import XVLMForRetrieval, XVLMProcessor
from hf_vlp.data.collators import RetrievalCollator
from hf_vlp.data.readers import read_retrieval
from hf_vlp.evaluation import evaluate_retrieval
from hf_vlp.quickstart import shapes_rows, tiny_config, tiny_processor
from hf_vlp.training import RECIPES, VLPTrainer, VLPTrainingArguments

SCHEDULE_ON_SHAPES = {
    "max_steps": 150,
    "per_device_train_batch_size": 64,
    "learning_rate": 1e-3,
    "warmup_steps": 50,
    "lr_scheduler_type": "cosine",
    "logging_steps": 50,
    "save_strategy": "no",
}


def read_rows(path: str, split: str) -> datasets.Dataset:
    """Rows of a folder that `Dataset.save_to_disk` wrote, of a parquet file, or of Karpathy's JSON."""
    if Path(path, "state.json").is_file():
        return datasets.load_from_disk(path)
    if path.endswith(".parquet"):
        return datasets.load_dataset("parquet", data_files=path, split="train")
    return read_retrieval(path, options.image_root or ".", split)


# 1. What to do
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
)
parser.add_argument("--model", help="folder or Hub name to start from; without it a tiny new model")
parser.add_argument("--image-size", type=int, help="pixels a side, if others than the model's")
parser.add_argument("--train", help="rows to train on: Karpathy's JSON, a saved Dataset, or a parquet file")
parser.add_argument("--test", help="rows to score on, likewise")
parser.add_argument("--image-root", help="folder of the images that the JSON files name")
parser.add_argument("--top-k", type=int, default=32, help="length of the shortlist that is re-ranked")
parser.add_argument("--push-to-hub", metavar="ORG/NAME", help="repository on the Hub to push the result to")
options, rest = parser.parse_known_args()
has_own_rows = bool(options.train)
if has_own_rows and not options.model:
    parser.error("your own rows need --model: the tiny new model knows the words of the drawn scenes only")

training_parser = HfArgumentParser(VLPTrainingArguments)
training_parser.set_defaults(output_dir="runs/retrieval")
training_parser.set_defaults(**(RECIPES["xvlm_retrieval_coco"] if has_own_rows else SCHEDULE_ON_SHAPES))
(training,) = training_parser.parse_args_into_dataclasses(rest)
set_seed(training.seed)

# 2. The rows to train on and those to score on, whose images have to be decoded
if options.train:
    train, test = read_rows(options.train, "train"), options.test and read_rows(options.test, "test")
else:
    shapes = shapes_rows(training.seed)
    train, test = shapes.captions, shapes.test_retrieval
if has_own_rows and test:
    test = test.cast_column("image", datasets.Image(mode="RGB"))

# 3. The model and its processor
if options.model:
    processor = XVLMProcessor.from_pretrained(options.model)
    model = XVLMForRetrieval.from_pretrained(options.model, image_size=options.image_size)
    if options.image_size:
        processor.image_processor.size = {"height": options.image_size, "width": options.image_size}
else:
    processor = tiny_processor(shapes.words, shapes.image_size)
    model = XVLMForRetrieval(tiny_config(processor))

# 4. Training
trainer = VLPTrainer(
    model,
    training,
    train_dataset=train,
    data_collator=RetrievalCollator(processor=processor, augment=has_own_rows),
    processing_class=processor,
)
trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
if not trainer.is_world_process_zero():
    raise SystemExit

# 5. The scores of both stages, both ways, beside that of a random order
if test:
    result = evaluate_retrieval(model, processor, test, top_k=options.top_k)
    for stage, metrics in (("by similarity", result.itc_metrics), ("re-ranked", result.metrics)):
        texts, images = (metrics[f"{kind}_recall_at_10"] for kind in ("text", "image"))
        print(f"R@10 {stage}: {texts:.3f} of texts, {images:.3f} of images")
    print(f"R@10 of images in a random order: {10 / len(test):.3f}")

# 6. Saving and sharing: model, processor, and the code that reads them
model.save_pretrained(training.output_dir)
processor.save_pretrained(training.output_dir)
print(f"saved to {training.output_dir}")
if options.push_to_hub:
    model.push_to_hub(options.push_to_hub)
    processor.push_to_hub(options.push_to_hub)

"""Fine-tune X-VLM for captioning: an image goes in, a sentence about it comes out.

    python examples/caption_xvlm.py
    python examples/caption_xvlm.py --self-critical --model runs/captioning --output_dir runs/self_critical
    python examples/caption_xvlm.py --model xvlm-base --image-size 384 --train dataset_coco.json \\
        --test dataset_coco.json --image-root coco
    python examples/caption_xvlm.py --model runs/captioning --image-size 384 --self-critical --train my_rows

The first line trains a tiny new model on drawn scenes for a minute or two, until it says of unseen scenes
which objects are where. The second goes on with self-critical training: captions that the model draws are
learnt by how much their CIDEr-D exceeds that of the caption it would write. Those it draws get better (from
3.2 to 5.0 in a hundred steps); the one it writes has nothing to gain on drawn scenes, and loses a little
(all objects right in 0.99 of the scenes before, 0.94 after). The others train on your data
with the paper's schedules; rows have the columns image and caption (a string or a list), Karpathy's
dataset_*.json are read as they are, their splits train and restval to train on, test to score on. For the
domain pretraining before COCO, pass --prompt "" --label-smoothing 0. Every option not listed here goes to
`VLPTrainingArguments`.
"""

import argparse
from functools import partial
from pathlib import Path

import datasets
from transformers import HfArgumentParser, set_seed

from hf_vlp import XVLMForCaptioning, XVLMProcessor
from hf_vlp.data.caption_collators import CaptioningCollator, SelfCriticalCollator
from hf_vlp.data.readers import read_karpathy
from hf_vlp.data.shapes import shapes_dataset, vocabulary
from hf_vlp.data.transforms import as_texts
from hf_vlp.evaluation import cider_d_reward, evaluate_captioning, majority_caption_metrics
from hf_vlp.quickstart import tiny_config, tiny_processor
from hf_vlp.training import RECIPES, SelfCriticalTrainer, VLPTrainer, VLPTrainingArguments

LENGTH_ON_SHAPES = 32  # tokens of their longest captions, with the prompt
SCHEDULE_ON_SHAPES = {
    "max_steps": 400,
    "per_device_train_batch_size": 64,
    "learning_rate": 2e-3,
    "warmup_steps": 50,
    "lr_scheduler_type": "cosine",
    "logging_steps": 50,
    "save_strategy": "no",
}
SELF_CRITICAL_ON_SHAPES = SCHEDULE_ON_SHAPES | {
    "max_steps": 100,
    "per_device_train_batch_size": 16,
    "learning_rate": 1e-4,
    "warmup_steps": 10,
    "logging_steps": 20,
}


def read_rows(path: str, split: str | tuple[str, ...]) -> datasets.Dataset:
    """Rows of a folder that `Dataset.save_to_disk` wrote, of a parquet file, or of Karpathy's JSON."""
    if Path(path, "state.json").is_file():
        return datasets.load_from_disk(path)
    if path.endswith(".parquet"):
        return datasets.load_dataset("parquet", data_files=path, split="train")
    return read_karpathy(path, options.image_root, split)


# 1. What to do
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
)
parser.add_argument("--model", help="folder or Hub name to start from; without it a tiny new model")
parser.add_argument("--image-size", type=int, help="pixels a side, if others than the model's")
parser.add_argument("--train", help="rows to train on: Karpathy's JSON, a saved Dataset, or a parquet file")
parser.add_argument("--test", help="rows to score on, likewise")
parser.add_argument("--image-root", default=".", help="folder of the images that Karpathy's JSON names")
parser.add_argument("--prompt", help="what captions begin with, in place of the model's own")
parser.add_argument("--label-smoothing", type=float, help="in place of the model's own")
parser.add_argument("--self-critical", action="store_true", help="learn from the CIDEr-D of drawn captions")
parser.add_argument("--push-to-hub", metavar="ORG/NAME", help="repository on the Hub to push the result to")
options, rest = parser.parse_known_args()
has_own_rows = bool(options.train)
if has_own_rows and not options.model:
    parser.error("your own rows need --model: the tiny new model knows the words of the drawn scenes only")

training_parser = HfArgumentParser(VLPTrainingArguments)
training_parser.set_defaults(output_dir="runs/captioning")
if has_own_rows:
    schedule = RECIPES["xvlm_caption_scst" if options.self_critical else "xvlm_caption"]
else:
    schedule = SELF_CRITICAL_ON_SHAPES if options.self_critical else SCHEDULE_ON_SHAPES
training_parser.set_defaults(**schedule)
(training,) = training_parser.parse_args_into_dataclasses(rest)
set_seed(training.seed)

# 2. The rows to train on and those to score on
if has_own_rows:
    train = read_rows(options.train, ("train", "restval"))
    test = options.test and read_rows(options.test, "test")
else:
    train = shapes_dataset("captions", "train", 20_000, seed=training.seed)
    test = shapes_dataset("captions", "test", 256, seed=training.seed)

# 3. The model and its processor
if options.model:
    processor = XVLMProcessor.from_pretrained(options.model, image_size=options.image_size)
    model = XVLMForCaptioning.from_pretrained(options.model, image_size=options.image_size)
else:
    processor = tiny_processor([*vocabulary(), "picture"], image_size=48)
    model = XVLMForCaptioning(tiny_config(processor))
ends = processor.tokenizer.cls_token_id, processor.tokenizer.sep_token_id  # of captions
model.config.text_config.bos_token_id, model.config.text_config.eos_token_id = ends
if options.prompt is not None:
    processor.prompt = options.prompt
if options.label_smoothing is not None:
    model.config.label_smoothing = options.label_smoothing

# 4. Training; photos are cropped and mirrored
max_length = 20 if has_own_rows else LENGTH_ON_SHAPES
make_collator, make_trainer = CaptioningCollator, VLPTrainer
if options.self_critical:
    captions = [[processor.clean_text(text) for text in as_texts(texts)] for texts in train["caption"]]
    reward = cider_d_reward(captions)
    make_collator = SelfCriticalCollator
    make_trainer = partial(SelfCriticalTrainer, reward=reward, max_length=max_length)
trainer = make_trainer(
    model,
    training,
    train_dataset=train,
    data_collator=make_collator(processor=processor, augment=has_own_rows),
    processing_class=processor,
)
trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
if not trainer.is_world_process_zero():
    raise SystemExit

# 5. The scores, beside those of who writes the most frequent caption under all images
if test:
    result = evaluate_captioning(model, processor, test, max_length=max_length)
    frequent = majority_caption_metrics(test.remove_columns("image"))
    print(f"CIDEr-D:                  {result.metrics['cider_d']:.3f} of {len(test)} images")
    print(f"the most frequent caption: {frequent['cider_d']:.3f}")
    if not has_own_rows:
        pairs = zip(result.captions, test["caption"], strict=True)
        right = [set(ours.split(" and ")) == set(theirs.split(" and ")) for ours, theirs in pairs]
        print(f"all objects right:        {sum(right) / len(right):.3f} of the scenes")
    print(f"for example:              {result.captions[0]}")

# 6. Saving and sharing: model, processor, and the code that reads them
model.save_pretrained(training.output_dir)
processor.save_pretrained(training.output_dir)
print(f"saved to {training.output_dir}")
if options.push_to_hub:
    model.push_to_hub(options.push_to_hub)
    processor.push_to_hub(options.push_to_hub)

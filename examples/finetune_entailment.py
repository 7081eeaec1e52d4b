"""Fine-tune ALBEF or X-VLM for visual entailment (SNLI-VE): does an image entail or contradict a sentence?

    python examples/finetune_entailment.py
    python examples/finetune_entailment.py --model albef-base --image-size 384 \\
        --train ve_train.json --test ve_test.json --image-root flickr30k-images
    python examples/finetune_entailment.py --model albef-base --image-size 384 \\
        --train my_rows --test test_rows

It is `finetune_question_answering.py` with a list of classes in place of a list of answers. The first line
trains a tiny new model on drawn scenes for a minute or two, which shows every step; with --model
runs/pretrain_albef it starts from what `pretrain_albef.py` saved, and learns the task. Rows have the columns
image, sentence and label: 0 contradiction, 1 neutral, 2 entailment. Every option not listed here
goes to `VLPTrainingArguments`.
"""

import argparse
from functools import partial

from small_albef import TRAINING_SCENES, load_start, read_rows, schedule_for
from transformers import HfArgumentParser, set_seed

from hf_vlp import ALBEFForVisualEntailment
from hf_vlp.data.shapes import shapes_dataset
from hf_vlp.data.task_collators import EntailmentCollator
from hf_vlp.data.task_readers import read_snli_ve
from hf_vlp.evaluation import evaluate_entailment, majority_label_accuracy
from hf_vlp.training import VLPTrainer, VLPTrainingArguments

# 1. What to do
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
)
parser.add_argument("--model", help="folder or Hub name to start from; without it a tiny new model")
parser.add_argument("--image-size", type=int, help="pixels a side, if others than the model's")
parser.add_argument("--train", nargs="+", help="ALBEF's JSON lists, saved Datasets, or parquet files")
parser.add_argument("--test", nargs="+", help="rows to score on, likewise")
parser.add_argument("--image-root", default=".", help="folder of the images that the JSON lists name")
parser.add_argument("--push-to-hub", metavar="ORG/NAME", help="repository on the Hub to push the result to")
options, rest = parser.parse_known_args()
has_own_rows = bool(options.train)
if has_own_rows and not options.model:
    parser.error("your own rows need --model: the tiny new model knows the words of the drawn scenes only")

training_parser = HfArgumentParser(VLPTrainingArguments)
training_parser.set_defaults(output_dir="runs/entailment")
schedule = schedule_for(options.model, has_own_rows, albef="albef_entailment", xvlm="xvlm_entailment")
training_parser.set_defaults(**schedule)
(training,) = training_parser.parse_args_into_dataclasses(rest)
set_seed(training.seed)

# 2. The rows to train on and those to score on
if has_own_rows:
    read_lists = partial(read_snli_ve, image_root=options.image_root)
    train = read_rows(options.train, read_lists)
    test = options.test and read_rows(options.test, read_lists)
else:
    train = shapes_dataset("entailment", "train", TRAINING_SCENES, seed=training.seed)
    test = shapes_dataset("entailment", "test", 256, seed=training.seed)

# 3. The model, ALBEF with its teacher, and its processor
model, processor = load_start("entailment", ALBEFForVisualEntailment, options.model, options.image_size)

# 4. Training; photos are cropped and mirrored
trainer = VLPTrainer(
    model,
    training,
    train_dataset=train,
    data_collator=EntailmentCollator(processor=processor, augment=has_own_rows),
    processing_class=processor,
)
trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
if not trainer.is_world_process_zero():
    raise SystemExit

# 5. The score, beside that of always the same label
if test:
    result = evaluate_entailment(model, processor, test)
    baseline = majority_label_accuracy(test.remove_columns("image"))
    print(f"accuracy:              {result.accuracy:.3f} of {len(test)} sentences")
    print(f"always the same label: {baseline:.3f}")

# 6. Saving and sharing: model without a teacher, processor, and the code that reads them
model.save_pretrained(training.output_dir)
processor.save_pretrained(training.output_dir)
print(f"saved to {training.output_dir}")
if options.push_to_hub:
    model.push_to_hub(options.push_to_hub)
    processor.push_to_hub(options.push_to_hub)

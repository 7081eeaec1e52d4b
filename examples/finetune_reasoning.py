"""Fine-tune ALBEF or X-VLM for reasoning over two images (NLVR2): is a sentence true of the pair?

    python examples/finetune_reasoning.py
    python examples/finetune_reasoning.py --model albef-ta --image-size 384 \\
        --train nlvr_train.json --test nlvr_test.json --image-root nlvr2
    python examples/finetune_reasoning.py --model albef-base --image-size 384 \\
        --train my_rows --test test_rows

It adds one idea to `finetune_question_answering.py`: a row has two images, and each layer that looks at the
first is followed by one for the second. From a pre-trained model both start as copies; the paper trains them
on text assignment first, and `albef-ta` is what `hf-vlp convert albef` makes of the file after that step, as
`hf-vlp convert xvlm` of X-VLM's. The first line trains a tiny new ALBEF on drawn scenes for a few minutes,
which shows every step; with --model runs/pretrain_albef --max_steps 1500 it starts from what
`pretrain_albef.py` saved, and learns the task, as X-VLM does from what `pretrain.py` saved. Rows have the
columns images (two), sentence and label (whether it is true), those to score on also identifier, if rows of
one sentence are to be judged together. Every option not listed here goes to `VLPTrainingArguments`.
"""

import argparse
from functools import partial

from small_albef import TRAINING_SCENES, load_start, read_rows, schedule_for
from transformers import HfArgumentParser, set_seed

from hf_vlp import ALBEFForVisualReasoning
from hf_vlp.data.shapes import shapes_dataset
from hf_vlp.data.task_collators import PairCollator
from hf_vlp.data.task_readers import read_nlvr2
from hf_vlp.evaluation import evaluate_reasoning, majority_label_accuracy
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
training_parser.set_defaults(output_dir="runs/reasoning")
schedule = schedule_for(options.model, has_own_rows, albef="albef_reasoning", xvlm="xvlm_nlvr")
training_parser.set_defaults(**schedule)
(training,) = training_parser.parse_args_into_dataclasses(rest)
set_seed(training.seed)

# 2. The rows to train on and those to score on
if has_own_rows:
    read_lists = partial(read_nlvr2, image_root=options.image_root)
    train = read_rows(options.train, read_lists)
    test = options.test and read_rows(options.test, read_lists)
else:
    train = shapes_dataset("pairs", "train", TRAINING_SCENES, seed=training.seed)
    test = shapes_dataset("pairs", "test", 256, seed=training.seed)

# 3. The model, ALBEF with its teacher, and its processor
model, processor = load_start("reasoning", ALBEFForVisualReasoning, options.model, options.image_size)

# 4. Training; photos are cropped and mirrored, each of a pair by itself
trainer = VLPTrainer(
    model,
    training,
    train_dataset=train,
    data_collator=PairCollator(processor=processor, augment=has_own_rows),
    processing_class=processor,
)
trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
if not trainer.is_world_process_zero():
    raise SystemExit

# 5. The score, beside that of always the same label
if test:
    result = evaluate_reasoning(model, processor, test)
    baseline = majority_label_accuracy(test.remove_columns("images"))
    print(f"accuracy:                {result.accuracy:.3f} of {len(test)} pairs")
    print(f"always the same label:   {baseline:.3f}")
    print(f"sentences wholly right:  {result.consistency:.3f}")

# 6. Saving and sharing: model without a teacher, processor, and the code that reads them
model.save_pretrained(training.output_dir)
processor.save_pretrained(training.output_dir)
print(f"saved to {training.output_dir}")
if options.push_to_hub:
    model.push_to_hub(options.push_to_hub)
    processor.push_to_hub(options.push_to_hub)

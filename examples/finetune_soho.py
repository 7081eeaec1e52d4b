"""Fine-tune SOHO for question answering: an image and a question go in, the best of a list of answers comes
out.

    python examples/finetune_soho.py
    python examples/finetune_soho.py --model runs/pretrain_soho
    python examples/finetune_soho.py --model soho --train coco_vqa_train.json --test coco_vqa_val.json \\
        --image-root coco

The first line trains a tiny new model on drawn scenes; the second starts from what `pretrain_soho.py` saved.
The last trains on SOHO's lists of VQA v2, by the schedule of the official code. The model chooses among the
answers of its list. Every option not listed here goes to `VLPTrainingArguments`.
"""

import argparse

from small_soho import ANSWERS, IMAGE_SIZE, tiny_soho
from transformers import HfArgumentParser, set_seed

from hf_vlp import SOHOForQuestionAnswering, SOHOProcessor
from hf_vlp.data.shapes import shapes_dataset
from hf_vlp.data.soho_collators import SOHOQuestionCollator
from hf_vlp.data.soho_readers import read_soho_answers, read_soho_vqa
from hf_vlp.evaluation import evaluate_question_answering, majority_answer_accuracy
from hf_vlp.training import RECIPES, VLPTrainer, VLPTrainingArguments

TRAINING_SCENES = 50_000
SCHEDULE_ON_SHAPES = {
    "max_steps": 800,
    "per_device_train_batch_size": 64,
    "learning_rate": 1e-3,
    "warmup_steps": 50,
    "lr_scheduler_type": "cosine",
    "logging_steps": 50,
    "save_strategy": "no",
}

# 1. What to do
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
)
parser.add_argument("--model", help="folder or Hub name to start from; without it a tiny new model")
parser.add_argument("--train", nargs="+", help="SOHO's JSON lists of questions")
parser.add_argument("--test", nargs="+", help="lists to score on, likewise")
parser.add_argument("--image-root", default=".", help="folder of the images that the lists name")
parser.add_argument("--push-to-hub", metavar="ORG/NAME", help="repository on the Hub to push the result to")
options, rest = parser.parse_known_args()
has_own_rows = bool(options.train)
if has_own_rows and not options.model:
    parser.error("your own rows need --model: the tiny new model knows the words of the drawn scenes only")

training_parser = HfArgumentParser(VLPTrainingArguments)
training_parser.set_defaults(output_dir="runs/soho_answers")
training_parser.set_defaults(**(RECIPES["soho_vqa"] if has_own_rows else SCHEDULE_ON_SHAPES))
(training,) = training_parser.parse_args_into_dataclasses(rest)
set_seed(training.seed)

# 2. The rows, and the answers to choose among
if has_own_rows:
    train = read_soho_vqa(options.train, options.image_root)
    test = options.test and read_soho_vqa(options.test, options.image_root)
    answers = read_soho_answers(options.train[0])
else:
    train, test = (
        shapes_dataset("questions", split, count, image_size=IMAGE_SIZE, seed=training.seed)
        for split, count in (("train", TRAINING_SCENES), ("test", 256))
    )
    answers = ANSWERS

# 3. The model, and its processor
if options.model:
    processor = SOHOProcessor.from_pretrained(options.model)
    model = SOHOForQuestionAnswering.from_pretrained(options.model, answers=answers, num_answers=len(answers))
else:
    model, processor = tiny_soho(SOHOForQuestionAnswering)

# 4. Training
trainer = VLPTrainer(
    model,
    training,
    train_dataset=train,
    data_collator=SOHOQuestionCollator(processor=processor, answers=answers),
    processing_class=processor,
)
trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
if not trainer.is_world_process_zero():
    raise SystemExit

# 5. Saving and sharing: model, processor, and the code that reads them
model.save_pretrained(training.output_dir)
processor.save_pretrained(training.output_dir)
print(f"saved to {training.output_dir}")
if options.push_to_hub:
    model.push_to_hub(options.push_to_hub)
    processor.push_to_hub(options.push_to_hub)

# 6. The score, beside that of who answers without looking
if test:
    result = evaluate_question_answering(model, processor, test)
    texts = (rows.remove_columns("image") for rows in (train, test))
    print(f"accuracy:                              {result.accuracy:.3f} of {len(test)} questions")
    print(f"most frequent answer of the same type: {majority_answer_accuracy(*texts):.3f}")

"""Pre-train LXMERT on images and sentences: masked words and regions, matching, and answers.

    python examples/pretrain_lxmert.py
    python examples/finetune_lxmert.py --model runs/pretrain_lxmert
    python examples/pretrain_lxmert.py --text bert-base-uncased --answers all_ans.json \\
        --train mscoco_train.json mscoco_nominival.json vgnococo.json --features coco_regions vg_regions
    python examples/pretrain_lxmert.py --model lxmert-base --train my_sentences.json --features my_regions

The first line trains a tiny new model on drawn scenes, in some two minutes; the second fine-tunes what it
learned. The third trains a model of the paper's size on the official lists of {"img_id", "sentf", "labelf"},
by the schedule of the official code; the last goes on with a model. Regions come from stores that
`hf_vlp.data.features.convert_features` or `hf-vlp extract` wrote. The answers are those of --answers, or of
the model. Every option not listed here goes to `VLPTrainingArguments`.
"""

import argparse

from small_lxmert import ANSWERS, DrawnObjects, tiny_lxmert
from torch.utils.data import ConcatDataset
from transformers import AutoTokenizer, HfArgumentParser, set_seed

from hf_vlp import LXMERTForPreTraining, LXMERTForRetrieval, LXMERTProcessor
from hf_vlp.data.features import RegionStore, with_regions
from hf_vlp.data.lxmert_collators import LXMERTPretrainingCollator
from hf_vlp.data.lxmert_readers import read_answer_table, read_lxmert_pretraining
from hf_vlp.data.masking import TokenMasking
from hf_vlp.data.shapes import shapes_dataset
from hf_vlp.evaluation import evaluate_foils, evaluate_retrieval
from hf_vlp.training import RECIPES, VLPTrainer, VLPTrainingArguments

PRETRAINING_ON_SHAPES = {
    "max_steps": 1600,
    "per_device_train_batch_size": 64,
    "learning_rate": 2e-3,
    "warmup_steps": 100,
    "lr_scheduler_type": "cosine",
    "logging_steps": 100,
    "save_strategy": "no",
}
SCENES = PRETRAINING_ON_SHAPES["max_steps"] * PRETRAINING_ON_SHAPES["per_device_train_batch_size"] // 2
# Drawn scenes have few words and regions: the more is masked, the more there is to look for; and texts of
# other images teach nothing but matching
DRAWN = {"region_mask_probability": 0.3, "mismatch_probability": 0.25}
MASKED_WORDS = 0.4

# 1. What to do
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
)
parser.add_argument("--model", help="folder or Hub name to start from; without it a tiny new model")
parser.add_argument("--text", help="BERT to start from, with a model of the paper's size")
parser.add_argument("--train", nargs="+", help="official JSON lists")
parser.add_argument("--features", nargs="+", help="stores of the regions, one for each list")
parser.add_argument("--answers", help="the answer table, all_ans.json")
parser.add_argument("--push-to-hub", metavar="ORG/NAME", help="repository on the Hub to push the result to")
options, rest = parser.parse_known_args()
has_own_rows = bool(options.train)
if has_own_rows and not (options.model or options.text):
    parser.error("your own rows need --model or --text: the tiny new model knows few words")
if has_own_rows and len(options.features or []) not in (1, len(options.train)):
    parser.error("your own rows need --features: one store for all lists, or one for each")
if options.text and not options.answers:
    parser.error("--text makes a new model, which needs --answers")

training_parser = HfArgumentParser(VLPTrainingArguments)
training_parser.set_defaults(output_dir="runs/pretrain_lxmert")
training_parser.set_defaults(**(RECIPES["lxmert_pretrain"] if has_own_rows else PRETRAINING_ON_SHAPES))
(training,) = training_parser.parse_args_into_dataclasses(rest)
set_seed(training.seed)

# 2. The model, and its processor
answers = options.answers and read_answer_table(options.answers)
if options.model:
    extractor = None if has_own_rows else DrawnObjects()
    processor = LXMERTProcessor.from_pretrained(options.model, extractor=extractor)
    model = LXMERTForPreTraining.from_pretrained(options.model)
elif options.text:
    processor = LXMERTProcessor(AutoTokenizer.from_pretrained(options.text))
    model = LXMERTForPreTraining.from_bert(options.text, answers=answers, num_qa_labels=len(answers))
else:
    model, processor = tiny_lxmert(LXMERTForPreTraining)
answers = model.config.answers or answers

# 3. The rows: sentences with regions, and for questions their answers
if has_own_rows:
    stores = [RegionStore(folder) for folder in options.features]
    stores *= 1 if len(stores) > 1 else len(options.train)
    lists = zip(options.train, stores, strict=True)
    train = ConcatDataset(
        [with_regions(read_lxmert_pretraining([file], answers), store) for file, store in lists]
    )
else:
    captions = shapes_dataset("captions", "train", SCENES, seed=training.seed, regions=True)
    questions = shapes_dataset("questions", "train", SCENES, seed=training.seed, regions=True)
    questions = questions.rename_columns({"question": "caption", "question_id": "image_id"})
    train = ConcatDataset([captions.remove_columns("image"), questions.remove_columns("image")])

# 4. Training
drawn = {} if has_own_rows else DRAWN | {"masking": TokenMasking(processor.tokenizer, MASKED_WORDS)}
trainer = VLPTrainer(
    model,
    training,
    train_dataset=train,
    data_collator=LXMERTPretrainingCollator(processor=processor, answers=answers or ANSWERS, **drawn),
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

# 6. The scores of the matching head, before any fine-tuning; foils are found in the images themselves
if not has_own_rows:
    matching = LXMERTForRetrieval.from_pretrained(training.output_dir)
    images = shapes_dataset("retrieval", "test", 128, seed=training.seed, regions=True)
    metrics = evaluate_retrieval(matching, processor, images).metrics
    texts, found = (metrics[f"{kind}_recall_at_10"] for kind in ("text", "image"))
    print(f"R@10 of {len(images)}: {texts:.3f} of texts, {found:.3f} of images")
    print(f"R@10 in a random order: {10 / len(images):.3f}")
    foils = evaluate_foils(matching, processor, shapes_dataset("foils", "test", 512, seed=training.seed))
    print(f"captions above foils that differ in one word: {foils.accuracy:.3f}")
    print("a coin: 0.500")

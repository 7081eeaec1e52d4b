"""The main job in small: pre-train, fine-tune, score beside baselines, reload, report. Minutes on a CPU.

Everything that decides how well the tiny model learns stands in the constants below. On the embedded scenes
of shapes it learns from endless new ones; on NLVR v1 from the images and sentences of its `dev` split.
"""

import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import datasets
import torch
from datasets import Dataset
from PIL import Image
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torchvision.ops import box_convert
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProgressCallback, SwinConfig, set_seed

from . import (
    VLPTextConfig,
    XVLMConfig,
    XVLMForGrounding,
    XVLMForPreTraining,
    XVLMImageProcessor,
    XVLMProcessor,
)
from .data.collators import GroundingCollator, ImageTextCollator, RegionCollator
from .data.mixing import MixedCollator, MixedDataset
from .data.nlvr import read_nlvr
from .data.shapes import shapes_dataset, vocabulary
from .evaluation import evaluate_foils, evaluate_grounding, evaluate_retrieval, random_object_accuracy
from .training import VLPTrainer, VLPTrainingArguments
from .visualization import Figure, Score, draw_boxes, draw_loss_curves, write_report
from .visualization.boxes import PREDICTED, TRUE

# The tiny model: 36 patches of 8 pixels at 48, from a Swin with two stages
SWIN = {"patch_size": 4, "embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4], "window_size": 6}
SWIN |= {"use_absolute_embeddings": True, "drop_path_rate": 0.0}
TEXT = {"hidden_size": 64, "num_text_layers": 2, "num_fusion_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_decoder_layers": 2, "intermediate_size": 256, "max_position_embeddings": 64}
TEXT |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Weights of 0.02, right for a width of 768, are too quiet for one of 64
SWIN |= {"initializer_range": 0.1}
TEXT |= {"initializer_range": 0.1}
CONFIG = {"projection_dim": 64, "bbox_weight": 2.0, "giou_weight": 2.0}
STRIDE = SWIN["patch_size"] * 2 ** (len(SWIN["depths"]) - 1)  # pixels that one image token stands for

# The schedule
BATCH_SIZE = 64
LOGGING_STEPS = 20
MAX_PAIRS = 128  # region-text pairs of a region batch
# As many region steps as image steps: pointing comes suddenly, after some 500 of them
PRETRAINING = {"max_steps": 1600, "learning_rate": 2e-3, "warmup_steps": 100, "region_probability": 1.0}
GROUNDING = {"max_steps": 400, "learning_rate": 1e-3, "warmup_steps": 50}

NLVR_IMAGE_SIZE = 96  # its pictures have 400 x 100 pixels, its smallest objects 10 x 10
TEST_IMAGES = 256  # of retrieval
TEST_TEXTS = 512  # of foils and of grounding
TOP_K = 32  # candidates that are re-ranked
DRAWN_SCENES = 8

RELOAD = """
import sys
from PIL import Image
from transformers import AutoModel, AutoProcessor
from hf_vlp.quickstart import probe
image, text, *folders = sys.argv[1:]
loaded = [(AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)) for folder in folders]
print([probe(model, processor, Image.open(image), text) for model, processor in loaded])
"""

console = Console()


@dataclass(frozen=True)
class Rows:
    """What to train on and what to score on; `test_foils` is None where the data has none."""

    name: str
    image_size: int
    words: list[str]
    captions: Dataset
    regions: Dataset
    grounding: Dataset
    test_retrieval: Dataset
    test_grounding: Dataset
    test_foils: Dataset | None


def shapes_rows(seed: int) -> Rows:
    """New scenes at every step, and scenes of another split to score on."""
    return Rows(
        name="generated scenes of coloured shapes, level 0",
        image_size=48,
        words=vocabulary(),
        captions=shapes_dataset("captions", "train", 500_000, seed=seed),
        # phrases alone: short texts make quick steps, and the captions come with the images
        regions=shapes_dataset("regions", "train", 500_000, seed=seed).remove_columns("caption"),
        grounding=shapes_dataset("grounding", "train", 500_000, seed=seed),
        test_retrieval=shapes_dataset("retrieval", "test", TEST_IMAGES, seed=seed),
        test_grounding=shapes_dataset("grounding", "test", TEST_TEXTS, seed=seed),
        test_foils=shapes_dataset("foils", "test", TEST_TEXTS, seed=seed),
    )


def nlvr_rows(path: Path) -> Rows:
    """NLVR v1: `dev` to train on (the official training split is not needed), `test` to score on."""
    train = {task: read_nlvr(path, "dev", task) for task in ("captions", "regions", "grounding")}
    test = {task: read_nlvr(path, "test", task, orders=[0]) for task in ("captions", "grounding")}
    decoded = {task: rows.cast_column("image", datasets.Image(mode="RGB")) for task, rows in test.items()}
    captions = decoded["captions"].take(TEST_IMAGES)
    texts = {*train["captions"]["caption"], *train["grounding"]["text"]}
    texts |= {phrase for phrases in train["regions"]["phrases"] for region in phrases for phrase in region}
    clean_text = tiny_processor([], image_size=NLVR_IMAGE_SIZE).clean_text
    return Rows(
        name="NLVR v1",
        image_size=NLVR_IMAGE_SIZE,
        words=sorted({word for text in texts for word in clean_text(text).split()}),
        **train,
        test_retrieval=captions.map(lambda row: {"caption": [row["caption"]]}),
        test_grounding=decoded["grounding"].shuffle(seed=0).take(TEST_TEXTS),
        test_foils=None,
    )


def word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word, [UNK] for all others."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {token: i for i, token in enumerate([*special, *words])}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    names = {f"{token[1:-1].lower()}_token": token for token in special}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def tiny_processor(words: Iterable[str], image_size: int) -> XVLMProcessor:
    """A processor for the tiny model: square images of `image_size` pixels, a token for each of `words`."""
    size = {"height": image_size, "width": image_size}
    return XVLMProcessor(XVLMImageProcessor(size=size), word_tokenizer(words), patch_size=STRIDE)


def tiny_config(processor: XVLMProcessor) -> XVLMConfig:
    """X-VLM of about a third of a million parameters."""
    vision = SwinConfig(image_size=processor.image_processor.size["height"], **SWIN)
    tokenizer = processor.tokenizer
    ends = {
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
    }
    text = VLPTextConfig(vocab_size=len(tokenizer), **ends, **TEXT)
    return XVLMConfig(vision_config=vision, text_config=text, **CONFIG)


def run(
    out: str | Path, seed: int = 0, data: str = "shapes", path: str | Path | None = None
) -> dict[str, float]:
    """Run all phases and return the scores by name; models, scores and report are written to `out`.

    data: "shapes", or "nlvr" with `path` the folder that holds its splits `dev` and `test`.
    Raises ValueError when `data` and `path` do not fit together, files are missing, or matplotlib is.
    """
    if (data == "nlvr") != (path is not None):
        raise ValueError(
            f"data={data!r}, path={path}: 'nlvr' needs the folder of its splits as path, 'shapes' takes none"
        )
    if find_spec("matplotlib") is None:
        raise ValueError("the report's loss curves need matplotlib: pip install 'hf-vlp[viz]'")
    out = Path(out)
    rows = nlvr_rows(Path(path)) if data == "nlvr" else shapes_rows(seed)
    report = out / "report"
    report.mkdir(parents=True, exist_ok=True)
    set_seed(seed)

    _heading(1, f"Pre-train a tiny X-VLM from scratch on images and regions: {rows.name}")
    processor = tiny_processor(rows.words, rows.image_size)
    pretrained = XVLMForPreTraining(tiny_config(processor))
    pretraining_log = _pretrain(pretrained, processor, rows, out / "pretrained", seed)

    _heading(2, "Fine-tune it for grounding: a text in, a box out")
    grounding = XVLMForGrounding.from_pretrained(out / "pretrained")
    grounding_log = _fine_tune(grounding, processor, rows, out / "grounding", seed)

    _heading(3, "Score it on images it has not seen")
    scores, boxes = _evaluate(pretrained, grounding, processor, rows)
    for score in scores:
        console.print(
            f"{score.name:32} {score.value:.3f}   baseline {score.baseline:.3f} ({score.baseline_name})"
        )
    (out / "scores.json").write_text(json.dumps({score.name: score.value for score in scores}, indent=2))

    _heading(4, "Load it again in a fresh process")
    example = rows.test_grounding[0]
    example["image"].save(out / "scene.png")
    saved = {out / "pretrained": pretrained, out / "grounding": grounding}
    difference = _check_reloading(saved, processor, out / "scene.png", example["text"])
    console.print(f"AutoModel and AutoProcessor give the same outputs, to {difference:.0e}")

    _heading(5, "Write the report")
    settings = {
        "data": rows.name,
        "seed": seed,
        "parameters": f"{pretrained.num_parameters():,}",
        "pre-training": f"{PRETRAINING['max_steps']} steps of {BATCH_SIZE}",
        "fine-tuning": f"{GROUNDING['max_steps']} steps of {BATCH_SIZE}",
        "torch": torch.__version__,
    }
    logs = {"pretraining": pretraining_log, "grounding": grounding_log}
    page = _write_report(report, rows, scores, boxes, logs, settings)
    console.print(f"Open {page.resolve()}")
    return {score.name: score.value for score in scores}


def _heading(number: int, text: str):
    console.rule(f"[bold]{number} of 5. {text}", align="left")


# Training


class LossBar(ProgressCallback):
    """A progress bar that shows the loss, without a line for every log entry."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.2f}")


def _pretrain(model, processor, rows: Rows, folder: Path, seed: int) -> list[dict]:
    """Train on image and region batches, save, and return the log."""
    collator = MixedCollator(
        ImageTextCollator(processor=processor, augment=False),
        RegionCollator(processor=processor, augment=False, max_pairs=MAX_PAIRS, group_equal_texts=True),
    )
    return _train(
        model, processor, MixedDataset(rows.captions, rows.regions), collator, folder, seed, PRETRAINING
    )


def _fine_tune(model, processor, rows: Rows, folder: Path, seed: int) -> list[dict]:
    collator = GroundingCollator(processor=processor, augment=False)
    return _train(model, processor, rows.grounding, collator, folder, seed, GROUNDING)


def _train(model, processor, dataset, collator, folder: Path, seed: int, schedule: dict) -> list[dict]:
    arguments = VLPTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH_SIZE,
        lr_scheduler_type="cosine",
        logging_steps=LOGGING_STEPS,
        save_strategy="no",
        seed=seed,
        **schedule,
    )
    trainer = VLPTrainer(
        model, arguments, train_dataset=dataset, data_collator=collator, processing_class=processor
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossBar())
    trainer.train()
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return trainer.state.log_history


# Scores


def _evaluate(pretrained, grounding, processor, rows: Rows) -> tuple[list[Score], torch.Tensor]:
    """Scores beside their baselines, and the predicted boxes as x1, y1, x2, y2 in pixels."""
    retrieval = evaluate_retrieval(pretrained, processor, rows.test_retrieval, top_k=TOP_K, progress=True)
    images = len(rows.test_retrieval)
    scores = []
    for stage, metrics in (("", retrieval.itc_metrics), ("re-ranked ", retrieval.metrics)):
        for k in (1, 10):
            recall = (metrics[f"text_recall_at_{k}"] + metrics[f"image_recall_at_{k}"]) / 2
            scores.append(Score(f"{stage}retrieval R@{k} of {images}", recall, k / images, "random order"))
    if rows.test_foils is not None:
        foils = evaluate_foils(pretrained, processor, rows.test_foils, progress=True)
        scores.append(Score("caption above one-word foil", foils.accuracy, 0.5, "a coin"))
    pointed = evaluate_grounding(grounding, processor, rows.test_grounding, progress=True)
    baseline = random_object_accuracy(rows.test_grounding)
    scores.append(Score("grounding at IoU 0.5", pointed.accuracy, baseline, "box of a random object"))
    return scores, pointed.boxes


# Reloading


def probe(model, processor, image: Image.Image, text: str) -> list[float]:
    """A few outputs to compare: the box of a grounding model, the matching logits of others."""
    batch = processor(images=[image], text=[text], return_tensors="pt")
    with torch.inference_mode():
        if isinstance(model, XVLMForGrounding):
            return model(**batch).pred_boxes[0].tolist()
        image_embeds = model.get_image_features(batch["pixel_values"]).last_hidden_state
        words = model.get_text_features(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        return model.match(words, batch["attention_mask"], model.project_image(image_embeds))[0].tolist()


def _check_reloading(models: dict[Path, PreTrainedModel], processor, image: Path, text: str) -> float:
    """Largest difference between outputs here and of what a fresh process loads from the folders."""
    command = [sys.executable, "-c", RELOAD, str(image), text, *map(str, models)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the saved folders cannot be loaded in a fresh process:\n{done.stderr}")
    reloaded = json.loads(done.stdout.splitlines()[-1])
    expected = [probe(model.cpu(), processor, Image.open(image), text) for model in models.values()]
    difference = (torch.tensor(sum(reloaded, [])) - torch.tensor(sum(expected, []))).abs().max().item()
    if not difference <= 1e-5:  # also where one of them is no number
        raise RuntimeError(f"a fresh process gives other outputs: they differ by {difference}")
    return difference


# Report


def _write_report(folder: Path, rows: Rows, scores: list[Score], boxes, logs: dict, settings: dict) -> Path:
    drawn = []
    for i in range(DRAWN_SCENES):
        row = rows.test_grounding[i]
        true_box = box_convert(torch.tensor(row["box"]), "xywh", "xyxy").tolist()
        image = draw_boxes(
            row["image"], [boxes[i].tolist(), true_box], ["predicted", "true"], [PREDICTED, TRUE]
        )
        image.save(folder / f"grounding_{i}.png")
        drawn.append(Figure(f"grounding_{i}.png", row["text"], wide=image.width > 2 * image.height))
    curves = []
    for name, log in logs.items():
        draw_loss_curves(log, folder / f"losses_{name}.png")
        curves.append(Figure(f"losses_{name}.png", f"Losses of {name} over its steps", wide=True))
    return write_report(
        folder,
        title="X-VLM, small, from scratch",
        summary=f"Pre-trained and fine-tuned on {rows.name}, scored on images that were not trained on.",
        scores=scores,
        sections={"Boxes on unseen images": drawn, "Loss curves": curves},
        settings=settings,
    )

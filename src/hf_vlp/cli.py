"""The command `hf-vlp`: the quickstart, prediction, training, evaluation, regions of images, and converters
of checkpoints.

Each command imports what it needs when it runs. What the package refuses (`ValueError`) and what the file
system refuses (`OSError`) ends as one line on stderr with exit code 1.
"""

import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer.core import TyperGroup

app = typer.Typer(
    name="hf-vlp",
    help="SOHO, LXMERT, ALBEF and X-VLM in the Hugging Face ecosystem: train, score and use them, convert "
    "checkpoints.",
    no_args_is_help=True,
    add_completion=False,
)


class Converters(TyperGroup):
    """The papers' commands; in place of one, the file says by its keys which it is."""

    def resolve_command(self, ctx, args):
        if args[0] not in self.commands:
            from .conversion.detect import find_converter

            args = [find_converter(args[0]), *args]
        return super().resolve_command(ctx, args)


convert = typer.Typer(
    cls=Converters,
    help="Turn an official checkpoint into a folder that `from_pretrained` reads.\n\n"
    "Paper and kind are read from the file. A paper's name in front insists on it, and lists its options "
    "with --help; --tokenizer, --answers and --push are the usual ones.",
    subcommand_metavar="[PAPER] FILE OUT [OPTIONS]",
    no_args_is_help=True,
)
app.add_typer(convert, name="convert")
index = typer.Typer(
    help="A gallery of images, encoded once and searched by text or by image.", no_args_is_help=True
)
app.add_typer(index, name="index")


class Data(str, Enum):
    """What the quickstart trains on."""

    shapes = "shapes"
    nlvr = "nlvr"


@app.command()
def quickstart(
    path: Annotated[
        Path | None,
        typer.Argument(help="With --data nlvr: the folder that holds dev/ and test/.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where models, scores and the report go.")] = Path("quickstart"),
    seed: Annotated[int, typer.Option(help="Fixes weights, scenes and batches.")] = 0,
    data: Annotated[Data, typer.Option(help="Generated scenes of shapes, or NLVR v1 images.")] = Data.shapes,
) -> None:
    """Pre-train a tiny X-VLM, fine-tune it for grounding, score it, reload it, and write a report."""
    from .quickstart import run

    run(out, seed=seed, data=data.value, path=path)


Out = Annotated[Path, typer.Argument(help="The folder to write.")]
ImageSize = Annotated[
    int | None, typer.Option(help="Resample the image trunk to this many pixels a side.", show_default=False)
]
Tokenizer = Annotated[
    str, typer.Option(help="Name or folder of the tokenizer the text encoder was trained with.")
]
Push = Annotated[
    str | None,
    typer.Option(help="Upload the folder to this model repository on the Hub.", show_default=False),
]


PredictTask = Literal["vqa", "retrieval", "grounding", "entailment", "reasoning", "captioning"]
TrainTask = Literal[
    "pretrain", "retrieval", "grounding", "vqa", "reasoning", "entailment", "assignment", "captioning"
]
EvaluateTask = Literal["retrieval", "grounding", "vqa", "reasoning", "entailment", "foils", "captioning"]
Model = Annotated[str, typer.Argument(help="Folder or Hub name of a model.")]
Rows = Annotated[
    str,
    typer.Argument(help="A folder of save_to_disk, a .json, .jsonl or .parquet file, or a Hub dataset."),
]
Split = Annotated[str, typer.Option(help="Which split, where the data has several.")]
Answers = Annotated[
    Path | None,
    typer.Option(
        help="For vqa: answers to rank, a JSON list or one in each line; LXMERT and SOHO know theirs.",
        show_default=False,
    ),
]
Features = Annotated[
    Path | None,
    typer.Option(
        help="For LXMERT: a folder of regions (hf-vlp extract) for rows without, by image_id or image_ids.",
        show_default=False,
    ),
]
Extractor = Annotated[
    str | None,
    typer.Option(
        help="For LXMERT: what finds regions in images, as in hf-vlp extract, in place of the model's own.",
        show_default=False,
    ),
]
BatchSize = Annotated[int, typer.Option(help="Rows at a time.")]


@app.command()
def predict(
    model: Model,
    images: Annotated[list[str], typer.Argument(help="Images; for reasoning left and right ones in turn.")],
    task: Annotated[PredictTask, typer.Option(help="What to do.", show_default=False)],
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="A question, caption, phrase or sentence; repeat it for more. For captioning a prompt.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="A .json file for the predictions, or a .png or .jpg for a picture of them."),
    ] = None,
    answers: Answers = None,
    proposals: Annotated[
        Path | None,
        typer.Option(
            help="For grounding with heat maps: a JSON list of boxes [x, y, w, h] for each image.",
            show_default=False,
        ),
    ] = None,
    extractor: Extractor = None,
    top_k: Annotated[int, typer.Option(help="For vqa: answers to print.")] = 5,
    batch_size: BatchSize = 32,
) -> None:
    """Predict for images and texts: JSON, and boxes or heat maps as a picture.

    Retrieval compares every image with every text. Otherwise there are as many images (for reasoning: pairs)
    as texts, or one of either for all of the other.
    """
    from .commands.predict import run

    printed = run(task, model, images, text or [], out, answers, proposals, extractor, top_k, batch_size)
    if printed is not None:
        typer.echo(printed)


@app.command()
def demo(
    models: Annotated[list[str], typer.Argument(help="Folders or Hub names of models.")],
    task: Annotated[
        list[str] | None,
        typer.Option(help="Only this task, as of predict; repeat it for more.", show_default=False),
    ] = None,
    extractor: Extractor = None,
    port: Annotated[
        int | None, typer.Option(help="Of the page; the first free one from 7860.", show_default=False)
    ] = None,
    push_space: Annotated[
        str | None,
        typer.Option(help="Upload the page as this Space, ORG/NAME, instead.", show_default=False),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push-space: a private one.")] = False,
) -> None:
    """Try models in the browser: a tab for every task that they have a head with weights for."""
    from .commands.demo import run

    where = run(models, task, extractor, port, push_space, private)
    if where is not None:
        typer.echo(where)


@app.command()
def train(
    task: Annotated[TrainTask, typer.Argument(help="What to learn.", show_default=False)],
    model: Model,
    data: Rows,
    out: Annotated[
        Path, typer.Option(help="Where checkpoints and the trained model go.", show_default=False)
    ],
    regions: Annotated[
        str | None,
        typer.Option(help="Rows of regions, mixed into X-VLM's pre-training.", show_default=False),
    ] = None,
    features: Features = None,
    extractor: Extractor = None,
    answers: Annotated[
        Path | None,
        typer.Option(
            help="For LXMERT's and SOHO's vqa: answers to choose from, a JSON list or one in each line.",
            show_default=False,
        ),
    ] = None,
    split: Split = "train",
    recipe: Annotated[
        str | None, typer.Option(help="A paper's schedule, by its name in docs/training.md.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows of a batch on each device.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Its highest value.")] = None,
    seed: Annotated[int | None, typer.Option(help="Fixes new weights and batches.")] = None,
    image_size: ImageSize = None,
    augment: Annotated[bool, typer.Option(help="Crop, mirror and recolour images; SOHO's stay.")] = True,
    teacher: Annotated[
        bool, typer.Option(help="Learn from the momentum teacher, where the paper does.")
    ] = True,
    prompt: Annotated[
        str | None,
        typer.Option(
            help='For captioning: what captions begin with, in place of the model\'s own; "" for nothing.',
            show_default=False,
        ),
    ] = None,
    label_smoothing: Annotated[
        float | None,
        typer.Option(
            help="For captioning: share of probability for other words, in place of the model's own.",
            show_default=False,
        ),
    ] = None,
    self_critical: Annotated[
        bool,
        typer.Option("--self-critical", help="For captioning: learn from the CIDEr-D of drawn captions."),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last complete checkpoint in --out.")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Any other field of VLPTrainingArguments; repeat it for more."
        ),
    ] = None,
) -> None:
    """Train a head on your rows, and save it with its processor."""
    from .commands.train import CaptionOptions, run

    pairs = [setting.partition("=") for setting in settings or []]
    plain = {
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    fields = {name: value for name, _, value in pairs}
    fields |= {name: str(value) for name, value in plain.items() if value is not None}
    run(
        task,
        model,
        data,
        out,
        regions=regions,
        features=features,
        extractor=extractor,
        answers=answers,
        split=split,
        recipe=recipe,
        image_size=image_size,
        augment=augment,
        teacher=teacher,
        resume=resume,
        fields=fields,
        captions=CaptionOptions(prompt, label_smoothing, self_critical),
    )
    typer.echo(f"saved to {out}")


@app.command()
def evaluate(
    task: Annotated[EvaluateTask, typer.Argument(help="What to score.", show_default=False)],
    model: Model,
    data: Rows,
    split: Split = "test",
    answers: Answers = None,
    features: Features = None,
    extractor: Extractor = None,
    top_k: Annotated[
        int, typer.Option(help="Candidates that retrieval re-ranks, answers that vqa ranks whole.")
    ] = 128,
    batch_size: BatchSize = 32,
) -> None:
    """Score a model on your rows: JSON of the metrics beside those of an honest baseline."""
    from .commands.evaluate import run

    scores = run(task, model, data, split, answers, features, extractor, top_k, batch_size)
    typer.echo(json.dumps(scores, indent=2))


@app.command()
def extract(
    images: Annotated[list[str], typer.Argument(help="Images, or folders of them.")],
    extractor: Annotated[
        str,
        typer.Option(
            help="Folder or Hub name of a detector, grid:NAME for the cells of a vision model, or "
            "torchvision:NAME; #N after it for other than 36 regions (of grids: 6 x 6).",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder of the regions.", show_default=False)],
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 8,
    on_bad_image: Annotated[
        Literal["raise", "skip"], typer.Option(help="Stop at images that cannot be read, or leave them out.")
    ] = "raise",
) -> None:
    """Find the regions of images, for models that read regions; go on where an earlier run was cut short."""
    from .commands.extract import run

    typer.echo(run(images, extractor, out, batch_size=batch_size, on_bad_image=on_bad_image))


@index.command()
def build(
    model: Model,
    images: Annotated[list[str], typer.Argument(help="Images, or folders of them.")],
    out: Annotated[Path, typer.Option(help="The folder of the index.", show_default=False)],
    states: Annotated[
        Literal["key_values", "embeds", "none"],
        typer.Option(help="What is kept for re-ranking; embeds are smaller and slower, none goes without."),
    ] = "key_values",
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"], typer.Option(help="Of what is kept for re-ranking.")
    ] = "float32",
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 32,
) -> None:
    """Encode images with a retrieval head of ALBEF or X-VLM; go on where an earlier run was cut short."""
    from .commands.index import build as run

    kept = None if states == "none" else states
    typer.echo(run(model, images, out, states=kept, dtype=dtype, batch_size=batch_size))


@index.command()
def search(
    folder: Annotated[str, typer.Argument(help="Folder of an index, or a dataset on the Hub.")],
    text: Annotated[list[str] | None, typer.Option(help="What to find; repeat it for more.")] = None,
    image: Annotated[
        list[str] | None, typer.Option(help="What it is to be like; repeat it for more.")
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Images to print.")] = 10,
    rerank: Annotated[
        int | None,
        typer.Option(
            help="Of texts: how many of the nearest are ranked by matching; 128.", show_default=False
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder or Hub name of the model, where it moved since.", show_default=False),
    ] = None,
    faiss: Annotated[
        str | None,
        typer.Option(help="Search with FAISS: what index_factory takes, such as HNSW32.", show_default=False),
    ] = None,
) -> None:
    """Search an index: JSON of the best images, their cosines and scores."""
    from .commands.index import search as run

    typer.echo(json.dumps(run(folder, text or [], image or [], k, rerank, model, faiss), indent=2))


@convert.command()
def albef(
    checkpoint: Annotated[Path, typer.Argument(help="An official ALBEF checkpoint (.pth).")],
    out: Out,
    image_size: ImageSize = None,
    num_attention_heads: Annotated[
        int | None,
        typer.Option(help="Heads of trunk and text layers, where they are not 64 wide.", show_default=False),
    ] = None,
    tokenizer: Tokenizer = "bert-base-uncased",
    momentum: Annotated[
        bool, typer.Option(help="Keep the momentum teacher and its queues, to go on with training.")
    ] = False,
    grounding: Annotated[
        bool, typer.Option("--grounding", help="For refcoco.pth, whose keys are those of a retrieval file.")
    ] = False,
    push: Push = None,
) -> None:
    """Convert an official ALBEF checkpoint, pre-trained or fine-tuned, and report every key.

    Its kind is read from the keys: pre-training, retrieval, visual question answering, visual entailment,
    NLVR2, or NLVR2's text assignment.
    """
    from .conversion.albef import convert_checkpoint

    report = convert_checkpoint(
        checkpoint,
        out,
        tokenizer=tokenizer,
        image_size=image_size,
        num_attention_heads=num_attention_heads,
        momentum=momentum,
        grounding=grounding,
    )
    _finish(report, out, push)


@convert.command()
def butd(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="Weights of the bottom-up-attention detector (.caffemodel, .pkl, .pth, .safetensors)."
        ),
    ],
    out: Out,
    push: Push = None,
) -> None:
    """Convert the detector that finds LXMERT's regions, of Caffe or of a copy, and report every key."""
    from .conversion.butd import convert_checkpoint

    _finish(convert_checkpoint(checkpoint, out), out, push)


@convert.command()
def features(
    files: Annotated[
        list[Path],
        typer.Argument(help="Published features of regions (.tsv, .h5), or folders of .npz files."),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write, for --features.", show_default=False)],
) -> None:
    """Write features that others published into a store that is read from disk."""
    from .data.features import convert_features

    store = convert_features(files, out)
    typer.echo(f"{len(store)} images, features of width {store.feature_dim}\nwritten to {out}")


@convert.command()
def lxmert(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="An official LXMERT checkpoint (.pth), or the weights of one of transformers."),
    ],
    out: Out,
    answers: Annotated[
        Path | None,
        typer.Option(
            help="The answers of its head, which it lacks: all_ans.json, or trainval_label2ans.json.",
            show_default=False,
        ),
    ] = None,
    num_attention_heads: Annotated[
        int | None, typer.Option(help="Heads of the layers, where they are not 64 wide.", show_default=False)
    ] = None,
    tokenizer: Tokenizer = "bert-base-uncased",
    push: Push = None,
) -> None:
    """Convert an LXMERT checkpoint, pre-trained or fine-tuned, and report every key.

    Its kind is read from the keys: pre-training, question answering (VQA, GQA), or NLVR2.
    """
    from .conversion.lxmert import convert_checkpoint
    from .data.lxmert_readers import read_answer_table

    report = convert_checkpoint(
        checkpoint,
        out,
        tokenizer=tokenizer,
        num_attention_heads=num_attention_heads,
        answers=answers and read_answer_table(answers),
    )
    _finish(report, out, push)


@convert.command()
def soho(
    checkpoint: Annotated[Path, typer.Argument(help="An official SOHO checkpoint (.pth).")],
    out: Out,
    answers: Annotated[
        Path | None,
        typer.Option(
            help="The answers of its head, which it lacks: a JSON list, or the VQA file it was trained on.",
            show_default=False,
        ),
    ] = None,
    num_attention_heads: Annotated[
        int | None, typer.Option(help="Heads of the layers, where they are not 64 wide.", show_default=False)
    ] = None,
    tokenizer: Tokenizer = "bert-base-uncased",
    push: Push = None,
) -> None:
    """Convert an official SOHO checkpoint, of pre-training or question answering, and report every key.

    Kind, trunk and sizes are read from the keys.
    """
    from .commands.predict import read_answers
    from .conversion.soho import convert_checkpoint

    report = convert_checkpoint(
        checkpoint,
        out,
        tokenizer=tokenizer,
        num_attention_heads=num_attention_heads,
        answers=answers and read_answers(answers),
    )
    _finish(report, out, push)


@convert.command()
def xvlm(
    checkpoint: Annotated[Path, typer.Argument(help="An official X-VLM checkpoint (.th or .pth).")],
    out: Out,
    image_size: ImageSize = None,
    num_attention_heads: Annotated[
        int | None,
        typer.Option(
            help="Heads of the text layers, and of a CLIP or DeiT trunk, where they are not 64 wide.",
            show_default=False,
        ),
    ] = None,
    tokenizer: Tokenizer = "bert-base-uncased",
    push: Push = None,
) -> None:
    """Convert an official X-VLM checkpoint, pre-trained or fine-tuned, and report every key.

    Its kind is read from the keys: pre-training, retrieval, grounding, visual question answering, NLVR2,
    NLVR2's text assignment, or captioning.
    """
    from .conversion.xvlm import convert_checkpoint

    report = convert_checkpoint(
        checkpoint, out, tokenizer=tokenizer, image_size=image_size, num_attention_heads=num_attention_heads
    )
    _finish(report, out, push)


@app.command()
def export_onnx(model: Model, out: Out) -> None:
    """Write the parts of a model that match images with texts as ONNX files."""
    from .heads import load_head
    from .onnx_export import export_onnx

    names = export_onnx(load_head("retrieval", model), out)
    typer.echo(f"{', '.join(names)} written to {out}")


def _finish(report, out: Path, push: str | None) -> None:
    from .folders import push_folder

    typer.echo(f"{report}\n{report.model} written to {out}")
    if push is not None:
        typer.echo(f"pushed to {push_folder(out, push)}")


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except (ValueError, OSError) as error:
        sys.exit("error: " + " ".join(str(error).split()))

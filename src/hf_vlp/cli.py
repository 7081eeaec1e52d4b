"""The command `hf-vlp`: the quickstart, and converters of official checkpoints.

Each command imports what it needs when it runs. What the package refuses (`ValueError`) and what the file
system refuses (`OSError`) ends as one line on stderr with exit code 1.
"""

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="hf-vlp",
    help="X-VLM in the Hugging Face ecosystem: train it on your machine, convert its official checkpoints.",
    no_args_is_help=True,
    add_completion=False,
)
convert = typer.Typer(
    help="Turn an official checkpoint into a folder that `from_pretrained` reads.", no_args_is_help=True
)
app.add_typer(convert, name="convert")


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


@convert.command()
def xvlm(
    checkpoint: Annotated[Path, typer.Argument(help="An official X-VLM checkpoint (.th or .pth).")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    image_size: Annotated[
        int | None,
        typer.Option(help="Resample the image trunk to this many pixels a side.", show_default=False),
    ] = None,
    num_attention_heads: Annotated[
        int | None,
        typer.Option(help="Heads of the text layers, where they are not 64 wide.", show_default=False),
    ] = None,
    tokenizer: Annotated[
        str, typer.Option(help="Name or folder of the tokenizer the text encoder was trained with.")
    ] = "bert-base-uncased",
) -> None:
    """Convert an official X-VLM pre-training, retrieval or grounding checkpoint, and report every key."""
    from .conversion.xvlm import convert_checkpoint

    report = convert_checkpoint(
        checkpoint, out, tokenizer=tokenizer, image_size=image_size, num_attention_heads=num_attention_heads
    )
    typer.echo(f"{report}\nwritten to {out}")


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")

"""`hf-vlp demo`: the page on which models are tried out, here or as a Space."""

from collections.abc import Sequence


def run(
    models: Sequence[str],
    tasks: Sequence[str] | None = None,
    extractor: str | None = None,
    port: int | None = None,
    space: str | None = None,
    private: bool = False,
) -> str | None:
    """Show the page until it is stopped, or upload it to `space`; then the address of that commit.

    Raises:
        ValueError: as `build` and `push_space`, or gradio is not installed.
    """
    try:
        from .. import demo
    except ImportError as error:
        raise ValueError(str(error)) from error
    if space is not None:
        return demo.push_space(space, models, tasks, extractor, private=private or None).commit_url
    demo.launch(demo.build(models, tasks, extractor), server_port=port)

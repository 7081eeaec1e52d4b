"""A page in the browser on which models are tried out, on this machine or as a Space of the Hub.

hf_vlp.demo.launch(hf_vlp.demo.build("org/xvlm-refcoco"))
"""

try:
    import gradio  # noqa: F401
except ImportError as error:
    raise ImportError("the demo needs gradio: pip install 'hf-vlp[demo]'") from error

from .app import build, launch
from .space import push_space, write_space

__all__ = ["build", "launch", "push_space", "write_space"]

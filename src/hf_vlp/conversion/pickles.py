"""Arrays out of a pickle that was not written by torch, without running what else it may hold."""

import io
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def _bytes(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes in pickles that Python 2 can read."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it holds bytes encoded as {encoding}")
    return text.encode(encoding)


# how numpy writes an array and a number; the module is called numpy.core before numpy 2
_NUMPY = {
    function.__name__: function for function, *_ in (np.zeros(0).__reduce__(), np.float32().__reduce__())
}
_ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _bytes,
    **{
        (f"numpy.{core}.multiarray", name): function
        for core in ("core", "_core")
        for name, function in _NUMPY.items()
    },
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _ALLOWED[module, name]


def read_array_pickle(path: str | Path) -> dict[str, Tensor]:
    """The arrays of a pickle, as detectron2 writes them, out of `{"model": ...}`; no code is run.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated, or holds anything but numbers in arrays.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {str(path)!r} does not exist; give the path of the pickle")
    try:
        content = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
            content = content["model"]
        return {str(name): torch.from_numpy(np.array(array)) for name, array in content.items()}
    except (
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        IndexError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(
            f"checkpoint {str(path)!r} cannot be read, it is truncated or no table of arrays; fetch it "
            f"again, and trust no file that asks for more ({error})"
        ) from error

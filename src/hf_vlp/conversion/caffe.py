"""Weights out of a Caffe file without Caffe: as much of protobuf as a `NetParameter` needs.

A message is a sequence of fields: a key, which is the field's number and the type it is written in, and a
value. What is not asked for is skipped.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_LAYER, _OLD_LAYER = 100, 2  # of NetParameter
_NAME, _BLOBS = {_LAYER: 1, _OLD_LAYER: 4}, {_LAYER: 7, _OLD_LAYER: 6}  # of LayerParameter, V1LayerParameter
_DATA, _SHAPE, _OLD_SHAPE = 5, 7, (1, 2, 3, 4)  # of BlobProto; the old are num, channels, height, width
_DIM = 1  # of BlobShape


def read_caffemodel(path: str | Path) -> dict[str, Tensor]:
    """The blobs of all layers that have any, as `layer.index`: `conv1.0` is the weight, `conv1.1` the bias.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated, or no Caffe model.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {str(path)!r} does not exist; give the path of the caffemodel")
    blobs = {}
    try:
        for number, layer in _fields(memoryview(path.read_bytes())):
            if number in _NAME:
                blobs |= _read_layer(layer, _NAME[number], _BLOBS[number])
    except (ValueError, IndexError, TypeError) as error:
        raise ValueError(
            f"checkpoint {str(path)!r} cannot be read, it is truncated or no Caffe model; fetch it again "
            f"({error})"
        ) from error
    if not blobs:
        raise ValueError(
            f"checkpoint {str(path)!r} holds no weights; give the caffemodel, not the prototxt of its net"
        )
    return blobs


def _read_layer(layer: memoryview, name_field: int, blobs_field: int) -> dict[str, Tensor]:
    name, blobs = "", []
    for number, value in _fields(layer):
        if number == name_field:
            name = str(value, "utf-8")
        elif number == blobs_field:
            blobs.append(_read_blob(value))
    return {f"{name}.{index}": blob for index, blob in enumerate(blobs)}


def _read_blob(blob: memoryview) -> Tensor:
    data, shape, old_shape = bytearray(), None, [1, 1, 1, 1]
    for number, value in _fields(blob):
        if number == _DATA:  # all at once, or one by one
            data += value
        elif number == _SHAPE:
            shape = _read_dims(value)
        elif number in _OLD_SHAPE:
            old_shape[number - 1] = value
    if shape is None:
        shape = old_shape
        while len(shape) > 1 and shape[0] == 1:  # vectors and matrices were padded to four dimensions
            shape = shape[1:]
    if 4 * math.prod(shape) != len(data):
        raise ValueError(f"a blob of shape {tuple(shape)} has {len(data)} bytes")
    return torch.from_numpy(np.frombuffer(data, dtype="<f4").astype(np.float32)).reshape(shape)


def _read_dims(shape: memoryview) -> list[int]:
    dims = []
    for number, value in _fields(shape):
        if number == _DIM and isinstance(value, int):
            dims.append(value)
        elif number == _DIM:
            position = 0
            while position < len(value):
                dim, position = _varint(value, position)
                dims.append(dim)
    return dims


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field of a message: a whole number, or the bytes."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, written_as = key >> 3, key & 7
        if written_as == _VARINT:
            value, position = _varint(message, position)
            yield number, value
            continue
        if written_as == _BYTES:
            size, position = _varint(message, position)
        elif written_as in (_FIXED32, _FIXED64):
            size = 4 if written_as == _FIXED32 else 8
        else:
            raise ValueError(f"field {number} is written in type {written_as}, which is unknown")
        if position + size > len(message):
            raise ValueError(f"field {number} ends {position + size - len(message)} bytes after its message")
        yield number, message[position : position + size]
        position += size


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """A whole number, seven bits in each byte and the lowest first, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = message[position + shift // 7]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position + shift // 7 + 1
    raise ValueError("a whole number has more than ten bytes")

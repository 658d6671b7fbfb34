"""From the device to the host in one transfer: each transfer waits until the device has done all that came before."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def to_host(*tensors: Tensor) -> list[npt.NDArray[Any]]:
    """Tensors [k] or [k, d] of one k, as numpy arrays of their shapes and dtypes. Those of a CPU share its memory.

    They travel as float64, which holds float32 and integers below 2^53 exactly.
    """
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return [tensor.numpy() for tensor in tensors]
    k = len(tensors[0])
    columns = [tensor.reshape(k, -1).double() for tensor in tensors]
    ends = np.cumsum([column.shape[1] for column in columns])
    travelled = np.split(torch.cat(columns, 1).cpu().numpy(), ends[:-1], 1)
    return [
        column.astype(np.dtype(str(tensor.dtype).removeprefix("torch."))).reshape(tensor.shape)
        for column, tensor in zip(travelled, tensors, strict=True)
    ]

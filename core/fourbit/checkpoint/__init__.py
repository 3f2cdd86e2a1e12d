"""Model folders of safetensors: reading them, quantizing them tensor by tensor, saying what is in them.

`reader` opens a folder (ours, bitsandbytes', or plain), `build` writes one that is never half there and can be
resumed, `quantize` goes from one to the other, `inspect` lists what a folder holds, `verify` checks it.
"""

from __future__ import annotations

from fourbit.checkpoint.errors import CheckpointError
from fourbit.checkpoint.reader import Checkpoint, TensorInfo

__all__ = ["Checkpoint", "CheckpointError", "TensorInfo"]

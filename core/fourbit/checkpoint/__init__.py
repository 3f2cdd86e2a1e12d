"""Model folders of safetensors: reading them, quantizing them tensor by tensor, saying what is in them.

`reader` opens a model's folder (ours, bitsandbytes', or plain), `compound` one or several of them as `layouts` knows
them, `build` writes a folder that is never half there and can be resumed, `quantize` goes from one to the other,
`inspect` lists what a folder holds, `verify` checks it.
"""

from __future__ import annotations

from fourbit.checkpoint.errors import CheckpointError
from fourbit.checkpoint.reader import Checkpoint, TensorInfo

__all__ = ["Checkpoint", "CheckpointError", "TensorInfo"]

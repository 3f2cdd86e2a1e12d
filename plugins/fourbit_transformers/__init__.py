"""transformers: `from_pretrained(…, quantization_config=FourbitConfig())`, `save_pretrained`, and `load(folder)`.

Importing it registers fourbit with transformers: from then on folders that fourbit wrote open with fourbit's modules.
"""

from importlib.util import find_spec

if find_spec("transformers") is None:
    raise ImportError("fourbit_transformers needs transformers: pip install 'fourbit[transformers]'")

from fourbit_transformers.config import FourbitConfig
from fourbit_transformers.loading import load
from fourbit_transformers.quantizer import FourbitQuantizer
from fourbit_transformers.registration import register, take_over_bitsandbytes

__all__ = ["FourbitConfig", "FourbitQuantizer", "load", "take_over_bitsandbytes"]

register()

"""diffusers: `from_pretrained(…, quantization_config=FourbitConfig())` and `save_pretrained`, of models and pipelines.

Importing it registers fourbit with diffusers: from then on folders that fourbit wrote open with fourbit's modules.
"""

from fourbit_diffusers.config import FourbitConfig
from fourbit_diffusers.quantizer import FourbitQuantizer
from fourbit_diffusers.registration import register, take_over_bitsandbytes

__all__ = ["FourbitConfig", "FourbitQuantizer", "take_over_bitsandbytes"]

register()

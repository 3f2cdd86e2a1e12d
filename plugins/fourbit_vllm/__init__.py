"""vLLM: `vllm serve FOLDER` on folders that fourbit or bitsandbytes wrote, and `--quantization fourbit` on 16-bit ones.

vLLM finds it by its entry point `vllm.general_plugins`; nothing has to be imported.
"""

import logging

__all__ = ["register"]


def register() -> None:
    """Register fourbit's quantization with vLLM, which calls it in each of its processes; harmless the second time.

    A vLLM without what it builds on only gets a warning: whoever has both installed may serve other models.
    """
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config

        from fourbit_vllm.config import METHOD, FourbitVllmConfig
    except ImportError as error:
        logging.getLogger(__name__).warning(
            "4-bit folders are not served with fourbit, whose plugin is for vLLM 0.32: %s", error
        )
        return
    register_quantization_config(METHOD)(FourbitVllmConfig)

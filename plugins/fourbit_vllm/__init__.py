"""vLLM: `vllm serve FOLDER` on folders that fourbit or bitsandbytes wrote, and `--quantization fourbit` on 16-bit ones.

vLLM finds it by its entry point `vllm.general_plugins`; nothing has to be imported.
"""

__all__ = ["register"]


def register() -> None:
    """Register fourbit's quantization with vLLM; called by vLLM in each of its processes, and harmless the second time.

    It imports nothing of vLLM that vLLM has not imported by then but its quantization layers.
    """
    from vllm.model_executor.layers.quantization import register_quantization_config

    from fourbit_vllm.config import METHOD, FourbitVllmConfig

    register_quantization_config(METHOD)(FourbitVllmConfig)

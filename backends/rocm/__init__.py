"""The ROCm backend."""

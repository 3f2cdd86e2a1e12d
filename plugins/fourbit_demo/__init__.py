"""`fourbit demo`: a real model, quantized and compared with itself; `command.py` is the command."""

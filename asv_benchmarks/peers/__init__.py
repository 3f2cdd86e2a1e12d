"""Side by side with other libraries and with limits: `python -m peers`, and the scripts here; from the folder above."""

"""The cases of adapt_vision.py, one file each."""

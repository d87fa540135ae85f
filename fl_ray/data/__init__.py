"""Data sets, their split into client, public and test parts, partitioners and label statistics."""

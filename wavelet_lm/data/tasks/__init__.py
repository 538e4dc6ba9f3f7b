"""Labelled sequences for classification: the Long Range Arena's ListOps, reviews and pixels."""

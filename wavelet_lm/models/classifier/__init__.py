"""Classifiers of sequences with any of the models inside."""

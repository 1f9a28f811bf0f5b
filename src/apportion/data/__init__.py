"""Corpora and synthetic data: what the models read, and what the dictionaries are tested on."""

from apportion.data.corpora import Corpus, Document, corpus
from apportion.data.synthetic import SyntheticBatch, SyntheticDictionary

__all__ = ["Corpus", "Document", "SyntheticBatch", "SyntheticDictionary", "corpus"]

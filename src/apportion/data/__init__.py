"""Corpora, tasks and synthetic data: what the models read, and what the dictionaries are tested on."""

from apportion.data.corpora import Corpus, Document, corpus
from apportion.data.synthetic import SyntheticBatch, SyntheticDictionary
from apportion.data.tasks import Prompt, PromptPairs

__all__ = ["Corpus", "Document", "Prompt", "PromptPairs", "SyntheticBatch", "SyntheticDictionary", "corpus"]

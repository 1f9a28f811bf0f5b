"""Dictionary features per token: who gets the budget?"""

from apportion.features.dictionary import Reconstruction, SparseAutoencoder
from apportion.features.fitting import DictionaryObjective, Recipe, UnitDecoder, fit_dictionary
from apportion.features.jump_relu import LearnedThreshold
from apportion.features.losses import aux_k_loss, gated_loss, l0_loss, l1_loss, reconstruction_loss
from apportion.features.mutual_feature_choice import (
    Phases,
    ZipfFit,
    aux_zipf_loss,
    fit_zipf,
    underused_features,
)
from apportion.features.optimizer import DictionaryAdam
from apportion.features.statistics import FeatureStatistics
from apportion.features.transcoder import Transcoder, TranscoderSettings, fit_transcoder, weighted_reconstruction_loss

__all__ = [
    "DictionaryAdam",
    "DictionaryObjective",
    "FeatureStatistics",
    "LearnedThreshold",
    "Phases",
    "Recipe",
    "Reconstruction",
    "SparseAutoencoder",
    "Transcoder",
    "TranscoderSettings",
    "UnitDecoder",
    "ZipfFit",
    "aux_k_loss",
    "aux_zipf_loss",
    "fit_dictionary",
    "fit_transcoder",
    "fit_zipf",
    "gated_loss",
    "l0_loss",
    "l1_loss",
    "reconstruction_loss",
    "underused_features",
    "weighted_reconstruction_loss",
]

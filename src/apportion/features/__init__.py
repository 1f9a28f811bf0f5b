"""Dictionary features per token: who gets the budget?"""

from apportion.features.dictionary import Reconstruction, SparseAutoencoder
from apportion.features.discrete_circuits import CodeSettings, find_circuit
from apportion.features.fitting import DictionaryObjective, Recipe, UnitDecoder, fit_dictionary
from apportion.features.gradient_sae import (
    GradientScore,
    attribution_rank,
    encode_with_gradients,
    fit_gradient_dictionary,
)
from apportion.features.head_scores import HeadScores, label_heads, roc_auc
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
from apportion.features.supervised_dictionaries import SupervisedDictionary, fit_supervised
from apportion.features.transcoder import Transcoder, TranscoderSettings, fit_transcoder, weighted_reconstruction_loss

__all__ = [
    "CodeSettings",
    "DictionaryAdam",
    "DictionaryObjective",
    "FeatureStatistics",
    "GradientScore",
    "HeadScores",
    "LearnedThreshold",
    "Phases",
    "Recipe",
    "Reconstruction",
    "SparseAutoencoder",
    "SupervisedDictionary",
    "Transcoder",
    "TranscoderSettings",
    "UnitDecoder",
    "ZipfFit",
    "attribution_rank",
    "aux_k_loss",
    "aux_zipf_loss",
    "encode_with_gradients",
    "find_circuit",
    "fit_dictionary",
    "fit_gradient_dictionary",
    "fit_supervised",
    "fit_transcoder",
    "fit_zipf",
    "gated_loss",
    "l0_loss",
    "l1_loss",
    "label_heads",
    "reconstruction_loss",
    "roc_auc",
    "underused_features",
    "weighted_reconstruction_loss",
]

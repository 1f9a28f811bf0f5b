"""Transformers models: getting them, and listening (and speaking) at named places inside them."""

from apportion.models.activations import ActivationStore, StoreView, gradient_of
from apportion.models.capture import capture
from apportion.models.gradients import capture_with_gradients, capture_with_loss_gradients
from apportion.models.harvest import harvest, join_parts
from apportion.models.language import LanguageModel, load
from apportion.models.packaged import cache_dir, fetch
from apportion.models.site import Site
from apportion.models.splice import splice

__all__ = [
    "ActivationStore",
    "LanguageModel",
    "Site",
    "StoreView",
    "cache_dir",
    "capture",
    "capture_with_gradients",
    "capture_with_loss_gradients",
    "fetch",
    "gradient_of",
    "harvest",
    "join_parts",
    "load",
    "splice",
]

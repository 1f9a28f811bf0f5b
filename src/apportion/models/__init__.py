"""Transformers models: getting them, and listening (and speaking) at named places inside them."""

from apportion.models.activations import ActivationStore, StoreView, gradient_of
from apportion.models.capture import capture
from apportion.models.chat import CallableChat, ChatModel, ReplayChat, SamplingParams
from apportion.models.chat_server import ChatServer
from apportion.models.gradients import capture_with_gradients, capture_with_loss_gradients
from apportion.models.harvest import harvest, join_parts
from apportion.models.heads import HeadEdit, edit_heads, head_outputs
from apportion.models.language import LanguageModel, load
from apportion.models.local_chat import LocalChat
from apportion.models.packaged import cache_dir, fetch
from apportion.models.patching import ablate_heads, attribute_heads, keep_heads, patch_heads
from apportion.models.prompts import TokenPairs, TokenPrompts, Validation, tokenise, validate
from apportion.models.sentences import SentenceEncoder
from apportion.models.site import Site
from apportion.models.splice import splice

__all__ = [
    "ActivationStore",
    "CallableChat",
    "ChatModel",
    "ChatServer",
    "HeadEdit",
    "LanguageModel",
    "LocalChat",
    "ReplayChat",
    "SamplingParams",
    "SentenceEncoder",
    "Site",
    "StoreView",
    "TokenPairs",
    "TokenPrompts",
    "Validation",
    "ablate_heads",
    "attribute_heads",
    "cache_dir",
    "capture",
    "capture_with_gradients",
    "capture_with_loss_gradients",
    "edit_heads",
    "fetch",
    "gradient_of",
    "harvest",
    "head_outputs",
    "join_parts",
    "keep_heads",
    "load",
    "patch_heads",
    "splice",
    "tokenise",
    "validate",
]

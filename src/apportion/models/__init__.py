"""Transformers models: getting them, and listening (and speaking) at named places inside them."""

from apportion.models.activations import ActivationStore, StoreView
from apportion.models.capture import capture
from apportion.models.chat import CallableChat, ChatModel, ReplayChat
from apportion.models.chat_server import ChatServer
from apportion.models.harvest import harvest, join_parts
from apportion.models.language import LanguageModel, load
from apportion.models.local_chat import LocalChat
from apportion.models.packaged import cache_dir, fetch
from apportion.models.sentences import SentenceEncoder
from apportion.models.site import Site
from apportion.models.splice import splice

__all__ = [
    "ActivationStore",
    "CallableChat",
    "ChatModel",
    "ChatServer",
    "LanguageModel",
    "LocalChat",
    "ReplayChat",
    "SentenceEncoder",
    "Site",
    "StoreView",
    "cache_dir",
    "capture",
    "fetch",
    "harvest",
    "join_parts",
    "load",
    "splice",
]

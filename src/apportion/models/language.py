"""Loading a transformers model, and what the rest of apportion asks of one."""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from apportion.errors import InputError
from apportion.models.families import base_of, blocks_of, final_norm_of, finish_logits, layout_of, projection_out_of
from apportion.models.packaged import PACKAGES, fetched
from apportion.models.packed_files import is_packed, read_packed
from apportion.models.quiet import quiet_transformers
from apportion.models.site import Site

# Logits of this many numbers at a time: 64 MiB in float32, some 340 tokens of SmolLM2's vocabulary.
LOGITS_AT_ONCE = 2**24


@dataclass(eq=False)
class LanguageModel:
    """A transformers model in eval mode that wants no gradients, and its tokenizer.

    Attributes:
        name: what it was loaded as.
        model: the transformers model.
        tokenizer: the transformers tokenizer.

    Raises:
        InputError: the model is of a family that the table in ``families.py`` lacks.
    """

    name: str
    model: Any
    tokenizer: Any

    def __post_init__(self) -> None:
        layout_of(self.model)
        self.model.eval().requires_grad_(False)

    @property
    def d_model(self) -> int:
        """The width of the residual stream."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def n_layers(self) -> int:
        """The number of blocks."""
        return len(blocks_of(self.model))

    @property
    def n_heads(self) -> int:
        """The number of query heads of a block."""
        return int(self.model.config.get_text_config().num_attention_heads)

    @property
    def head_width(self) -> int:
        """The width of a head's output; all heads side by side may be wider than the residual stream."""
        return Site(0, "heads").width(self.model) // self.n_heads

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def is_causal(self) -> bool:
        """Whether the model predicts the next token."""
        return layout_of(self.model).causal and self.model.get_output_embeddings() is not None

    @cached_property
    def fingerprint(self) -> str:
        """A hash that tells this model's weights from others', whatever its name, folder, device and dtype.

        It covers the architecture, the names and shapes of all weights, and up to 256 numbers of each, rounded to
        bfloat16 so that a model loaded in float32 and in bfloat16 is the same model.
        """
        digest = hashlib.sha256(f"{self.model.config.model_type} {self.n_layers} {self.d_model}".encode())
        for name, weight in self.model.named_parameters():
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            flat = weight.detach().reshape(-1)
            sample = flat[:: max(1, len(flat) // 256)][:256]
            digest.update(sample.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes())
        return digest.hexdigest()[:32]

    @torch.no_grad()
    def loss_per_token(
        self,
        input_ids: Int[Tensor, "batch time"],
        attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "batch time-1"]:
        """The cross-entropy, in nats and float32, of each token given those before it; the first token has none.

        Entry ``[b, t]`` belongs to token ``t + 1``. Where that is padding the entry means nothing: mask it. The logits
        are never all in memory at once. Splices in force are in force here too.

        Raises:
            InputError: the model does not predict the next token.
            ValueError: fewer than two tokens a row.
        """
        self._check_causal("next-token losses")
        if input_ids.shape[1] < 2:
            raise ValueError(
                f"input_ids needs at least 2 tokens a row to predict one, got shape {tuple(input_ids.shape)}"
            )
        hidden = base_of(self.model)(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        return self.losses_of(hidden, input_ids)

    @torch.no_grad()
    def losses_of(
        self, hidden: Float[Tensor, "batch time width"], input_ids: Int[Tensor, "batch time"]
    ) -> Float[Tensor, "batch time-1"]:
        """`loss_per_token`, given what the head is given for each token.

        Raises:
            InputError: the model does not predict the next token.
        """
        self._check_causal("next-token losses")
        hidden = hidden[:, :-1].flatten(0, 1)
        targets = input_ids[:, 1:].flatten().long()
        head = self.model.get_output_embeddings()
        losses = torch.empty(len(targets), device=hidden.device)
        step = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
        for start in range(0, len(targets), step):
            part = slice(start, start + step)
            logits = finish_logits(self.model, head(hidden[part]).float())
            losses[part] = nn.functional.cross_entropy(logits, targets[part], reduction="none")
        return losses.view(input_ids.shape[0], -1)

    @torch.no_grad()
    def next_token_logits(
        self,
        input_ids: Int[Tensor, "batch time"],
        attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"],
    ) -> Float[Tensor, "batch vocab"]:
        """The logits, in float32, after the last token of each row that is not padding (on the right).

        Splices in force are in force here too.

        Raises:
            InputError: the model does not predict the next token.
        """
        self._check_causal("next-token logits")
        hidden = base_of(self.model)(
            input_ids=input_ids, attention_mask=attention_mask.long(), use_cache=False
        ).last_hidden_state
        last = attention_mask.long().sum(dim=1) - 1
        rows = hidden[torch.arange(len(last), device=hidden.device), last]
        return finish_logits(self.model, self.model.get_output_embeddings()(rows).float())

    def generate(self, prompts: str | Sequence[str], **options: Any) -> list[str]:
        """What the model writes after each prompt, one text for each; splices and steering in force are in force here.

        Args:
            prompts: one or several.
            options: ``tokens`` (40), ``temperature`` (0: the likeliest token), ``seed`` (0) and ``chat`` (False); see
                ``apportion.models.generate.generate``, also for the errors.
        """
        from apportion.models.generate import generate

        return generate(self, [prompts] if isinstance(prompts, str) else prompts, **options)

    def unembedding(self) -> tuple[Float[Tensor, "vocab d_model"], Callable[[Tensor], Tensor]]:
        """The map from the residual stream to the vocabulary, for the logit lens.

        Returns:
            The weight ``[vocab, d_model]``, and the norm that the model applies between its last block and that weight.
            The head's bias (Phi has one) and the squashing of the logits (Gemma 2) are not part of it.

        Raises:
            InputError: the model does not predict the next token.
        """
        self._check_causal("a logit lens")
        weight = self.model.get_output_embeddings().weight.detach()
        projection = projection_out_of(self.model)
        if projection is not None:
            weight = weight @ projection.weight.detach()
        return weight, final_norm_of(self.model)

    @torch.no_grad()
    def final_norm_gain(self) -> Float[Tensor, " d_model"]:
        """What the final norm multiplies each coordinate by once it has scaled the vector, in float32.

        It is measured, since some norms keep it as their weight and others (Gemma's) as their weight plus one.

        Raises:
            InputError: the model does not predict the next token.
        """
        self._check_causal("a final norm")
        norm = final_norm_of(self.model)
        # Mean 0 and the length of a normed vector: neither kind of norm rescales it. The difference drops a bias.
        probe = torch.ones(self.d_model, device=self.device, dtype=self.model.dtype)
        probe[1::2] = -1
        return ((norm(probe) - norm(-probe)) / (2 * probe)).float()

    def _check_causal(self, wanted: str) -> None:
        if not self.is_causal:
            raise InputError(
                f"{self.name} ({type(self.model).__name__}) does not predict the next token, so it has no {wanted}: "
                "use a causal language model, such as smollm2"
            )


def load(name: str | Path, dtype: str = "float32", device: str = "cpu") -> LanguageModel:
    """Load a packaged model (``smollm2``, ``minilm``), a folder, or a model of the Hugging Face hub.

    A packaged name and a folder never touch the network; a Hugging Face id does not either if the hub's own cache has
    it. Only safetensors are read, and no code that comes with a model is run.

    Args:
        name: a packaged name, a folder that transformers or ``apportion compress`` wrote (its packed weights are made
            dense; `apportion.weights.load_compressed` keeps them packed), or a Hugging Face id.
        dtype: ``float32``, ``bfloat16``, or ``auto``: bfloat16 where this machine computes it natively, else float32.
        device: a torch device, such as ``cpu`` or ``cuda``.

    Raises:
        InputError: no such model, a packaged model that was not fetched yet, a damaged model, one of an unknown family,
            a wrong dtype or device.
    """
    place = device_named(device)
    number = _dtype(dtype, place)
    name = str(name)
    if name in PACKAGES:
        folder = fetched(name)
        if folder is None:
            raise InputError(f"{name} is not on this machine yet: run `apportion fetch {name}`")
        return _from_pretrained(name, str(folder), number, place, local=True)
    path = Path(name).expanduser()
    if name and path.is_dir():
        _check_configured(path)
        return _from_pretrained(name, str(path), number, place, local=True)
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise InputError(f"model {name!r} is not a folder{_what_works()}")
    try:
        return _from_pretrained(name, name, number, place, local=True)
    except _NotReadable:
        _ask_the_hub(name)
        return _from_pretrained(name, name, number, place, local=False)


def load_around(
    folder: Path | str,
    state_of: Callable[[nn.Module, torch.dtype], dict[str, Tensor]],
    finish: Callable[[nn.Module], None],
    dtype: str = "float32",
    device: str = "cpu",
) -> LanguageModel:
    """A model of a folder, with weights that the caller has: nothing is read but configuration and tokenizer.

    Args:
        folder: with ``config.json``.
        state_of: gives the whole state dictionary, for a model without memory (on the meta device) and the dtype that
            is computed in.
        finish: may change the model before it is moved to the device.
        dtype: see `load`.
        device: see `load`.

    Raises:
        InputError: see `load`; the state dictionary does not fit.
    """
    place = device_named(device)
    _check_configured(Path(folder))
    return _from_pretrained(
        str(folder), str(folder), _dtype(dtype, place), place, local=True, state_of=state_of, finish=finish
    )


def _check_configured(folder: Path) -> None:
    if not (folder / "config.json").exists():
        raise InputError(
            f"model '{folder}' is a folder without config.json: give one that transformers' save_pretrained wrote"
        )


class _NotReadable(InputError):
    """There is no model, or not a whole one, where one was looked for."""


def native_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies matrices of it in hardware, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type != "cpu":
        return torch.float32
    can = torch.cpu.get_capabilities()
    return torch.bfloat16 if can.get("avx512_bf16") or can.get("amx_bf16") else torch.float32


def _from_pretrained(
    name: str,
    source: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    local: bool,
    state_of: Callable[[nn.Module, torch.dtype], dict[str, Tensor]] | None = None,
    finish: Callable[[nn.Module], None] | None = None,
) -> LanguageModel:
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(source, local_files_only=local)
            kind: Any = AutoModelForCausalLM if _predicts_next_token(config) else AutoModel
            if state_of is None and local and is_packed(source):
                # What was packed becomes plain dense tensors; `apportion.weights` knows how to keep it packed.
                state_of = _unpacked(source)
            state = None
            if state_of is not None:
                with torch.device("meta"):
                    skeleton = kind.from_config(config)
                kind, state = type(skeleton), state_of(skeleton, dtype)
            model, report = kind.from_pretrained(
                None if state is not None else source,
                config=config,
                state_dict=state,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=local,
                output_loading_info=True,
            )
            if state is not None and (Path(source) / "generation_config.json").exists():
                model.generation_config = GenerationConfig.from_pretrained(source)
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
    except (OSError, ValueError, SafetensorError) as error:
        raise _NotReadable(f"model {name!r} could not be loaded ({_first_line(error)}){_what_works()}") from error
    # Encoders are commonly saved without the pooler, which nothing here uses.
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    if missing:
        raise InputError(
            f"model {name!r} lacks weights for {', '.join(missing[:3])} ({len(missing)} in all): it is damaged"
        )
    if finish is not None:
        finish(model)
    return LanguageModel(name, model.to(device), tokenizer)


def _unpacked(folder: str) -> Callable[[nn.Module, torch.dtype], dict[str, Tensor]]:
    return lambda _, dtype: read_packed(folder).dense(dtype)


def _ask_the_hub(name: str) -> None:
    """Find out in one request whether the hub has a model: without a network transformers would try for long."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        HfApi().model_info(name, timeout=10)
    except RepositoryNotFoundError as error:
        raise InputError(f"the Hugging Face hub shows you no model {name!r}{_what_works()}") from error
    except Exception as error:  # of the HTTP client, which differs between versions of huggingface_hub
        raise InputError(
            f"model {name!r} is not on this machine, and the Hugging Face hub cannot be asked ({_first_line(error)})"
            f"{_what_works()}"
        ) from error


def _predicts_next_token(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if config.architectures:
        return any(
            name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in config.architectures
        )
    return config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _dtype(dtype: str, device: torch.device) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype == "auto":
        return native_dtype(device)
    if dtype not in known:
        raise InputError(f"dtype {dtype!r} is unknown: choose float32, bfloat16 or auto")
    return known[dtype]


def device_named(device: str) -> torch.device:
    """A torch device that this machine has.

    Raises:
        InputError: it has none of that name.
    """
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {device!r} cannot be used on this machine ({_first_line(error)})") from error
    return place


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _what_works() -> str:
    return f": a packaged model ({', '.join(PACKAGES)}), a folder with a transformers model, or a Hugging Face id works"

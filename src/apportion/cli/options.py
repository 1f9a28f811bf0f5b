"""Options that several commands share, and what `train` and `compare` do with them before anything expensive begins."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apportion.cli.errors import about
from apportion.errors import InputError

if TYPE_CHECKING:
    from apportion.features.job import Job
    from apportion.features.run import PreparedStore
    from apportion.models import LanguageModel

_DATA, _TRAINING, _MACHINE = "Data", "Training", "Machine and files"

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="smollm2, minilm, a folder with a transformers model, or a Hugging Face id."),
]
SiteName = Annotated[
    str | None,
    typer.Option(
        "--site", help="Where to listen, such as layers.9.residual; default the middle of the residual stream."
    ),
]
Budget = Annotated[float, typer.Option(help="Features a token may use, on average.")]
Features = Annotated[
    int | None, typer.Option(help="Size of the dictionary; default 8 times the model's width.", show_default=False)
]
Seed = Annotated[int, typer.Option(min=0, help="Of the initial directions and the order of the data.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]

Text = Annotated[
    str,
    typer.Option(help="english, code, a file, a folder or a glob pattern in quotes.", rich_help_panel=_DATA),
]
Dataset = Annotated[
    str | None,
    typer.Option(metavar="ID", help="A Hugging Face data set instead (needs `datasets`).", rich_help_panel=_DATA),
]
Tokens = Annotated[int, typer.Option(help="Tokens to harvest.", rich_help_panel=_DATA)]
Context = Annotated[int, typer.Option(help="Tokens a context.", rich_help_panel=_DATA)]
StoreDtype = Annotated[
    str, typer.Option(help="Of the activations on disk: bfloat16 or float32.", rich_help_panel=_DATA)
]
HeldOut = Annotated[
    float,
    typer.Option(
        help="Share of the text that training does not see: half sets thresholds, half measures quality.",
        rich_help_panel=_DATA,
    ),
]
Store = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Where the activations are or shall be; default a folder of the cache, shared by runs on the same data.",
        rich_help_panel=_DATA,
        show_default=False,
    ),
]
Steps = Annotated[
    int | None, typer.Option(help="Optimiser steps; default what --epochs takes.", rich_help_panel=_TRAINING)
]
Epochs = Annotated[float, typer.Option(help="Passes over the training tokens.", rich_help_panel=_TRAINING)]
BatchSize = Annotated[
    int | None,
    typer.Option(help="Tokens a step; default 4096, or fewer on little text.", rich_help_panel=_TRAINING),
]
LearningRate = Annotated[
    float | None,
    typer.Option(help="Peak; default 2e-4 / sqrt(features / 16384).", rich_help_panel=_TRAINING),
]
Auxiliary = Annotated[
    str | None,
    typer.Option(
        help="What to revive: zipf (underused features), dead, or none; default by rule.", rich_help_panel=_TRAINING
    ),
]
Precision = Annotated[str, typer.Option(help="Of the encoder product: float32 or bfloat16.", rich_help_panel=_TRAINING)]
TensorBoard = Annotated[
    bool, typer.Option("--tensorboard", help="Also log for TensorBoard.", rich_help_panel=_TRAINING)
]
CheckpointEvery = Annotated[
    int | None,
    typer.Option(help="Steps between checkpoints; default a twentieth of the run.", rich_help_panel=_TRAINING),
]
LossContexts = Annotated[
    int, typer.Option("--contexts", min=1, help="Held-out contexts to measure the model's loss on.")
]
ModelDtype = Annotated[
    str, typer.Option(help="float32, bfloat16, or auto (bfloat16 where it is fast).", rich_help_panel=_MACHINE)
]
Device = Annotated[str, typer.Option(help="A torch device: cpu, cuda, cuda:1 ...", rich_help_panel=_MACHINE)]
MeshShape = Annotated[
    str | None,
    typer.Option(
        "--mesh",
        metavar="DATAxFEATURE",
        help="Under torchrun: how many processes share the tokens and how many the features, such as 4x16; default all "
        "share the tokens.",
        rich_help_panel=_MACHINE,
        show_default=False,
    ),
]


@dataclass(frozen=True)
class DataOptions:
    """What `train` and `compare` are told about the data."""

    model: str
    site: str | None
    text: str
    dataset: str | None
    tokens: int
    context: int
    store_dtype: str
    model_dtype: str
    held_out: float
    store: Path | None
    device: str
    gradients: str | None = None
    target: str | None = None

    def prepare(self, check: Callable[[int], Any], job: "Job | None" = None) -> "tuple[LanguageModel, PreparedStore]":
        """Check everything that can be checked, then find or harvest the activations.

        Args:
            check: refuses recipes that cannot work, given the width of the activations.
            job: the processes that harvest them, if there are several.
        """
        from apportion.data.files import check_writable
        from apportion.features.run import ActivationSource, check_text, prepare_store
        from apportion.models import Site, load

        if self.dataset is not None and self.text != "english":
            raise InputError(f"--dataset {self.dataset} and --text {self.text}: give one of them")
        text = self.text if self.dataset is None else f"hf:{self.dataset}"
        if self.store_dtype not in ("bfloat16", "float32"):
            raise InputError(f"--store-dtype {self.store_dtype}: one of bfloat16, float32")
        if self.gradients not in (None, "label", "sampled"):
            raise InputError(f"--gradient-target {self.gradients}: one of label, sampled")
        if self.target is not None and self.site is None:
            raise InputError(
                f"--target {self.target} needs --site: say what the transcoder reads, such as layers.9.mlp_in"
            )
        for option, name in (("--site", self.site), ("--target", self.target)):
            if name is not None:
                with about(option):
                    Site.parse(name)
        with about("--text" if self.dataset is None else "--dataset"):
            check_text(text)
        if self.store is not None:
            with about("--store"):
                check_writable(self.store)
        with about("MODEL"):
            lm = load(self.model, self.model_dtype, self.device)
        site = Site.parse(self.site or f"layers.{lm.n_layers // 2}.residual")
        with about("--site"):
            site.resolve(lm.model)
        if self.target is not None:
            with about("--target"):
                Site.parse(self.target).resolve(lm.model)
        source = ActivationSource(
            self.model,
            str(site),
            text,
            self.tokens,
            self.context,
            self.store_dtype,  # type: ignore[arg-type]
            self.model_dtype,
            self.held_out,
            self.gradients,  # type: ignore[arg-type]
            self.target,
        )
        check(site.width(lm))
        return lm, prepare_store(source, lm=lm, folder=self.store, job=job)


def default_out(model: str, *parts: str) -> Path:
    """Where results go if nobody says."""
    return Path("runs") / "-".join([Path(model).name, *parts])

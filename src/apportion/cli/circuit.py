"""``apportion circuit``: what on a prompt makes a transcoder feature fire, or a next token likely."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apportion.cli import options as given
from apportion.cli.errors import about
from apportion.cli.output import answer, show
from apportion.errors import InputError

if TYPE_CHECKING:
    from apportion.features import Transcoder
    from apportion.features.circuit_graph import Circuit, Node
    from apportion.features.run import TrainedRun
    from apportion.models import LanguageModel
    from apportion.report.circuit import FeatureNote

_SEARCH = "Search"
_TOKENS_NAMED = 6
_NAMED_FEATURES = 200


def circuit(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of transcoder runs, one for each layer.")
    ],
    prompt: Annotated[str, typer.Option(help="The text.")],
    feature: Annotated[
        int | None,
        typer.Option(help="Explain this feature (of the highest layer, or of --layer); default a logit.", min=0),
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Of --feature.", show_default=False)] = None,
    logit: Annotated[
        str | None,
        typer.Option(help="Explain the logit of this next token; default the likeliest.", show_default=False),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Less the logit of this one; default the mean of all.", show_default=False)
    ] = None,
    at: Annotated[
        int | None, typer.Option(help="Position of the token to look at; default the last one.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where circuit.html and circuit.json go; default the first run.", show_default=False
        ),
    ] = None,
    search: Annotated[
        str, typer.Option(help="greedy (the paper's) or influence (circuit-tracer's).", rich_help_panel=_SEARCH)
    ] = "greedy",
    iterations: Annotated[int, typer.Option(min=1, help="Steps of the greedy search.", rich_help_panel=_SEARCH)] = 3,
    branches: Annotated[int, typer.Option(min=1, help="Paths it keeps at each.", rich_help_panel=_SEARCH)] = 15,
    node_share: Annotated[float, typer.Option(help="Influence that nodes cover.", rich_help_panel=_SEARCH)] = 0.8,
    edge_share: Annotated[float, typer.Option(help="Influence that edges cover.", rich_help_panel=_SEARCH)] = 0.98,
    ln: Annotated[str, typer.Option(help="How norms are passed: exact or scalar.", rich_help_panel=_SEARCH)] = "exact",
    json: given.Json = False,
) -> None:
    """Take a feature or a logit apart, on a prompt, into the features, heads and tokens that it comes from.

    Example: [cyan]apportion circuit runs/layer9 runs/layer5 --prompt "The war lasted from 1732 to 17"[/cyan]
    """
    from apportion.data.files import check_writable, write_json
    from apportion.features.circuit_graph import Node
    from apportion.features.transcoder_circuits import greedy_circuit, influence_circuit
    from apportion.models import load
    from apportion.report import token_texts
    from apportion.report.circuit import write_circuit

    started = time.perf_counter()
    for name, value, choices in (("--search", search, ("greedy", "influence")), ("--ln", ln, ("exact", "scalar"))):
        if value not in choices:
            raise InputError(f"{name} {value}: one of {', '.join(choices)}")
    if feature is not None and (logit is not None or against is not None):
        raise InputError("--feature with --logit or --against: choose one thing to explain")
    place = out or runs[0]
    with about("--out" if out else "RUN"):
        check_writable(place)
    model_name, _, transcoders = _opened(runs)
    # Sums of thousands of terms: in bfloat16 they would not come out even.
    lm = load(model_name, "float32")
    ids = _tokens(lm, prompt)
    token = len(ids) - 1 if at is None else at
    if not 0 <= token < len(ids):
        raise InputError(f"--at {at}: the prompt has {len(ids)} tokens, 0 to {len(ids) - 1}")
    if feature is not None:
        root = Node("feature", token, max(transcoders) if layer is None else layer, feature)
    else:
        root = Node(
            "logit", token, None, _next_token(lm, ids, token) if logit is None else _entry(lm, logit, "--logit")
        )
    less = None if against is None else _entry(lm, against, "--against")
    if search == "greedy":
        found = greedy_circuit(
            lm,
            ids,
            transcoders,
            root,
            iterations=iterations,
            branches=branches,
            against=less,
            ln=ln,  # type: ignore[arg-type]
        )
    else:
        found = influence_circuit(
            lm,
            ids,
            transcoders,
            root,
            node_share=node_share,
            edge_share=edge_share,
            against=less,
            ln=ln,  # type: ignore[arg-type]
        )
    texts = token_texts(lm.tokenizer)
    shown = texts(ids.tolist())
    vocabulary = {root.index: texts([root.index])[0]} if root.kind == "logit" and root.index is not None else {}
    content = {**found.to_json(), "prompt": prompt, "tokens": shown, "runs": [str(each) for each in runs]}
    write_json(place / "circuit.json", content)
    write_circuit(
        place / "circuit.html",
        found,
        shown,
        title=_title(root, shown, vocabulary),
        summary={
            "model": model_name,
            "transcoders": ", ".join(f"layer {each}" for each in sorted(transcoders)),
            "search": search,
            "value of the root": found.nodes[root].value,
        },
        notes=_notes(lm, found, transcoders),
        vocabulary=vocabulary,
    )
    if json:
        from apportion.studies import machine

        answer(
            {
                "command": "circuit",
                "runs": [str(each) for each in runs],
                "circuit": content,
                "files": [str(place / "circuit.html"), str(place / "circuit.json")],
                "seconds": round(time.perf_counter() - started, 2),
                "machine": machine(),
            }
        )
        return
    show(_table(found, shown), "", f"{place / 'circuit.html'}: open it in a browser")


def _opened(runs: Sequence[Path]) -> "tuple[str, str, dict[int, Transcoder]]":
    """The model and the transcoders of some runs."""
    from apportion.features import Transcoder
    from apportion.features.run import open_run
    from apportion.models import Site

    transcoders: dict[int, Transcoder] = {}
    models: dict[str, tuple[str, str]] = {}
    for folder in runs:
        run: TrainedRun = open_run(folder)
        source: Any = run.settings.get("source")
        if not isinstance(run.sae, Transcoder) or not source:
            raise InputError(f"{folder} is no run of a transcoder: train one with `apportion train MODEL --target ...`")
        site, target = Site.parse(source["site"]), Site.parse(source["target"])
        if (site.kind, target.kind) != ("mlp_in", "mlp_out") or site.layer != target.layer or site.layer is None:
            raise InputError(f"{folder} maps {site} to {target}: circuits need layers.L.mlp_in to layers.L.mlp_out")
        if site.layer in transcoders:
            raise InputError(f"{folder} is of layer {site.layer}, which another run has already: give one run a layer")
        transcoders[site.layer] = run.sae
        models[run.settings["provenance"]["store"]["model"]] = (source["model"], source["model_dtype"])
    if len(models) > 1:
        names = ", ".join(sorted({name for name, _ in models.values()}))
        raise InputError(f"these runs are of different models ({names}): give runs of one model")
    (name, dtype), *_ = models.values()
    return name, dtype, transcoders


def _tokens(lm: "LanguageModel", prompt: str) -> Any:
    """The prompt as the store's contexts are: without special tokens but for one that the tokeniser puts first."""
    import torch

    ids = lm.tokenizer(prompt)["input_ids"]
    if not ids:
        raise InputError("--prompt is empty: give a text")
    return torch.tensor(ids)


def _entry(lm: "LanguageModel", text: str, option: str) -> int:
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise InputError(
            f"{option} {text!r} is {len(ids)} tokens: give one, with the space in front of it if it has one"
        )
    return int(ids[0])


def _next_token(lm: "LanguageModel", ids: Any, token: int) -> int:
    import torch

    if not lm.is_causal:
        raise InputError(f"{lm.name} predicts no next token: choose a --feature to explain")
    with torch.no_grad():
        return int(lm.model(input_ids=ids[None]).logits[0, token].argmax())


def _title(root: "Node", tokens: Sequence[str], vocabulary: dict[int, str]) -> str:
    from apportion.report.circuit import visible

    after = visible(tokens[root.token])
    if root.kind == "feature":
        return f"Why feature {root.index} of layer {root.layer} fires at {after}"
    return f"Why {visible(vocabulary[root.index or 0])} after {after}"


def _notes(
    lm: "LanguageModel", found: "Circuit", transcoders: "dict[int, Transcoder]"
) -> "dict[tuple[int, int], FeatureNote]":
    """What the features of a circuit promote and what excites them, by their weights."""
    from apportion.features.de_embedding import de_embedding
    from apportion.features.logit_lens import logit_lens
    from apportion.report import token_texts
    from apportion.report.circuit import FeatureNote

    texts, notes = token_texts(lm.tokenizer), {}
    by_size = sorted(found.nodes, key=lambda node: -abs(found.nodes[node].value))
    places = list(dict.fromkeys(node.place for node in by_size if node.kind == "feature"))[:_NAMED_FEATURES]
    unembedding, gain = lm.unembedding()[0].float(), lm.final_norm_gain()
    for layer, transcoder in transcoders.items():
        features = [feature for at, feature in places if at == layer]
        if not features:
            continue
        weight = transcoder.decoder_weight.detach()[features]
        lens = logit_lens(weight, unembedding, final_norm_weight=gain, top=_TOKENS_NAMED)
        exciting = de_embedding(lm, layer, transcoder, features).topk(_TOKENS_NAMED).indices
        for row, feature in enumerate(features):
            notes[layer, feature] = FeatureNote(texts(lens.promoted_ids[row].tolist()), texts(exciting[row].tolist()))
    return notes


def _table(found: "Circuit", tokens: Sequence[str]) -> Any:
    """What goes into the root, largest first."""
    from rich.table import Table
    from rich.text import Text

    from apportion.report.circuit import visible

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("into the root")
    table.add_column("at")
    table.add_column("contribution", justify="right")
    for node, value in sorted(found.into(found.root).items(), key=lambda each: -abs(each[1])):
        name = str(node).split(" at ")[0].split(",")[0]
        table.add_row(name, Text(visible(tokens[node.reads_at])), f"{value:+.4g}")
    table.add_row("pruned", "", f"{found.nodes[found.root].pruned:+.4g}")
    table.add_row(
        Text(str(found.root), style="bold"),
        Text(visible(tokens[found.root.token])),
        f"{found.nodes[found.root].value:.4g}",
    )
    return table

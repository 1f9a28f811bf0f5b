"""``apportion steer``: what does a model write while some features of it are held up, fixed or silenced?"""

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apportion.cli import options as given
from apportion.cli.errors import about
from apportion.cli.output import answer, show
from apportion.errors import InputError

if TYPE_CHECKING:
    from apportion.features import SparseAutoencoder
    from apportion.models import LanguageModel, Site

_EDITS, _WRITING, _WHERE = "Edits", "Writing", "Where"


def steer(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a run, or of a dictionary that one has written.")
    ],
    prompt: Annotated[list[str], typer.Option(metavar="TEXT", help="What the model goes on from; may be repeated.")],
    feature: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N=STRENGTH", help="Add to the code of feature N; may be repeated.", rich_help_panel=_EDITS
        ),
    ] = None,
    clamp: Annotated[
        list[str] | None,
        typer.Option(metavar="N=VALUE", help="Set the code of feature N; may be repeated.", rich_help_panel=_EDITS),
    ] = None,
    ablate: Annotated[
        list[int] | None,
        typer.Option(metavar="N", help="Set the code of feature N to 0; may be repeated.", rich_help_panel=_EDITS),
    ] = None,
    keep_error: Annotated[
        bool,
        typer.Option(help="Keep what the dictionary does not explain of an activation.", rich_help_panel=_EDITS),
    ] = True,
    positions: Annotated[
        str, typer.Option(help="Which tokens to edit: all, prompt, generated or last.", rich_help_panel=_WHERE)
    ] = "all",
    skip_first: Annotated[
        bool,
        typer.Option(help="Leave the first token alone, where models park attention.", rich_help_panel=_WHERE),
    ] = True,
    site: Annotated[
        str | None,
        typer.Option(help="Another site of the same width; default the dictionary's own.", rich_help_panel=_WHERE),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Another model; default the one it was trained on.", rich_help_panel=_WHERE),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.", rich_help_panel=_WRITING)] = 40,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 takes the likeliest token; 0.8 draws.", rich_help_panel=_WRITING)
    ] = 0.0,
    seeds: Annotated[
        int, typer.Option(min=1, help="Texts a prompt, each of another seed.", rich_help_panel=_WRITING)
    ] = 1,
    seed: Annotated[int, typer.Option(min=0, help="The first of them.", rich_help_panel=_WRITING)] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's turn of a chat.", rich_help_panel=_WRITING)
    ] = False,
    json: given.Json = False,
    device: given.Device = "cpu",
) -> None:
    """Let a model go on from a prompt, plain and with some features edited, side by side.

    Strengths are in the units of the code: find a feature and how strongly it fires in `apportion report RUN`, and
    begin with about its largest activation. Far above that the model writes nonsense whatever the feature. What the
    dictionary does not explain is kept, so that without an edit nothing changes.

    Example: [cyan]apportion steer runs/first --feature 2301=8 --prompt "I went home and"[/cyan]
    """
    from apportion.features import steering
    from apportion.features.run import open_run
    from apportion.models import Site, load
    from apportion.models.generate import generate

    started = time.perf_counter()
    with about("--positions"):
        steering.check_positions(positions)
    opened = open_run(run, device)
    sae = opened.sae
    with about("--feature"):
        strengths = steering.checked_values(sae, _pairs(feature), "strength")
    with about("--clamp"):
        values = steering.checked_values(sae, _pairs(clamp), "value")
    with about("--ablate"):
        silenced = steering.checked_features(sae, ablate or [])
    twice = sorted(each for each in strengths if each in values or each in silenced)
    twice += sorted(each for each in values if each in silenced)
    if twice:
        raise InputError(f"feature {twice[0]} is edited twice: give one of --feature, --clamp and --ablate for it")
    source = opened.settings.get("source", {})
    if (model or source.get("model")) is None or (site or source.get("site")) is None:
        raise InputError(f"{run} does not say which model and site it belongs to: give --model and --site")
    with about("--site"):
        place = Site.parse(site or source["site"])
    # A transcoder reads at one site and writes at another.
    written = Site.parse(source["target"]) if source.get("target") else place
    with about("--model" if model else "RUN"):
        lm = load(model or source["model"], source.get("model_dtype", "float32"), device)

    edit = steering.in_turn(
        steering.adding(strengths), steering.setting(values), steering.setting(dict.fromkeys(silenced, 0.0))
    )
    options = {"keep_error": keep_error, "positions": positions, "skip_first": skip_first, "output_site": written}

    def edited() -> contextlib.AbstractContextManager[None]:
        if strengths and not values and not silenced:
            return sae.steer(lm, place, strengths, **options)
        return steering.edit_codes(lm, place, sae, edit, **options)  # type: ignore[arg-type]

    texts: list[dict[str, Any]] = []
    for number in range(seed, seed + seeds):
        writing: dict[str, Any] = {"tokens": tokens, "temperature": temperature, "seed": number, "chat": chat}
        plain = generate(lm, prompt, **writing)
        with edited():
            steered = generate(lm, prompt, **writing)
        texts += [
            {"prompt": each, "seed": number, "plain": before, "steered": after}
            for each, before, after in zip(prompt, plain, steered, strict=True)
        ]
        if not temperature:
            break  # The likeliest token is the same whatever the seed.
    features = _features(sae, lm, written, strengths, values, silenced)
    divergences = _divergences(lm, prompt, chat, edited)
    if json:
        from apportion.report import ResultRow
        from apportion.studies import machine

        n = len(divergences)
        mean = sum(divergences) / n
        error = (sum((each - mean) ** 2 for each in divergences) / (n - 1) / n) ** 0.5 if n > 1 else None
        answer(
            {
                "command": "steer",
                "run": str(run),
                "site": str(place),
                "seeds": sorted({each["seed"] for each in texts}),
                "features": features,
                "texts": texts,
                "rows": [ResultRow(run.name, "next_token_kl", mean, error, n).as_dict()],
                "seconds": round(time.perf_counter() - started, 2),
                "machine": machine(),
            }
        )
        return
    show(*_lines(features), "", _table(texts), "", _effect(prompt, divergences))


def _pairs(given: list[str] | None) -> dict[int, float]:
    pairs: dict[int, float] = {}
    for each in given or []:
        name, equals, value = each.partition("=")
        try:
            if not equals:
                raise ValueError
            number, amount = int(name), float(value)
        except ValueError as error:
            raise InputError(f"{each!r}: write a feature and a number, such as 2301=8") from error
        if number in pairs:
            raise InputError(f"feature {number} is given twice: give it once")
        pairs[number] = amount
    return pairs


def _features(
    sae: "SparseAutoencoder",
    lm: "LanguageModel",
    site: "Site",
    strengths: dict[int, float],
    values: dict[int, float],
    silenced: list[int],
) -> list[dict[str, Any]]:
    """What is edited, where each feature begins to fire, and what it says about the next token."""
    from apportion.allocate import TokenChoice
    from apportion.cli.reporting import speaks_tokens
    from apportion.features.logit_lens import logit_lens

    edits = [(each, "add", amount) for each, amount in strengths.items()]
    edits += [(each, "clamp", value) for each, value in values.items()]
    edits += [(each, "ablate", 0.0) for each in silenced]
    if not edits:
        return []
    numbers = [each for each, _, _ in edits]
    # Under TopK it is the other features that decide.
    thresholds = (
        [None] * len(edits) if isinstance(sae.rule, TokenChoice) else sae.inference_threshold()[numbers].tolist()
    )
    promoted: list[list[str] | None] = [None] * len(edits)
    if speaks_tokens(lm, site):
        lens = logit_lens(
            sae.decoder_weight.detach()[numbers],
            lm.unembedding()[0].float(),
            final_norm_weight=lm.final_norm_gain(),
            top=5,
        )
        promoted = [[lm.tokenizer.decode([token]) for token in row] for row in lens.promoted_ids.tolist()]
    return [
        {"feature": each, "edit": how, "value": amount, "fires_above": threshold, "promotes": tokens}
        for (each, how, amount), threshold, tokens in zip(edits, thresholds, promoted, strict=True)
    ]


def _divergences(lm: "LanguageModel", prompts: list[str], chat: bool, edited: Any) -> list[float]:
    """Kullback-Leibler divergence, in nats, of the edited from the plain prediction after each prompt."""
    import torch

    from apportion.models.generate import encode_prompts

    def predictions() -> torch.Tensor:
        with torch.no_grad():
            return torch.cat(
                [
                    lm.model(**encode_prompts(lm, [each], chat=chat)).logits[:, -1].float().log_softmax(-1)
                    for each in prompts
                ]
            )

    plain = predictions()
    with edited():
        after = predictions()
    return [float(each) for each in (plain.exp() * (plain - after)).sum(-1)]


def _lines(features: list[dict[str, Any]]) -> list[Any]:
    from rich.text import Text

    if not features:
        return [Text("no feature is edited: give --feature, --clamp or --ablate")]
    what = {"add": "{value:+g}", "clamp": "set to {value:g}", "ablate": "silenced"}
    lines = []
    for each in features:
        known = [] if each["fires_above"] is None else [f"fires above {each['fires_above']:.3g}"]
        if each["promotes"]:
            known.append("promotes " + " ".join(map(repr, each["promotes"])))
        line = f"feature {each['feature']}: {what[each['edit']].format(**each)}"
        lines.append(Text(f"{line} ({'; '.join(known)})" if known else line))
    return lines


def _table(texts: list[dict[str, Any]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold", show_lines=True)
    for name in ("prompt", "plain", "steered"):
        table.add_column(name, overflow="fold", ratio=1)
    for each in texts:
        table.add_row(*(Text(each[name]) for name in ("prompt", "plain", "steered")))
    return table


def _effect(prompts: list[str], divergences: list[float]) -> str:
    named = ", ".join(f"{each:.3g}" for each in divergences)
    return f"Divergence of the next token after the prompt{'s' * (len(prompts) > 1)}: {named} nats"

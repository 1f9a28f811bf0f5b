"""``apportion explore``: follow a feature's value through a prompt, in a file or live."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apportion.cli import options as given
from apportion.cli.errors import about
from apportion.cli.output import answer, show, tell
from apportion.errors import InputError

if TYPE_CHECKING:
    from apportion.features.run import TrainedRun
    from apportion.report.explorer import Explorer


def explore(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a run, or of a dictionary that one has written.")
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", metavar="TEXT", help="A text to explore; repeat for more.", show_default=False),
    ] = None,
    upstream: Annotated[
        list[Path] | None,
        typer.Option(
            "--upstream",
            metavar="RUN",
            help="A dictionary of another site of the same model, to name features upstream; repeat for more.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Default explore.html in the run's folder.", show_default=False)
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Explore what you type, in a browser on this machine.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of --serve; 0 takes a free one.")] = 8484,
    json: given.Json = False,
    device: given.Device = "cpu",
) -> None:
    """Follow a feature's value back to heads, source positions and features upstream, prompt by prompt.

    For dictionaries of a layer's heads (layers.L.heads), of the residual stream, of attn_out and of mlp_in. Writes a
    page that opens from the disk, with your prompts and some of ours; or, with --serve, shows one where you type them.

    Example: [cyan]apportion explore runs/heads --upstream runs/residual --prompt "Mary gave John a"[/cyan]
    """
    from apportion.data.files import check_writable
    from apportion.report.explorer import DEFAULT_PROMPTS, write_explorer

    started = time.perf_counter()
    place = out or run / "explore.html"
    explorer = _explorer(run, upstream or [], device)
    prompts = list(dict.fromkeys([*(prompt or []), *DEFAULT_PROMPTS]))
    for each in prompt or []:
        with about("--prompt"):
            explorer.attribution(each)
    if serve:
        if json or out is not None:
            raise InputError("--serve shows a page and writes none: leave out --json and --out")
        _serve(explorer, prompts[: max(1, len(prompt or []))], run, port)
        return
    with about("--out" if out else "RUN"):
        check_writable(place.parent)
    write_explorer(place, explorer, prompts)
    if json:
        from apportion.studies import machine

        answer(
            {
                "command": "explore",
                "run": str(run),
                "page": str(place),
                "bytes": place.stat().st_size,
                "site": str(explorer.site),
                "prompts": prompts,
                "seconds": round(time.perf_counter() - started, 2),
                "machine": machine(),
            }
        )
        return
    show(f"{place} ({place.stat().st_size / 2**20:.1f} MiB): open it in a browser")


def _explorer(run: Path, upstream: list[Path], device: str) -> "Explorer":
    """The run's dictionary and those upstream, with their model; checks all of it before the model is loaded."""
    from apportion.features.attention_attribution import check_site
    from apportion.features.run import open_run
    from apportion.models import Site, load
    from apportion.report.explorer import Explorer

    opened = []
    for option, folder in [("RUN", run), *(("--upstream", each) for each in upstream)]:
        with about(option):
            found = open_run(folder, device)
            source = _source(found)
            check_site(Site.parse(source["site"]))
            opened.append((option, found, source))
    _, _, source = opened[0]
    dictionaries = {}
    for option, found, other in opened:
        site = Site.parse(other["site"])
        if other["model"] != source["model"]:
            raise InputError(
                f"{option}: {found.folder} is of {other['model']}, {run} of {source['model']}: give one of the "
                "same model"
            )
        if site in dictionaries:
            raise InputError(f"{option}: there are two dictionaries for {site}: give one for each site")
        dictionaries[site] = found.sae
    # Whatever the activations were harvested in: sums of parts need the digits of float32.
    lm = load(source["model"], "float32", device)
    title = f"{Path(source['model']).name} · {source['site']} · prompts"
    return Explorer(lm, Site.parse(source["site"]), dictionaries, title)


def _source(run: "TrainedRun") -> dict[str, str]:
    if "source" not in run.settings:
        raise InputError(
            f"{run.folder} does not say which activations it was trained on: it was not made by `apportion train`"
        )
    source: dict[str, str] = run.settings["source"]
    return source


def _serve(explorer: "Explorer", prompts: list[str], run: Path, port: int) -> None:
    from apportion.report.server import explorer_server

    with explorer_server(explorer, prompts, port, run / "report.html") as server:
        tell(f"http://127.0.0.1:{server.server_port}/ is ready: open it in a browser on this machine; Ctrl-C ends it")
        server.serve_forever()

"""The command line: `preflab list | verify | run | report | conform`.

Exit codes: 0 all claims verified and every control caught, or a trainer conforms; 1 something was refuted,
inconclusive, a control slipped through, or a trainer does not conform; 2 wrong usage or input; 130 interrupted.
Numerical libraries are imported inside the commands, so that help and version answer at once.
"""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from . import __version__
from .bridge_cli import bridge, report_run
from .terminal import FAILED, OK, make_console, progress_bar, reported, single_threaded
from .terminal import INTERRUPTED as INTERRUPTED
from .terminal import USAGE as USAGE

if TYPE_CHECKING:
    from .llm_bridge.conformance import Report
    from .theory.claim import Plan
    from .theory.runner import ClaimResult

app = typer.Typer(
    name="preflab",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run the theorems of RLHF: verify papers' claims against exact worlds, with controls that must be caught.",
    epilog="Start with: preflab list   then: preflab verify --quick",
)


app.add_typer(bridge)


class Topic(StrEnum):
    claims = "claims"
    envs = "envs"
    algorithms = "algorithms"
    losses = "losses"


class Backend(StrEnum):
    local = "local"
    ray = "ray"


def _version(asked: bool) -> None:
    if asked:
        print(f"preflab {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


# ---- list ----------------------------------------------------------------------------------------------------


@app.command("list", epilog="Example: preflab list claims --json")
def list_(
    topic: Annotated[Topic | None, typer.Argument(help="What to list; without it, everything.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the claims, worlds (envs), algorithms and losses that there are."""
    single_threaded()
    from .theory import registry
    from .theory.report import to_json

    data: dict[str, Any] = {}
    with reported():
        if topic in (None, Topic.claims):
            data["claims"] = [
                {
                    "claim": claim.name,
                    "kind": claim.kind,
                    "title": claim.title,
                    "controls": [control.name for control in claim.controls],
                }
                for claim in registry.load_claims().values()
            ]
        if topic in (None, Topic.envs):
            data["envs"] = registry.world_names()
        if topic in (None, Topic.algorithms):
            data["algorithms"] = [
                {
                    "name": spec.name,
                    "title": spec.title,
                    "paper": spec.paper,
                    "settings": list(spec.setting_names),
                    "presets": list(spec.presets),
                }
                for spec in registry.load_algorithms().values()
            ]
        if topic in (None, Topic.losses):
            data["losses"] = [
                {
                    "name": spec.name,
                    "title": spec.title,
                    "paper": spec.paper,
                    "inputs": list(spec.inputs),
                    "parameters": list(spec.parameters),
                }
                for spec in registry.load_losses().values()
            ]
    if as_json:
        print(to_json(data), end="")
    else:
        _print_lists(data)


def _print_lists(data: dict[str, Any]) -> None:
    from rich.table import Table

    console = make_console()
    headings = {
        "claims": ("Claims, for: preflab verify CLAIM", ("claim", "kind", "title", "controls")),
        "envs": ("Worlds, for: gymnasium.make(ENV) and preflab run ALGORITHM ENV", ("env",)),
        "algorithms": ("Algorithms, for: preflab run ALGORITHM ENV", ("name", "title", "paper", "presets")),
        "losses": (
            "Losses, for: from preflab.algorithms.NAME import LOSS",
            ("name", "title", "inputs", "parameters"),
        ),
    }
    for topic, rows in data.items():
        heading, columns = headings[topic]
        table = Table(*columns)
        for row in rows:
            values = [row] if isinstance(row, str) else [row[column] for column in columns]
            table.add_row(*(escape(v if isinstance(v, str) else ", ".join(v)) for v in values))
        console.print(heading, style="bold")
        console.print(table)


# ---- verify and report ---------------------------------------------------------------------------------------


@app.command(
    epilog="Examples: preflab verify --quick   ·   preflab verify pr_lsvi   ·   "
    "preflab verify pr_lsvi.query_rule --seeds 50 --out reports/query_rule"
)
def verify(
    claims: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CLAIM",
            help="PAPER or PAPER.STATEMENT; without any, all claims.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes: a first look in two or three minutes.")
    ] = False,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Seeds a claim.", show_default="as each claim asks")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=0, help="Worker processes; 0 = in this process.", show_default="one a CPU"),
    ] = None,
    backend: Annotated[Backend, typer.Option(help="Where cells run.")] = Backend.local,
    out: Annotated[Path, typer.Option(help="Folder of the results; run again with it to go on.")] = Path(
        "reports/verify"
    ),
    json_file: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE", help="Write the verdicts as JSON too; - = standard output."),
    ] = None,
) -> None:
    """Check claims and their controls, and write a report.

    Exit code: 0 when all claims are verified and every control is caught, 1 when not, 2 on wrong usage.

    Finished cells stay in the --out folder: a stopped run goes on where it stood, several processes may share it.
    """
    single_threaded()
    from .theory import registry, runner
    from .theory.cells import code_fingerprint
    from .theory.claim import Plan
    from .theory.store import Store

    with reported(lambda: f"Finished cells are kept in {out}; the same command goes on from there."):
        chosen = registry.select_claims(claims or [])
        if not chosen:
            raise ValueError("there are no claims to verify")
        _check_json_target(json_file)
        plan = Plan(quick=quick, seeds=seeds)
        with Store.open(out) as store:
            request = {"claims": [claim.name for claim in chosen], "quick": quick, "seeds": seeds}
            store.note("request", request | {"code": code_fingerprint()})
            cells = runner.expand(chosen, plan)
            kept = len(cells) - len(store.missing(cells))
            words = f"{len(chosen)} claims, {len(cells)} cells" + (
                f", {kept} of them finished before" if kept else ""
            )
            make_console(stderr=True).print(f"{words} -> {escape(str(out))}", soft_wrap=True)
            with progress_bar("cells") as progress:
                results = runner.run_claims(
                    chosen, plan, store, jobs=jobs, backend=backend.value, progress=progress
                )
        _conclude(results, plan, out, json_file)


@app.command(epilog="Examples: preflab report reports/verify   ·   preflab report runs/first")
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The --out folder of a verify, or of a bridge train.")
    ],
    json_file: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE", help="Write the verdicts as JSON too; - = standard output."),
    ] = None,
) -> None:
    """Rewrite the report from what a folder holds, also of an unfinished run. Judges claims again; computes no cell."""
    single_threaded()
    if (folder / "run.json").is_file():
        report_run(folder, json_file)
        return
    from .theory import registry, runner
    from .theory.cells import code_fingerprint
    from .theory.claim import Plan
    from .theory.store import Store

    with reported():
        _check_json_target(json_file)
        with Store.open(folder, create=False) as store:
            request = store.noted("request")
            if request is None:
                raise ValueError(
                    f"{folder} holds cells but no verify asked for them; run preflab verify --out {folder}"
                )
            if request["code"] != code_fingerprint():
                raise ValueError(
                    f"{folder} was computed by other code than this; its report stays as it is. "
                    f"Run preflab verify --out {folder} for a new one."
                )
            plan = Plan(quick=request["quick"], seeds=request["seeds"])
            results = runner.judge_claims(registry.select_claims(request["claims"]), plan, store)
        _conclude(results, plan, folder, json_file)


def _check_json_target(target: str | None) -> None:
    from .theory.store import check_writable

    if target is not None and target != "-":
        check_writable(Path(target).parent)
        if Path(target).is_dir():
            raise ValueError(f"--json {target} is a folder; give a file")


def _conclude(results: list[ClaimResult], plan: Plan, folder: Path, json_file: str | None) -> None:
    """Write the report, show the verdicts, and exit with their code."""
    from .theory.report import as_data, summary, to_json, write_report, write_text

    page = write_report(results, plan, folder)
    if json_file == "-":
        print(to_json(as_data(results, plan)), end="")
    elif json_file is not None:
        write_text(Path(json_file), to_json(as_data(results, plan)))
    console = make_console(stderr=json_file == "-")
    _print_verdicts(console, results)
    console.print(escape(summary(results)), style="bold", soft_wrap=True)
    console.print(f"Report: {escape(str(page))}", soft_wrap=True)
    raise typer.Exit(OK if all(result.ok for result in results) else FAILED)


def _print_verdicts(console: Console, results: list[ClaimResult]) -> None:
    from rich.table import Table

    from .theory.report import number

    colours = {"verified": "green", "refuted": "red", "inconclusive": "yellow"}
    table = Table("claim", "kind", "verdict", "controls caught", "statistic", "threshold", "seeds", "seconds")
    for result in results:
        judgement = result.judgement
        caught, n = sum(control.caught for control in result.controls), len(result.controls)
        table.add_row(
            result.claim.name,
            result.claim.kind,
            f"[{colours[judgement.verdict]}]{judgement.verdict}[/]",
            f"[{'green' if caught == n else 'red'}]{caught} of {n}[/]",
            number(judgement.statistic),
            number(judgement.threshold),
            str(result.seeds),
            f"{result.seconds:.1f}",
        )
    console.print(table)
    for result in results:
        if result.judgement.verdict != "verified":
            text = f"{result.claim.name} is {result.judgement.verdict}: {result.judgement.detail}"
            console.print(escape(text), soft_wrap=True)
        for control in result.controls:
            if not control.caught:
                text = f"{result.claim.name}: control {control.name} was not caught ({control.detail})"
                console.print(escape(text), soft_wrap=True)
        for error in result.errors:
            console.print(escape(error), style="red", soft_wrap=True)


# ---- run -----------------------------------------------------------------------------------------------------


@app.command(
    epilog="Example: preflab run pr_lsvi RandomLinearMDP --episodes 2000 --set eps=0.1 --set env.d=8 --out runs/first"
)
def run(
    algorithm: Annotated[str, typer.Argument(help="An algorithm of: preflab list algorithms")],
    env: Annotated[str, typer.Argument(help="A world of: preflab list envs")],
    episodes: Annotated[
        int, typer.Option(min=1, help="Episodes in all, those of an earlier start included.")
    ] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of learner, world and annotator.")] = 0,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A setting; env.KEY for the world's. May be repeated."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for checkpoint, episodes.csv and figure; run again with it to go on."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the totals as JSON.")] = False,
) -> None:
    """Run one algorithm in one world, answered by a Bradley-Terry annotator, with exact regret."""
    single_threaded()
    from .theory import registry, single_run
    from .theory.report import finite, to_json
    from .theory.store import check_writable

    again = (
        f"The last checkpoint is kept in {out}; the same command goes on from there."
        if out
        else "Nothing was kept."
    )
    with reported(lambda: again):
        known = registry.load_algorithms()
        spec = known[registry.find("algorithm", algorithm, known)]
        world = registry.find("env", env, registry.world_names())
        given = single_run.parse_pairs(settings or [])
        if out is not None:
            check_writable(out)
        asked, state, had = single_run.start_run(spec, world, given, seed, out)
        if had:
            make_console(stderr=True).print(f"going on from episode {had}")
        with progress_bar("episodes") as progress:
            single_run.advance(state, episodes, out, progress)
        totals = single_run.summarise(state) if out is None else single_run.write_run(asked, state, out)
    if as_json:
        print(to_json(finite(totals)), end="")
        return
    console = make_console()
    for name, value in totals.items():
        console.print(f"{name.replace('_', ' ')}: {value:.6g}")
    if out is not None:
        console.print(f"Results: {escape(str(out))}", soft_wrap=True)


# ---- conform -------------------------------------------------------------------------------------------------


@app.command(
    epilog="Examples: preflab conform dpo   ·   preflab conform planted:dpo_token_mean   ·   "
    "preflab conform 'trl:dpo[ipo]'   ·   preflab conform my_trainer:loss --against dpo --set beta=0.2   ·   "
    "preflab conform my_trainer:Adapter --levels 2,3   ·   preflab conform 'preflab:loop[dpo]'"
)
def conform(
    trainer: Annotated[
        str | None,
        typer.Argument(
            help="MODULE:NAME of yours, a loss or a whole trainer; a loss of ours, preflab:TRAINER, planted:BUG, or "
            "trl:dpo[LOSS_TYPE].",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="The objective that it names, such as dpo.",
            show_default="as the trainer's name says, else dpo",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A parameter of the objective. May be repeated."),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Of relative errors of a loss, of a whole trainer's log-probabilities in nats.",
            show_default="1e-5 for a loss, by the number format for a trainer",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the exact world.")] = 0,
    levels: Annotated[
        str | None,
        typer.Option(
            metavar="2,3,5,6",
            help="Whole trainers: the levels to check.",
            show_default="all that the adapter allows",
        ),
    ] = None,
    world: Annotated[
        str | None,
        typer.Option(help="Whole trainers: tiny, table, gpt2 or llama.", show_default="tiny"),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Whole trainers: float64, float32 or bfloat16, of the world's models; the tolerance follows.",
            show_default="float64",
        ),
    ] = None,
    draws: Annotated[
        int | None,
        typer.Option(help="Whole trainers: draws a prompt, for the sampling law.", show_default="2000"),
    ] = None,
    runs: Annotated[
        int | None,
        typer.Option(help="Whole trainers: runs from different seeds at level 5.", show_default="10"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    listing: Annotated[bool, typer.Option("--list", help="Show what there is, and stop.")] = False,
) -> None:
    """Hold a trainer to what can be enumerated: a loss, or a whole trainer that samples, scores and trains.

    A loss is held to an exact objective by its expected gradient and its fixed point (levels 1 and 4). A whole trainer
    is a class or function of a world: its draws (2), its log-probabilities (3), runs (5), and invariances (6).

    Exit code: 0 when it conforms, 1 when not, 2 on wrong usage. A failed check names the likely cause.
    """
    single_threaded()
    from .theory.report import to_json

    with reported():
        if listing:
            _print_trainers(as_json)
            return
        if trainer is None:
            raise ValueError("no trainer is given; see: preflab conform --list")
        report = _conformed(
            trainer, against, _parameters(settings or []), tolerance, seed, levels, world, dtype, draws, runs
        )
    if as_json:
        print(to_json(report.as_data()), end="")
    else:
        make_console().print(escape(str(report)), soft_wrap=True)
    raise typer.Exit(OK if report.ok else FAILED)


def _conformed(
    trainer: str,
    against: str | None,
    given: dict[str, float],
    tolerance: float | None,
    seed: int,
    levels: str | None,
    world: str | None,
    dtype: str | None,
    draws: int | None,
    runs: int | None,
) -> Report:
    from .llm_bridge.conformance import conform_trainer, trainers, whole_names

    whole = whole_names.find_whole(trainer)
    of_whole = {"world": world, "dtype": dtype, "draws": draws, "runs": runs}
    if whole is not None:
        if against is not None or given:
            raise ValueError(
                f"{trainer} is a whole trainer, which says itself what it is against and with which parameters: leave "
                "--against and --set out"
            )
        return conform_trainer(
            whole,
            name=trainer,
            levels=whole_names.read_levels(levels),
            tolerance=tolerance,
            seed=seed,
            **{name: value for name, value in of_whole.items() if value is not None},  # type: ignore[arg-type]
        )
    for name, value in {"levels": levels, **of_whole}.items():
        if value is not None:
            raise ValueError(
                f"--{name} is for whole trainers, and {trainer} is a loss (levels 1 and 4): leave it out"
            )
    return trainers.run_trainer(trainers.find_trainer(trainer, against, given), tolerance, seed)


def _parameters(pairs: list[str]) -> dict[str, float]:
    found = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        try:
            found[key] = float(value)
        except ValueError:
            raise ValueError(f"--set {pair!r} is not KEY=NUMBER") from None
    return found


def _print_trainers(as_json: bool) -> None:
    from .llm_bridge.conformance import TARGETS, trainers
    from .llm_bridge.conformance.whole_names import whole_names
    from .theory.report import to_json

    targets = {
        t.name: {"title": t.title, "kind": t.kind, "parameters": dict(t.defaults)} for t in TARGETS.values()
    }
    if as_json:
        print(to_json({"targets": targets, "trainers": trainers.names(), "whole": whole_names()}), end="")
        return
    from rich.table import Table

    console = make_console()
    table = Table("against", "title", "fed with", "parameters")
    for name, row in targets.items():
        given = ", ".join(f"{key}={value:g}" for key, value in TARGETS[name].defaults.items())
        table.add_row(name, str(row["title"]), str(row["kind"]), given)
    console.print("Objectives, for: preflab conform TRAINER --against OBJECTIVE", style="bold")
    console.print(table)
    console.print("Trainers, for: preflab conform TRAINER", style="bold")
    console.print(escape("  ".join(trainers.names())))
    console.print("Whole trainers, for: preflab conform TRAINER --levels 2,3,5,6", style="bold")
    console.print(escape("  ".join(whole_names())))


def main() -> None:
    """The console script."""
    sys.exit(app())

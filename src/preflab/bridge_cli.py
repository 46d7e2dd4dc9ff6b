"""`preflab bridge lattice | train`: language models on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from .terminal import make_console, progress_bar, reported

if TYPE_CHECKING:
    from .llm_bridge.models import OpenModel

bridge = typer.Typer(
    name="bridge",
    no_args_is_help=True,
    help="Language models: exact lattices of them, and training by the methods that are verified on tables.",
    epilog="Start with: preflab bridge train --list",
)

Model = Annotated[str, typer.Option(help="smollm2, or a folder of save_pretrained.")]
SHIPPED = "questions"
PROMPTS = "A file of prompts (.jsonl, .json, .parquet, .txt), or 'questions': eight that are shipped."
Plain = Annotated[
    bool, typer.Option("--plain", help="Texts are continued as they are, without the model's chat template.")
]
SCALES = {"sentiment": 0.2}  # lies in [0, 1]: at 1 the best text would beat the worst in 73 of 100 questions
Scale = Annotated[
    float | None,
    typer.Option(
        help="A judge of rewards prefers by sigma of their difference / SCALE.",
        show_default="0.2 for sentiment, which lies in [0, 1]; else 1",
    ),
]
JudgeName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="sentiment, readability, ...; MODULE:FUNCTION of yours; reward-model:FOLDER; language-model:FOLDER.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]


@contextmanager
def _said(resume: Callable[[], str] = lambda: "") -> Iterator[None]:
    """`reported`, also for what does not fit and for packages that are missing."""
    with reported(resume):
        try:
            yield
        except (MemoryError, ImportError, ArithmeticError) as error:
            raise ValueError(str(error)) from error


@contextmanager
def _bars() -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """(what) -> (done, total): one bar after another; a bar opens when it is first used and closes the one before."""
    with ExitStack() as stack:

        def bar(what: str) -> Callable[[int, int], None]:
            opened: list[Callable[..., None]] = []

            def advance(done: int, total: int) -> None:
                if not opened:
                    stack.close()
                    opened.append(stack.enter_context(progress_bar(what)))
                opened[0](done, total)

            return advance

        yield bar


# ---- lattice ---------------------------------------------------------------------------------------------------------


@bridge.command(
    epilog="Example: preflab bridge lattice --prompts questions -k 3 --horizon 4 --judge sentiment --out world.npz"
)
def lattice(
    prompts: Annotated[str, typer.Option(metavar="FILE", help=PROMPTS)],
    model: Model = "smollm2",
    plain: Plain = False,
    k: Annotated[int, typer.Option("-k", min=1, help="Tokens kept at each prefix, beside the end.")] = 4,
    horizon: Annotated[int, typer.Option(min=1, help="Largest number of tokens of a response.")] = 4,
    first: Annotated[int | None, typer.Option(min=1, help="Take the first so many prompts.")] = None,
    judge: JudgeName = None,
    scale: Scale = None,
    beta: Annotated[float, typer.Option(help="Of the KL-regularised optimum, with a judge.")] = 0.1,
    out: Annotated[
        Path | None, typer.Option(help="Write the world: .npz, for load_language_world.", show_default=False)
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(help="Folder for finished layers; run again with it to go on.", show_default=False),
    ] = None,
    memory: Annotated[float, typer.Option(min=0.001, help="GiB for tables and caches.")] = 4.0,
    batch: Annotated[int, typer.Option(min=1, help="Prefixes read in one call of the model.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32, float64 or bfloat16.")] = "float32",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Cut a language model down to an exactly known token MDP: k tokens a step and the end, H steps.

    Prints its size, how much of the model's own law it keeps, and with a judge the exact value and optimum.
    """
    again = f"Finished layers are kept in {folder}; the same command goes on from there." if folder else ""
    with _said(lambda: again):
        from .llm_bridge.lattice import check_size
        from .llm_bridge.models import open_model
        from .llm_bridge.training import summary

        _check_prompts(prompts)
        _check_targets(out, folder)
        scale = _scale(judge, scale)
        limit = int(memory * 2**30)
        check_size(1, k, horizon, limit)  # what can never fit is said before the model is loaded
        opened = open_model(model, dtype=dtype, device=device)
        ids = _read_prompts(prompts, opened, plain, horizon)[:first]
        size = check_size(len(ids), k, horizon, limit)
        asked = None if judge is None else _judge(judge, opened.tokenizer, scale, device)
        with _bars() as bar:
            found = _lattice(opened, ids, k, horizon, batch, limit, bar("prefixes"), folder)
            judged = summary.judge_lattice(
                found, asked, "kl_policy_gradient", {"beta": beta}, progress=bar("answers of the judge")
            )
        data = _lattice_data(judged, opened, size._asdict(), beta)
        if out is not None:
            _write_world(out, judged, data)
            data["out"] = str(out)
    _print_json(data) if as_json else _print_lattice(data)


def _lattice(
    opened: OpenModel,
    prompts: Sequence[Sequence[int]],
    k: int,
    horizon: int,
    batch: int,
    memory: int,
    progress: Callable[..., None],
    folder: Path | None,
) -> Any:
    from .llm_bridge.lattice import lattice as make

    return make(
        opened.policy,
        prompts,
        k,
        horizon,
        banned=opened.banned,
        pieces=opened.pieces,
        texts=[opened.readable(x) for x in prompts],
        batch=batch,
        memory=memory,
        progress=progress,
        save=folder,
        name=f"{opened.name}, {k} tokens a step",
    )


def _lattice_data(judged: Any, opened: OpenModel, size: Mapping[str, int], beta: float) -> dict[str, Any]:
    from .llm_bridge.training import summary

    found, world = judged.lattice, judged.world
    data: dict[str, Any] = {
        "model": opened.name,
        "prompts": [opened.readable(x) for x in found.prompts],
        "k": world.branching,
        "horizon": world.horizon,
        **size,
        "kept_smallest": float(min(x.min() for x in found.kept)),
        "reference": summary.policy_numbers(judged),
        "likeliest": summary.likeliest(judged, judged.law()),
        "judge": judged.judge,
    }
    if judged.judge is not None:
        law = judged.law() if judged.optimum is None else judged.optimum.law
        data["best"] = summary.best_responses(judged, law)
    if judged.optimum is not None:
        numbers = judged.numbers(judged.optimum.law)
        data["optimum"] = {
            "beta": beta,
            **numbers,
            "regularised_value": numbers["value"] - beta * numbers["kl"],
        }
    return data


def _write_world(out: Path, judged: Any, data: Mapping[str, Any]) -> None:
    import numpy as np

    from . import __version__
    from .envs.language_world import save_language_world
    from .llm_bridge.training.summary import as_language_world

    used = np.unique(np.concatenate([x.ravel() for x in judged.lattice.ids]))
    provenance = {
        "preflab": __version__,
        **{name: data[name] for name in ("model", "k", "horizon", "judge", "kept_smallest")},
        "covered": data["reference"]["covered"],
        "prompt_ids": [list(x) for x in judged.lattice.prompts],
        "end_ids": list(judged.lattice.end_ids),
        "token_ids": [int(i) for i in used],
    }
    save_language_world(as_language_world(judged.lattice, judged.rewards, provenance), out)


def _print_lattice(data: Mapping[str, Any]) -> None:
    from rich.table import Table

    console, ref = make_console(), data["reference"]
    console.print(
        f"{escape(str(data['model']))}: {len(data['prompts'])} prompts, k = {data['k']}, horizon = {data['horizon']}: "
        f"{data['prefixes']:,} prefixes, {data['leaves']:,} responses, {data['bytes'] / 2**20:.1f} MiB of tables",
        soft_wrap=True,
    )
    console.print(
        f"of the model's own texts {ref['covered']:.1%} lie on the lattice; the smallest share kept at a prefix is "
        f"{data['kept_smallest']:.1%}; entropy {ref['entropy']:.3f} nats",
        soft_wrap=True,
    )
    optimum = data.get("optimum")
    names = ("value", "win_rate", "exploitability", "kl", "entropy")
    if data["judge"] is not None:
        sides = [
            ("the model", ref),
            *([(f"optimum at beta = {optimum['beta']:g}", optimum)] if optimum else []),
        ]
        table = Table(f"judged by {data['judge']}", *(escape(name.replace("_", " ")) for name in names))
        for words, side in sides:
            table.add_row(words, *("" if side.get(n) is None else f"{side[n]:.4f}" for n in names))
        console.print(table)
    table = Table(
        "likeliest response",
        "probability",
        "the judge's best",
        "reward or wins",
        "probability",
        "at the optimum",
    )
    for row, best in zip(data["likeliest"], data.get("best") or [{}] * len(data["likeliest"]), strict=True):
        score = best.get("reward", best.get("wins"))
        cells = [
            escape(_last_line(row["text"])),
            f"{row['probability']:.3f}",
            escape(_last_line(best.get("text", ""))),
        ]
        cells += ["" if score is None else f"{score:.3f}"]
        cells += ["" if best.get(n) is None else f"{best[n]:.2g}" for n in ("reference", "policy")]
        table.add_row(*cells)
    console.print(table)
    if "out" in data:
        console.print(f"World: {escape(data['out'])}", soft_wrap=True)


def _last_line(text: str) -> str:
    """A response with the opening that it continues, without the question above it."""
    return text.rpartition("\n")[2] or text


# ---- train -----------------------------------------------------------------------------------------------------------


@bridge.command(
    epilog="Example: preflab bridge train nash_md --prompts questions --judge sentiment --lora 8 --out runs/first"
)
def train(
    method: Annotated[
        str | None, typer.Argument(help="A method of: preflab bridge train --list", show_default=False)
    ] = None,
    model: Model = "smollm2",
    prompts: Annotated[str | None, typer.Option(metavar="FILE", help=PROMPTS, show_default=False)] = None,
    plain: Plain = False,
    records: Annotated[
        Path | None, typer.Option(help="Comparisons, for methods that learn from them.", show_default=False)
    ] = None,
    judge: JudgeName = None,
    scale: Scale = None,
    lora: Annotated[
        int | None, typer.Option(min=1, help="Train a LoRA adapter of this rank.", show_default="all weights")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps in all, those of an earlier start included.")] = 40,
    batch: Annotated[int, typer.Option(min=1, help="Rows a step.")] = 24,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Rows in one backward pass.", show_default="all of the batch")
    ] = None,
    horizon: Annotated[int, typer.Option(min=1, help="Largest number of tokens of a completion.")] = 6,
    rate: Annotated[
        float | None,
        typer.Option(help="Learning rate.", show_default="1e-3 with --lora, else 1e-5"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A parameter of the method (beta, tau, ...), or a setting of the loop. May be repeated.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run; run again with it to go on.")] = Path(
        "runs/bridge"
    ),
    resume: Annotated[
        bool, typer.Option("--resume", help="Refuse to begin: there must be a run to go on with.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of draws, labels, order, and the adapter.")] = 0,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float64.")] = "float32",
    lattice: Annotated[
        str, typer.Option(metavar="K,H", help="Of the exact numbers: tokens a step, and steps.")
    ] = "3,4",
    watch: Annotated[int, typer.Option(min=0, help="Steps between exact numbers; 0 = before and after.")] = 5,
    drawn: Annotated[int, typer.Option(min=0, help="Completions drawn a prompt before and after.")] = 8,
    as_json: Json = False,
    listing: Annotated[bool, typer.Option("--list", help="Show the methods, and stop.")] = False,
) -> None:
    """Train a language model by a method, with exact numbers on a lattice of the first prompts before and after.

    The folder of --out gets the run's files, report.html, and the trained adapter (or model). The same command again
    goes on from the last checkpoint.
    """
    if listing:
        with _said():
            _print_methods(as_json)
        return
    with _said(lambda: f"The last checkpoint is kept in {out}; the same command goes on from there."):
        from .llm_bridge.models import open_model, with_lora
        from .llm_bridge.run_report import read_run, summary, write_run_report
        from .llm_bridge.training.methods import find_method
        from .llm_bridge.training.watched import Texts, Watch, train_watched

        if method is None:
            raise ValueError("no method is given; see: preflab bridge train --list")
        found = find_method(method)
        parameters, options = _split(settings or [], found)
        k, h = _pair(lattice)
        watched = Watch(k=k, horizon=h, every=watch, samples=drawn)
        checked = _settings(
            options,
            steps=steps,
            batch=batch,
            micro_batch=micro_batch,
            horizon=horizon,
            learning_rate=rate if rate is not None else 1e-3 if lora else 1e-5,
            seed=seed,
            mixed_precision="bf16" if dtype == "bfloat16" else "no",
            device="cpu" if device == "cpu" else None,
        )
        found.checked(parameters)
        _check_input(found, prompts, records, judge)
        _check_prompts(prompts)
        _check_file(records, "--records")
        scale = _scale(judge, scale)
        goes_on = (out / "run.json").exists()
        if resume and not goes_on:
            raise ValueError(f"{out} holds no run to go on with: leave --resume out, or give its folder")
        asked = {
            "model": model,
            "prompts": prompts,
            "plain": plain,
            "records": None if records is None else str(records),
            "judge": judge,
            "scale": scale,
            "lora": lora,
            "dtype": dtype,
            "lattice": f"{k},{h}",
        }
        _ask(out, asked, goes_on)
        weights = "float32" if dtype == "bfloat16" and lora is None else dtype
        opened = open_model(model, dtype=weights, device=device, micro_batch=micro_batch or batch)
        policy = opened.policy if lora is None else with_lora(opened.policy, lora, seed)
        ids = None if prompts is None else _read_prompts(prompts, opened, plain, horizon)
        rows = None if records is None else _read_records(records, opened)
        asks = None if judge is None else _judge(judge, opened.tokenizer, scale, device)
        distinct = list(dict.fromkeys(map(tuple, ids or [r.prompt for r in rows or ()])))
        texts = Texts(opened.decode, opened.pieces, opened.banned, [opened.readable(x) for x in distinct])
        words = f"{found.name}: {checked.steps} steps of {checked.batch}"
        make_console(stderr=True).print(f"{words} -> {escape(str(out))}", soft_wrap=True)
        with _bars() as bar, _stopped(out) as reached:
            advance = bar("steps")

            def on_step(row: dict[str, Any]) -> None:
                reached.append(row["step"])
                advance(row["step"], checked.steps)

            result = train_watched(
                policy,
                found.name,
                folder=out,
                judge=asks,
                prompts=ids,
                records=rows,
                settings=checked,
                parameters=parameters,
                watch=watched,
                texts=texts,
                resume=goes_on,
                on_step=on_step,
                progress=bar,
            )
        kept = _keep(result.policy.model, opened.tokenizer, out, lora is not None)
        page = write_run_report(out)
        run = read_run(out)
    if as_json:
        _print_json(
            {"folder": str(out), "report": str(page), "kept": kept, "summary": summary(run), **_totals(run)}
        )
        return
    console = make_console()
    console.print(escape(summary(run)), style="bold", soft_wrap=True)
    _print_exact(run)
    for words, what in (("Trained weights", kept), ("Report", str(page))):
        if what is not None:
            console.print(f"{words}: {escape(what)}", soft_wrap=True)


@contextmanager
def _stopped(folder: Path) -> Iterator[list[int]]:
    """Takes the numbers of the steps that were made; an error after one of them says what the folder keeps."""
    reached: list[int] = []
    try:
        yield reached
    except (ValueError, ArithmeticError) as error:
        if not reached:
            raise
        from .llm_bridge.training.checkpoints import last_checkpoint

        last = last_checkpoint(folder / "checkpoints")
        kept = (
            "no checkpoint yet (--set checkpoint_every=N)" if last is None else f"the checkpoint {last.name}"
        )
        raise ValueError(
            f"{error}. {folder} keeps {kept} and all numbers up to step {reached[-1]}, which preflab report shows; the "
            "same command would end here again: take a smaller --rate, or --dtype float32, and another --out"
        ) from error


def _split(pairs: list[str], method: Any) -> tuple[dict[str, float], dict[str, Any]]:
    """--set: what is a parameter of the method, and what a setting of the loop."""
    import dataclasses

    from .llm_bridge.training.settings import TrainSettings
    from .theory.registry import UnknownName
    from .theory.single_run import parse_pairs

    own = [*method.parameters, *method.sampler]
    loop = [field.name for field in dataclasses.fields(TrainSettings)]
    parameters: dict[str, float] = {}
    options: dict[str, Any] = {}
    for key, value in parse_pairs(pairs).items():
        if key in own:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"--set {key}={value} is not a number")
            parameters[key] = float(value)
        elif key in loop:
            options[key] = value
        else:
            raise UnknownName("setting", key, [*own, *loop], f"{method.name} has {', '.join(own)}.")
    return parameters, options


def _settings(options: Mapping[str, Any], **given: Any) -> Any:
    from .llm_bridge.training.settings import TrainSettings

    defaults: dict[str, Any] = {"checkpoint_every": 10, "sample_prompts": 8}
    values = defaults | given | dict(options)
    if isinstance(values.get("adam_betas"), list):
        values["adam_betas"] = tuple(values["adam_betas"])
    try:
        return TrainSettings(**values)
    except TypeError as error:
        raise ValueError(f"--set: {error}") from None


def _pair(text: str) -> tuple[int, int]:
    try:
        k, h = (int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--lattice {text!r} is not of the form K,H, such as 3,4") from None
    return k, h


def _check_input(method: Any, prompts: str | None, records: Path | None, judge: str | None) -> None:
    if method.samples:
        if records is not None:
            raise ValueError(
                f"{method.name} draws its own responses: give --prompts and --judge, not --records"
            )
        if prompts is None:
            raise ValueError(f"{method.name} draws responses to prompts: give --prompts FILE")
        if judge is None:
            raise ValueError(f"{method.name} asks a judge for {method.asks}: give --judge NAME")
    elif records is None:
        raise ValueError(f"{method.name} learns from comparisons: give --records FILE")
    elif prompts is not None:
        raise ValueError(
            f"{method.name} learns from its records, which hold the prompts: leave --prompts out"
        )


def _ask(folder: Path, asked: dict[str, Any], goes_on: bool) -> None:
    """Note what was asked for; ValueError where the folder's run was asked for otherwise."""
    from .llm_bridge.run_report import ASKED
    from .theory.report import to_json, write_text
    from .theory.store import check_writable

    check_writable(folder)
    path = folder / ASKED
    if goes_on and path.is_file():
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise ValueError(f"{path} is damaged; choose another folder with --out") from None
        others = [f"{n}: {held.get(n)} there, {asked[n]} asked" for n in asked if held.get(n) != asked[n]]
        if others:
            raise ValueError(
                f"{folder} holds another run ({'; '.join(others)}); choose another folder with --out"
            )
    write_text(path, to_json(asked))


def _keep(model: Any, tokenizer: Any, out: Path, adapter: bool) -> str | None:
    """The trained adapter, or the whole model, as save_pretrained writes them; None where the model cannot."""
    import os
    import shutil

    if not hasattr(model, "save_pretrained"):
        return None
    target = out / ("adapter" if adapter else "model")
    aside = out / f".{target.name}.{os.getpid()}.part"
    # Only layers have adapters; whether the embeddings have grown, peft would look up in the base model's folder.
    options = {"save_embedding_layers": False} if adapter else {}
    try:
        model.save_pretrained(aside, safe_serialization=True, **options)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        if target.exists():
            shutil.rmtree(target)
        aside.replace(target)
    finally:
        if aside.exists():
            shutil.rmtree(aside)
    return str(target)


def _totals(run: Any) -> dict[str, Any]:
    exact = run.exact
    return {
        "steps": run.steps,
        "before": exact.get("before"),
        "after": exact.get("after"),
        "optimum": exact.get("optimum"),
        "drawn": {
            side: {k: v for k, v in run.drawn[side].items() if k not in ("rewards", "shown")}
            for side in ("before", "after")
        }
        if run.drawn
        else None,
    }


def _print_exact(run: Any) -> None:
    from rich.table import Table

    from .llm_bridge.run_report import EXACT_ROWS

    exact = run.exact
    sides = [exact["before"], exact.get("after") or {}, exact.get("optimum") or {}]
    table = Table("exactly, on the lattice", "before", "after", "optimum")
    for name, words, _ in EXACT_ROWS:
        if sides[0].get(name) is not None:
            table.add_row(words, *("" if s.get(name) is None else f"{s[name]:.4f}" for s in sides))
    make_console().print(table)


def _print_methods(as_json: bool) -> None:
    from rich.table import Table

    from .llm_bridge.training.methods import METHODS, describe

    rows = [describe(method) for method in METHODS.values()]
    if as_json:
        _print_json({"methods": rows})
        return
    table = Table("method", "title", "rounds", "draws", "asks for", "parameters")
    for row in rows:
        given = ", ".join(f"{name}={value:g}" for name, value in row["parameters"].items())
        cells = [row["name"], row["title"], row["rounds"], ", ".join(row["draws"]), row["asks"] or "", given]
        table.add_row(*(escape(cell) for cell in cells))
    console = make_console()
    console.print("Methods, for: preflab bridge train METHOD", style="bold")
    console.print(table)


# ---- report ----------------------------------------------------------------------------------------------------------


def report_run(folder: Path, json_file: str | None) -> None:
    """The report of a training run; `json_file` as in `preflab report`."""
    with reported():
        from .llm_bridge.run_report import as_data, is_run_folder, read_run, summary, write_run_report
        from .theory.report import to_json, write_text

        if not is_run_folder(folder):
            raise ValueError(
                f"{folder} is a folder of preflab run, which has no report: see its episodes.csv"
            )
        page, run = write_run_report(folder), read_run(folder)
        if json_file == "-":
            print(to_json(as_data(run)), end="")
        elif json_file is not None:
            write_text(Path(json_file), to_json(as_data(run)))
    console = make_console(stderr=json_file == "-")
    console.print(escape(summary(run)), style="bold", soft_wrap=True)
    console.print(f"Report: {escape(str(page))}", soft_wrap=True)


# ---- what both share -------------------------------------------------------------------------------------------------


def _scale(judge: str | None, scale: float | None) -> float:
    return SCALES.get(judge or "", 1.0) if scale is None else scale


def _judge(name: str, tokenizer: Any, scale: float, device: str) -> Any:
    from .llm_bridge.training.judges import named_judge, text_judge
    from .llm_bridge.training.model_judges import FOLDER_JUDGES, folder_judge

    module, colon, function = name.partition(":")
    if not colon:
        return named_judge(name, tokenizer, scale=scale)
    if tokenizer is None:
        raise ValueError(f"judge {name!r} reads texts, and the model's folder has no tokenizer")
    if module in FOLDER_JUDGES:
        return folder_judge(module, function, tokenizer, scale=scale, device=device)
    from .llm_bridge.conformance.trainers import imported

    return text_judge(name, imported(module, function, "(text) -> number"), tokenizer, scale=scale)


def _read_prompts(name: str, opened: OpenModel, plain: bool, horizon: int) -> list[tuple[int, ...]]:
    """The prompts of a file as token ids; "questions": the eight of `envs.language_model`, with their openings."""
    from .envs.language_model import QUESTIONS, context
    from .llm_bridge.training.records import read_prompts

    if name == SHIPPED:
        if opened.language_model is None or getattr(opened.tokenizer, "chat_template", None) is None:
            raise ValueError(f"--prompts {SHIPPED} needs a tokenizer with a chat template: give a file")
        return [tuple(context(opened.language_model, question)) for question in QUESTIONS]
    chat = not plain and getattr(opened.tokenizer, "chat_template", None) is not None
    room = None if opened.policy.context is None else opened.policy.context - horizon
    return read_prompts(name, opened.tokenizer, chat=chat, context=room)


def _read_records(path: Path, opened: OpenModel) -> list[Any]:
    from .llm_bridge.training.records import read_records

    ends = opened.policy.end_ids
    return list(read_records(path, opened.tokenizer, end_ids=ends, context=opened.policy.context))


def _check_prompts(name: str | None) -> None:
    if name is not None and name != SHIPPED:
        _check_file(Path(name), "--prompts")


def _check_file(path: Path | None, option: str) -> None:
    if path is not None and not path.exists():
        raise ValueError(f"{option} {path} is not there")


def _check_targets(out: Path | None, folder: Path | None) -> None:
    from .theory.store import check_writable

    if folder is not None:
        check_writable(folder)
    if out is not None:
        if out.is_dir():
            raise ValueError(f"--out {out} is a folder; give a file such as world.npz")
        check_writable(out.parent)


def _print_json(data: Any) -> None:
    from .theory.report import finite, to_json

    print(to_json(finite(data)), end="")

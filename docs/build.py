"""What the pages show that a computer can make: figures, and tables of worlds, claims, losses and planted bugs.

python docs/build.py            draws docs/figures/regret.png (a minute) and bridge_first.png, and rewrites the tables
python docs/build.py --tables   only the tables
python docs/build.py --check    writes nothing; exit code 1 when a table is out of date
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent / "src"))  # a checkout needs no install

FIGURE = DOCS / "figures" / "regret.png"
RUN_FIGURE, RUN = DOCS / "figures" / "bridge_first.png", DOCS.parent / "notebooks" / "smollm2_nash_md"
VARIANTS: dict[str, dict[str, Any]] = {
    "asks by its rule": {"eps": 0.3},
    "asks at random, as often": {"eps": 0.3},  # with the query rate of the first
    "hardly randomised, asks at every difference": {"eps": 0.0, "c_r": 0.05},
}

# ---- the figure ------------------------------------------------------------------------------------------------


def regret_curves(episodes: int, seeds: int) -> dict[str, tuple[np.ndarray, float]]:
    """label -> (cumulative regret (seeds, episodes), mean number of labels), on the tokens of the language model."""
    from preflab.algorithms.pr_lsvi import PRLSVI, Settings
    from preflab.envs import BradleyTerry, load_language_world

    world = load_language_world()
    rate = None
    curves = {}
    for label, given in VARIANTS.items():
        changes = given | ({"query_rate": rate} if "random," in label else {})
        settings = Settings.scaled(world, transitions="known", **changes)
        records = []
        for seed in range(seeds):
            annotator = BradleyTerry(world, np.random.SeedSequence([seed, 1]), keep_log=False)
            records.append(PRLSVI(world, annotator, settings, seed).advance(episodes).records)
        queries = float(np.mean([r["queried"].sum() for r in records]))
        rate = queries / episodes if rate is None else rate
        curves[label] = np.cumsum([r["regret"] for r in records], axis=1), queries
    return curves


def draw_regret(path: Path, episodes: int = 4000, seeds: int = 8) -> None:
    """Cumulative regret against episodes: the mean thick, each seed thin."""
    import matplotlib
    from preflab.envs.comparisons import replace_file
    from preflab.theory import figures

    at = np.unique(np.linspace(1, episodes, 200).astype(int))
    picture = io.BytesIO()
    with matplotlib.rc_context(figures.STYLE):
        figure, axes = figures.canvas(7.2, 4.4)
        for i, (label, (regret, queries)) in enumerate(regret_curves(episodes, seeds).items()):
            colour, Y = figures.COLOURS[i], regret[:, at - 1]
            axes.plot(at, Y.T, color=colour, alpha=0.3, linewidth=0.8)
            axes.plot(
                at,
                Y.mean(axis=0),
                color=colour,
                marker=figures.MARKERS[i],
                markevery=20,
                linewidth=2.4,
                label=f"{label}: {queries:.0f} labels",
            )
        axes.set(xlabel="episodes", ylabel="regret so far", xlim=(0, episodes), ylim=(0, None))
        axes.set_title(f"PR-LSVI on the tokens of SmolLM2 ({seeds} seeds and their mean)")
        axes.legend(loc="upper left")
        figure.savefig(picture, format="png", dpi=130, metadata={"Software": None})
    replace_file(path, lambda file: file.write(picture.getvalue()))


def draw_run(path: Path) -> None:
    """The run of docs/bridge.md on SmolLM2, from its folder."""
    from preflab.envs.comparisons import replace_file
    from preflab.llm_bridge import run_report

    picture = io.BytesIO()
    figure = run_report.reward_against_kl(run_report.read_run(RUN))
    figure.savefig(picture, format="png", dpi=110, metadata={"Software": None})
    replace_file(path, lambda file: file.write(picture.getvalue()))


# ---- the tables ------------------------------------------------------------------------------------------------


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def worlds() -> str:
    """Every registered world with what its defaults give."""
    import gymnasium
    from preflab.algorithms.planning import value_iteration
    from preflab.envs.registration import WORLDS

    rows = []
    for name, world in WORLDS.items():
        model = gymnasium.make(name).unwrapped.model  # type: ignore[attr-defined]
        features = "-" if model.features is None else f"{model.features.dim}"
        defaults = ", ".join(f"{key}={value!r}" for key, value in world.kwargs.items()) or "-"
        rows.append(
            [
                f"`{name}`",
                f"`{world.factory.partition(':')[2]}`",
                f"`{defaults}`",
                f"{max(model.sizes[:-1])}",
                f"{model.n_actions}",
                f"{model.horizon}",
                features,
                f"{value_iteration(model).value:.4f}",
            ]
        )
    return table(["id", "function", "defaults", "S", "A", "H", "features", "V*"], rows)


def claims() -> str:
    """Every listed claim with its controls."""
    from preflab.theory.registry import load_claims

    return table(
        ["claim", "kind", "what it says", "controls"],
        [
            [
                f"`{claim.name}`",
                claim.kind,
                claim.title,
                ", ".join(f"`{control.name}`" for control in claim.controls),
            ]
            for claim in load_claims().values()
        ],
    )


def losses() -> str:
    """Every loss with its tensors, its parameters and where its claims are."""
    from preflab.theory.registry import load_claims, load_losses

    papers = {claim.paper for claim in load_claims().values()}
    return table(
        ["loss", "what it is", "tensors", "parameters", "claims"],
        [
            [
                f"`{spec.name}`",
                f"{spec.title}: {spec.paper}",
                ", ".join(spec.inputs),
                ", ".join(spec.parameters) or "-",
                f"`preflab verify {spec.name}`" if spec.name in papers else "-",
            ]
            for spec in load_losses().values()
        ],
    )


def planted_losses() -> str:
    """Bugs of losses, and the cause that conformance must name."""
    from preflab.llm_bridge.conformance.planted import PLANTED

    return table(
        ["bug", "against", "cause that is named", "met in"],
        [[f"`{name}`", bug.against, f"`{bug.cause}`", bug.thread] for name, bug in PLANTED.items()],
    )


def planted_trainers() -> str:
    """Bugs of whole trainers."""
    from preflab.llm_bridge.conformance.whole_names import PLANTED_TRAINERS

    return table(
        ["bug", "level", "cause that is named", "met in"],
        [
            [f"`{name}`", f"{bug.level}", f"`{bug.cause}`", bug.thread]
            for name, bug in PLANTED_TRAINERS.items()
        ],
    )


TABLES = {
    "worlds.md": [worlds],
    "claims.md": [claims],
    "methods.md": [losses],
    "conformance.md": [planted_losses, planted_trainers],
}


def with_tables(page: str, tables: list[str]) -> str:
    """A page with the lines between each pair of markers replaced."""
    begin, end = "<!-- made by docs/build.py -->\n", "<!-- end -->\n"
    head, *parts = page.split(begin)
    if len(parts) != len(tables) or not all(end in part for part in parts):
        raise ValueError(f"the page lacks the markers of its {len(tables)} tables")
    return head + "".join(
        begin + t + end + part.partition(end)[2] for t, part in zip(tables, parts, strict=True)
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python docs/build.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--tables", action="store_true", help="the tables alone")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 = a table is out of date")
    options = parser.parse_args(arguments)
    stale = []
    for name, makers in TABLES.items():
        page = (DOCS / name).read_text(encoding="utf-8")
        fresh = with_tables(page, [make() for make in makers])
        if fresh != page:
            stale.append(name)
            if not options.check:
                (DOCS / name).write_text(fresh, encoding="utf-8")
    if options.check:
        print(f"out of date: {', '.join(stale)}" if stale else "the tables are up to date")
        return int(bool(stale))
    if not options.tables:
        FIGURE.parent.mkdir(exist_ok=True)
        draw_regret(FIGURE)
        draw_run(RUN_FIGURE)
        print(f"drew {FIGURE.relative_to(DOCS.parent)} and {RUN_FIGURE.relative_to(DOCS.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

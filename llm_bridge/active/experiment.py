r"""Does it pay to choose which pairs are labelled? Win rate against labels, at equal budgets, on pools.

    python -m preflab.llm_bridge.active.experiment pool --seeds 100 --figure active_pool.png
    python -m preflab.llm_bridge.active.experiment lattice --seeds 40 --figure active_lattice.png
    python -m preflab.llm_bridge.active.experiment plane --seeds 40 --figure active_plane.png
    python -m preflab.llm_bridge.active.experiment thresholds --seeds 10 --rounds 600

All arms see as many prompts, write as many pairs, and buy as many labels: of the `batch` pairs of a round `buy` (fewer
only where fewer differ), until the budget is spent. Runs of one seed share the annotator's stream, so that arms are
compared seed by seed. What is reported, after every round, is the policy of the point estimate; its figures are exact
sums over the pool. `thresholds` runs the paper's own rule, which buys where the disagreement exceeds eps. `plane` cuts
the lattice's features to two, where the Bayesian posterior itself is a sum over a grid, and is one of the arms.

    disagreement   PR-LSVI: a posterior draw against the previous round's, pairs by the posterior's disagreement
    variance       the same draws; pairs by the variance over ten epistemic heads
    ensemble       ten heads in place of the posterior: draws, and the variance over heads
    uniform        PR-LSVI's pairs, bought at random
    double         two posterior draws of one round, pairs by disagreement
    passive        two responses of the reference, bought at random
    shuffled       the control: `disagreement`, with the rewards of each prompt dealt to its candidates at random
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...envs.comparisons import replace_file
from ...envs.kernels import Array
from ...envs.language_world import load_language_world
from ...theory.figures import COLOURS, INK, MARKERS, STYLE, mean_and_error
from .beliefs import Belief, Ensemble, RewardPosterior
from .features import principal_axes, within
from .learner import ActiveLearner, ActiveSettings, PoolAnnotator, prior_settings
from .pool import HELD_OUT, TRAINING, Pool, linear_fit, load_pool, with_linear_reward
from .quadrature import GridPosterior

SCALE = 0.25  # P(y > y') = sigma((sentiment - sentiment') / SCALE), on the pool and on the lattice
CONTROL = "shuffled"
MEASURES = ("win rate", "held out", "suboptimality", "regret")


def arms(
    settings: ActiveSettings, batch: int = 16, buy: int = 4, heads: int = 10
) -> dict[str, ActiveSettings]:
    """The arms of the module's text."""
    chosen = replace(settings, batch=batch, buy=buy)
    by_coin = replace(chosen, settings=replace(settings.settings, query_rate=buy / batch))
    return {
        "disagreement": chosen,
        "variance": replace(chosen, heads=heads, heads_draw=False),
        "ensemble": replace(chosen, heads=heads),
        "uniform": by_coin,
        "double": replace(chosen, comparator="draw"),
        "passive": replace(by_coin, player="reference", comparator="reference"),
        CONTROL: chosen,
    }


def shuffled(pool: Pool, seed: int) -> Pool:
    """Within each prompt the rewards belong to other candidates: answers that say nothing about the true reward."""
    rng, reward = np.random.default_rng([seed, 3]), pool.reward.copy()
    for x in range(pool.prompts):
        reward[pool.rows(x)] = rng.permutation(reward[pool.rows(x)])
    return replace(pool, reward=reward, theta=None)


def uninformed(pool: Pool, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Where every run starts: the win rate of the best candidate by a theta from the prior, and its standard error.

    It is not 1/2: what is best in some direction is far out, and such responses are not like all others.
    """
    rng = np.random.default_rng(seed)
    thetas = rng.standard_normal((draws, pool.dimension))
    rates = np.array([pool.win_rate(pool.greedy(pool.phi @ theta)) for theta in thetas])
    return float(rates.mean()), float(rates.std(ddof=1) / draws**0.5)


def run(
    pool: Pool,
    settings: ActiveSettings,
    seed: int,
    rounds: int,
    held_out: Pool | None = None,
    budget: int | None = None,
    *,
    answers: Pool | None = None,
    belief: Belief | None = None,
) -> dict[str, Array]:
    """One run: after each round, `labels` and the MEASURES, each (rounds,). The regret is per prompt, cumulative.

    answers  the pool whose rewards the annotator goes by, None = the same; belief: None = the settings' own
    """
    told = pool if answers is None else answers
    annotator = PoolAnnotator(told, np.random.SeedSequence([seed, 2]), budget=budget)
    learner = ActiveLearner(pool, annotator, settings, seed, belief=belief)
    found: dict[str, list[float]] = {name: [] for name in ("win rate", "held out", "suboptimality")}
    for _ in range(rounds):
        answer = learner.advance(1).answer
        found["win rate"].append(pool.win_rate(answer))
        found["suboptimality"].append(pool.optimal_value - pool.value(answer))
        if held_out is not None:
            theirs = held_out.phi @ learner.belief.theta
            policy = held_out.gibbs(theirs, settings.beta) if settings.beta else held_out.greedy(theirs)
            found["held out"].append(held_out.win_rate(policy))
    records = learner.records
    curves = {name: np.array(values) for name, values in found.items() if values}
    return curves | {"labels": records["labels"].astype(float), "regret": np.cumsum(records["regret"])}


@dataclass(frozen=True, eq=False)
class Comparison:
    """curves[arm][measure]: (seeds, rounds); limits[measure]: what the best policy would have."""

    curves: Mapping[str, Mapping[str, Array]]
    limits: Mapping[str, float]

    def at(self, arm: str, measure: str, labels: int) -> Array:
        """(seeds,) the measure when a run first had that many labels; at its end, if it found fewer worth asking."""
        bought = self.curves[arm]["labels"]
        at = np.where(bought[:, -1] >= labels, (bought >= labels).argmax(axis=1), bought.shape[1] - 1)
        return self.curves[arm][measure][np.arange(len(at)), at]

    def difference(self, arm: str, other: str, measure: str, labels: int) -> tuple[float, float]:
        """The mean over seeds of arm - other, paired by seed, and the half-width of its 95 % interval."""
        mean, error = mean_and_error(
            (self.at(arm, measure, labels) - self.at(other, measure, labels))[:, None]
        )
        return float(mean[0]), float(error[0])


def compare(
    pool: Pool,
    settings: Mapping[str, ActiveSettings],
    seeds: Sequence[int],
    rounds: int,
    held_out: Pool | None = None,
    budget: int | None = None,
    progress: Callable[[str], None] | None = None,
    beliefs: Mapping[str, Callable[[], Belief]] | None = None,
) -> Comparison:
    """All arms on all seeds; the arm CONTROL hears answers by shuffled rewards.

    beliefs  of arms that bring their own
    """
    curves, given_beliefs = {}, {} if beliefs is None else beliefs
    for arm, given in settings.items():
        runs = []
        for seed in seeds:
            answers = shuffled(pool, seed) if arm == CONTROL else None
            belief = given_beliefs[arm]() if arm in given_beliefs else None
            runs.append(run(pool, given, seed, rounds, held_out, budget, answers=answers, belief=belief))
        curves[arm] = {name: np.stack([r[name] for r in runs]) for name in runs[0]}
        if progress is not None:
            progress(arm)
    best = {"win rate": pool.win_rate(pool.greedy(pool.reward)), "suboptimality": 0.0}
    if held_out is not None:
        best["held out"] = held_out.win_rate(held_out.greedy(held_out.reward))
    return Comparison(curves, best)


def table(found: Comparison, measure: str, budgets: Sequence[int], against: str = "uniform") -> str:
    """Markdown: an arm a line, mean and 95 % half-width at each budget, and paired differences.

    Each arm less `against`, and the first of the selecting rules, `disagreement`, less the other two.
    """
    lines = [["labels", *(str(n) for n in budgets)], ["---"] * (len(budgets) + 1)]
    for arm in found.curves:
        row = [arm]
        for n in budgets:
            mean, error = mean_and_error(found.at(arm, measure, n)[:, None])
            row.append(f"{mean[0]:.3f} ± {error[0]:.3f}")
        lines.append(row)
    bought = {arm: curve["labels"][:, -1] for arm, curve in found.curves.items()}
    for arm, short in ((arm, n < max(budgets)) for arm, n in bought.items()):
        if short.any():
            lines.append([f"{arm}: labels bought", *[""] * (len(budgets) - 1), f"{bought[arm].mean():.0f}"])
    asked = [(arm, against) for arm in found.curves if arm != against]
    asked += [("disagreement", other) for other in ("variance", "ensemble")]
    for arm, other in asked:
        pairs = (found.difference(arm, other, measure, n) for n in budgets)
        lines.append([f"{arm} - {other}", *(f"{mean:+.3f} ± {error:.3f}" for mean, error in pairs)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(found: Comparison, measures: Mapping[str, str], title: str = "", log: bool = False) -> Any:
    """One panel a measure (measure -> label of its axis), the mean over seeds with its 95 % band, against labels."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2 * len(measures), 4.5), layout="constrained")
        panels = figure.subplots(1, len(measures), squeeze=False)[0]
        for panel, (measure, label) in zip(panels, measures.items(), strict=True):
            for i, (arm, curve) in enumerate(found.curves.items()):
                most = int(curve["labels"].max())
                x = np.unique(np.linspace(most / 32, most, 32).round().astype(int))
                mean, error = mean_and_error(np.stack([found.at(arm, measure, n) for n in x], axis=1))
                style: dict[str, Any] = {"color": COLOURS[i], "marker": MARKERS[i], "markevery": (i, 6)}
                panel.plot(x, mean, label=arm, markersize=5, **style)
                low = np.maximum(mean - error, mean / 3) if log else mean - error
                panel.fill_between(x, low, mean + error, color=COLOURS[i], alpha=0.12, linewidth=0)
            if found.limits.get(measure):
                panel.axhline(found.limits[measure], color=INK, linestyle=":", linewidth=1.2)
                at = (0.02, found.limits[measure])
                panel.annotate("best policy", at, xycoords=("axes fraction", "data"), va="bottom")
            panel.set(xlabel="labels", ylabel=label, xlim=(0, None))
            if log:
                panel.set_yscale("log")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=12)
    return figure


def save_figure(figure: Any, path: str | Path) -> None:
    """A PNG without a date; it appears by rename."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110, metadata={"Software": None})
    replace_file(path, lambda file: file.write(picture.getvalue()))


# ---- the paper's own rule: a threshold ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Threshold:
    """Runs of one eps, (seeds,) each: labels bought, regret of all rounds, and what the answer lacks at the end."""

    eps: float
    labels: Array
    regret: Array
    suboptimality: Array
    win_rate: Array


def thresholds(
    pool: Pool, settings: ActiveSettings, eps: Sequence[float], seeds: Sequence[int], rounds: int
) -> list[Threshold]:
    """Line 12 as it stands, one prompt a round, without a budget."""
    found = []
    for threshold in eps:
        given = replace(settings, settings=replace(settings.settings, eps=threshold), batch=1, buy=None)
        ends = []
        for seed in seeds:
            annotator = PoolAnnotator(pool, np.random.SeedSequence([seed, 2]))
            learner = ActiveLearner(pool, annotator, given, seed).advance(rounds)
            answer = learner.answer
            lost = pool.optimal_value - pool.value(answer)
            ends.append((learner.labels, learner.records["regret"].sum(), lost, pool.win_rate(answer)))
        found.append(Threshold(threshold, *np.array(ends, dtype=np.float64).T))
    return found


def threshold_table(found: Sequence[Threshold]) -> str:
    """Markdown: an eps a line, means over seeds with 95 % half-widths."""
    lines = [["eps", "labels", "regret", "V* - V of the answer", "win rate"], ["---"] * 5]
    for row in found:
        cells = [f"{row.eps:g}"]
        for values, digits in ((row.labels, 0), (row.regret, 1), (row.suboptimality, 3), (row.win_rate, 3)):
            mean, error = mean_and_error(values[:, None])
            cells.append(f"{mean[0]:.{digits}f} ± {error[0]:.{digits}f}")
        lines.append(cells)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# ---- the experiments of the page -----------------------------------------------------------------------------------


def on_the_pool(
    seeds: int = 40,
    rounds: int = 80,
    budget: int = 256,
    *,
    dimension: int = 16,
    batch: int = 16,
    buy: int = 4,
    progress: Callable[[str], None] | None = None,
) -> Comparison:
    """SmolLM2's own texts, 24 prompts to learn from and 8 held out, the sentiment as the annotators' reward."""
    train = load_pool(dimension=dimension, scale=SCALE, prompts=TRAINING)
    held_out = load_pool(dimension=dimension, scale=SCALE, prompts=HELD_OUT)
    given = arms(prior_settings(train), batch, buy)
    return compare(train, given, range(seeds), rounds, held_out, budget, progress)


def lattice_pool(scale: float = SCALE) -> Pool:
    """The shipped lattice of SmolLM2 with its linear sentiment; P(y > y') = sigma((r(y) - r(y')) / scale)."""
    world = Pool.of_world(load_language_world())
    assert world.theta is not None
    return replace(world, reward=world.reward / scale, theta=world.theta / scale)


def on_the_lattice(
    seeds: int = 20,
    rounds: int = 80,
    budget: int = 256,
    *,
    batch: int = 16,
    buy: int = 4,
    progress: Callable[[str], None] | None = None,
) -> Comparison:
    """The shipped lattice of SmolLM2, where the reward is linear in the features, so that all of the theory applies."""
    pool = lattice_pool()
    given = arms(prior_settings(pool), batch, buy)
    return compare(pool, given, range(seeds), rounds, budget=budget, progress=progress)


# ---- two features: the posterior itself -----------------------------------------------------------------------------


def plane_pool(scale: float = SCALE) -> Pool:
    """The lattice with its features on their first two principal axes, paid by its least-squares reward on these."""
    pool = lattice_pool(scale)
    assert pool.law is not None
    w = pool.law[pool.prompt] * pool.reference
    deviations = within(pool.phi, pool.prompt, w)
    phi = principal_axes(deviations, 2, weight=w).apply(deviations)
    return with_linear_reward(replace(pool, phi=phi, theta=None))


def on_the_plane(
    seeds: int = 20,
    rounds: int = 20,
    budget: int = 64,
    *,
    batch: int = 16,
    buy: int = 4,
    progress: Callable[[str], None] | None = None,
) -> Comparison:
    """`exact` draws from the Bayesian posterior, buys by its disagreement and answers with its mean."""
    pool = plane_pool()
    given = arms(prior_settings(pool), batch, buy)
    precision = given["disagreement"].ridge
    names = ("disagreement", "variance", "ensemble", "uniform", CONTROL)
    chosen = {"exact": given["disagreement"], **{name: given[name] for name in names}}
    beliefs = {"exact": lambda: GridPosterior(2, precision)}
    return compare(pool, chosen, range(seeds), rounds, budget=budget, progress=progress, beliefs=beliefs)


@dataclass(frozen=True, eq=False)
class Likeness:
    """How a rule's disagreements compare with the posterior's own, over pairs of the reference, (seeds,) each.

    ratio  their mean over the mean of the exact ones; ranks: the rank correlation; edge: of the grid, the worst
    """

    rule: str
    labels: int
    ratio: Array
    ranks: Array
    edge: float


def against_the_posterior(
    pool: Pool, seeds: Sequence[int], budgets: Sequence[int], *, buy: int = 4, pairs: int = 64
) -> list[Likeness]:
    """All rules learn from the answers that one run of PR-LSVI's rule bought, and measure the same fresh pairs."""
    settings = arms(prior_settings(pool), buy=buy)["disagreement"]
    inner, ridge, d = settings.settings, settings.ridge, pool.dimension
    found: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    for seed in seeds:
        annotator = PoolAnnotator(pool, np.random.SeedSequence([seed, 2]), budget=max(budgets))
        learner, exact = ActiveLearner(pool, annotator, settings, seed), GridPosterior(d, ridge)
        gauss = RewardPosterior(d, inner, ridge=ridge)
        heads = {K: Ensemble(d, inner, heads=K, ridge=ridge, seed=seed) for K in (10, 100)}
        taught: tuple[Belief, ...] = (exact, gauss, *heads.values())
        fresh = ActiveLearner(pool, None, replace(settings, batch=pairs, player="reference"), seed).propose()
        D = fresh.differences[fresh.differences.any(axis=1)]
        while learner.labels < max(budgets):
            round = learner.propose()
            wins, before = annotator.compare(round.first[round.buy], round.second[round.buy]), learner.labels
            learner.learn(round, wins)
            for belief in taught:
                belief.add(round.differences[round.buy], wins)
            for labels in (n for n in budgets if before < n <= learner.labels):  # a round may buy past one
                truth = exact.ahead().gaps(D)
                rules = {"gram": gauss.ahead().gaps(D), "laplace": gauss.laplace().deviation(D)}
                rules["laplace"] = 2 / np.sqrt(np.pi) * rules["laplace"]
                rules |= {f"{K} heads": belief.ahead().gaps(D) for K, belief in heads.items()}
                for name, gaps in rules.items():
                    ranks = float(np.corrcoef(gaps.argsort().argsort(), truth.argsort().argsort())[0, 1])
                    entry = (float(gaps.mean() / truth.mean()), ranks, exact.edge)
                    found.setdefault((name, labels), []).append(entry)
    columns = {key: np.array(entries).T for key, entries in found.items()}
    return [Likeness(*key, ratio, ranks, float(edge.max())) for key, (ratio, ranks, edge) in columns.items()]


def likeness_table(found: Sequence[Likeness]) -> str:
    """Markdown: a rule a line, and at each number of labels the ratio and the rank correlation, means over seeds."""
    budgets = sorted({row.labels for row in found})
    lines = [["labels", *(str(n) for n in budgets)], ["---"] * (len(budgets) + 1)]
    for rule in dict.fromkeys(row.rule for row in found):
        at = {row.labels: row for row in found if row.rule == rule}
        lines.append([rule, *(f"{at[n].ratio.mean():.2f}, {at[n].ranks.mean():.2f}" for n in budgets)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m preflab.llm_bridge.active.experiment", description="Win rate against labels."
    )
    parser.add_argument("where", choices=("pool", "lattice", "plane", "thresholds"))
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=80)
    parser.add_argument("--budget", type=int, default=256, help="of labels")
    parser.add_argument("--figure", metavar="FILE", help="a PNG")
    given = parser.parse_args(arguments)
    tell = lambda arm: print(f"{arm}: done", file=sys.stderr)  # noqa: E731
    if given.where == "thresholds":
        for name, pool in (("texts", load_pool(scale=SCALE, prompts=TRAINING)), ("lattice", lattice_pool())):
            rows = thresholds(
                pool,
                prior_settings(pool),
                (0.0, 0.25, 0.5, 1.0, 2.0, np.inf),
                range(given.seeds),
                given.rounds,
            )
            print(f"\n{name}, {given.rounds} rounds")
            print(threshold_table(rows), end="")
        return 0
    budgets = [n for n in (16, 32, 64, 128, 256) if n <= given.budget]
    if given.where == "pool":
        found = on_the_pool(given.seeds, given.rounds, given.budget, progress=tell)
        shown = {
            "win rate": "win rate against the reference",
            "held out": "... on prompts that were held out",
        }
        title = f"Sentiment of SmolLM2's texts: what the labels teach ({given.seeds} seeds)"
        train = load_pool(dimension=16, scale=SCALE, prompts=TRAINING)
        theta, r2 = linear_fit(train)
        print(f"R^2 of the best linear reward: {r2:.3f}")
        for name, part in (("win rate", train), ("held out", load_pool(scale=SCALE, prompts=HELD_OUT))):
            linear = part.win_rate(part.greedy(part.phi @ theta))
            print(
                f"{name}: {uninformed(part)[0]:.3f} before any answer; {linear:.3f} by the best linear reward"
            )
    else:
        play, title = {
            "lattice": (on_the_lattice, f"A lattice of SmolLM2, exact regret ({given.seeds} seeds)"),
            "plane": (
                on_the_plane,
                f"The same with two features, and the exact posterior ({given.seeds} seeds)",
            ),
        }[given.where]
        found = play(given.seeds, given.rounds, given.budget, progress=tell)
        shown = {"suboptimality": "V* - V of the answer", "regret": "regret so far, a prompt"}
    for measure in shown:
        limit = found.limits.get(measure)
        print(f"\n{measure}" + (f" (the best policy: {limit:.3f})" if limit else ""))
        print(table(found, measure, budgets), end="")
    if given.where == "plane":
        likeness = against_the_posterior(plane_pool(), range(given.seeds), budgets)
        worst = max(row.edge for row in likeness)
        print("\ndisagreement over the posterior's own, and the rank correlation with it")
        print(likeness_table(likeness), end="")
        print(f"mass on the grid's border: at most {worst:.1g}")
    if given.figure:
        save_figure(draw(found, shown, title, log=given.where != "pool"), given.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())

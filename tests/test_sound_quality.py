"""The recorded listeners: the published facts, the law of the answers, and bad files."""

import json
from csv import DictReader
from importlib.resources import files

import numpy as np
import pytest
from preflab.envs.mdp import FiniteMDP
from preflab.envs.option_table import OptionTable, parse_options, read_options
from preflab.envs.populations import LabelNoise, Mixture
from preflab.envs.recorded import RecordedAnnotator
from preflab.envs.sound_quality import (
    MODES,
    PIECES,
    borda,
    condorcet_winner,
    sound_quality,
    sound_quality_annotator,
    sound_quality_world,
)
from preflab.envs.trajectories import Trajectories
from scipy import stats

ROW = {"rater": "1", "music": "x", "option_a": "Mono", "option_b": "Stereo", "outcome": "a"}


def rows(*changes):
    return [ROW | change for change in changes]


def cell(context, option, n=1):
    return Trajectories(np.full((n, 1), context), np.full((n, 1), option))


def raw():
    with files("preflab.envs").joinpath("data", "sound_quality.csv").open(encoding="utf-8") as file:
        return list(DictReader(file))


# ---- facts -----------------------------------------------------------------------------------------------------------


def test_the_facts_of_the_data():
    table = sound_quality()
    assert len(table) == 21924
    assert len(table.raters) == 40
    assert table.levels["progmat"] == PIECES
    assert table.options == MODES
    P = table.preferences()[0]
    beats = {("Stereo", "Original"): 0.510, ("Original", "Matrix"): 0.513, ("Matrix", "Stereo"): 0.501}
    for (a, b), p in beats.items():
        assert round(P[MODES.index(a), MODES.index(b)], 3) == p
    assert condorcet_winner(P) is None
    assert sum(condorcet_winner(table.where(rater=r).preferences()[0]) is None for r in table.raters) == 20
    winners = [condorcet_winner(p) for p in table.preferences("progmat")]
    assert len(set(winners)) > 1  # the winner changes with the music


def test_counts_against_a_plain_recount_of_the_file():
    recount = np.zeros((4, 8, 8))
    for row in raw():
        winner, loser = (row["option_a"], row["option_b"])[:: 1 if row["outcome"] == "a" else -1]
        recount[PIECES.index(row["progmat"]), MODES.index(winner), MODES.index(loser)] += 1
    assert (sound_quality().wins("progmat") == recount).all()
    assert recount.sum() == 21924
    one = sound_quality().where(rater="04", time="before")
    assert len(one) == sum(row["rater"] == "04" and row["time"] == "before" for row in raw())


def test_the_world():
    world = sound_quality_world()
    assert (world.horizon, world.sizes, world.n_actions) == (1, (4, 1), 8)
    P = sound_quality().preferences("progmat")
    by_hand = [[np.mean([P[c, i, j] for j in range(8) if j != i]) for i in range(8)] for c in range(4)]
    assert world.reward[0] == pytest.approx(np.array(by_hand))
    assert borda(P).mean() == pytest.approx(0.5)  # antisymmetry
    assert world.initial.tolist() == [0.25] * 4
    asked = sound_quality_world("empirical").initial * 21924
    assert asked == pytest.approx([sum(row["progmat"] == piece for row in raw()) for piece in PIECES])
    with pytest.raises(ValueError, match="expected 'uniform' or 'empirical'"):
        sound_quality_world("other")


# ---- the annotator ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [{}, {"listener": "04"}, {"time": "after"}])
def test_the_law_is_the_recorded_frequency_in_both_orders(chosen):
    who = sound_quality_annotator(0, **chosen)
    mine = {"rater": chosen.get("listener"), "time": chosen.get("time")}
    kept = [row for row in raw() if all(v is None or row[k] == v for k, v in mine.items())]
    for piece in range(4):
        for a, b in ((0, 2), (2, 7), (4, 5)):
            some = [
                row["outcome"]
                for row in kept
                if (row["progmat"], row["option_a"], row["option_b"]) == (PIECES[piece], MODES[a], MODES[b])
            ]
            p = some.count("a") / len(some)
            assert who.answers[piece, a, b] == len(some) == who.answers[piece, b, a]
            assert who.probability(cell(piece, a), cell(piece, b))[0] == pytest.approx(p, abs=1e-15)
            assert who.probability(cell(piece, b), cell(piece, a))[0] == pytest.approx(1 - p, abs=1e-15)
            assert who.probability(cell(piece, a), cell(piece, a))[0] == 0.5


def test_draws_are_the_recorded_answers():
    who = sound_quality_annotator(3)
    contexts, i, j = (x.ravel() for x in np.meshgrid(range(4), range(8), range(8), indexing="ij"))
    n = 300
    first, second = Trajectories(contexts[:, None], i[:, None]), Trajectories(contexts[:, None], j[:, None])
    tile = np.tile(np.arange(len(i)), n)
    wins = who.compare(first[tile], second[tile]).reshape(n, -1).sum(axis=0)
    p = who.probability(first, second)
    inner = (p > 0) & (p < 1)
    assert (wins[p == 0] == 0).all()
    assert (wins[p == 1] == n).all()
    statistic = ((wins - n * p)[inner] ** 2 / (n * p * (1 - p))[inner]).sum()
    assert 1e-3 < stats.chi2.sf(statistic, inner.sum()) < 1 - 1e-3
    assert who.count == len(tile) == len(who.log)


def test_a_population_of_listeners_is_a_mixture():
    table, model = sound_quality(), sound_quality_world()
    complete = [r for r in table.raters if r != "62"]
    assert len(complete) == 39
    users = [sound_quality_annotator(0, listener=r, model=model, keep_log=False) for r in complete]
    crowd = Mixture(users, 1)
    each = [user.probability(cell(1, 2), cell(1, 7))[0] for user in users]
    assert crowd.probability(cell(1, 2), cell(1, 7))[0] == pytest.approx(np.mean(each))
    assert LabelNoise(users[0], 0, 0.5).probability(cell(1, 2), cell(1, 7))[0] == 0.5


def test_what_nobody_was_asked_is_an_error():
    who = sound_quality_annotator(0, listener="62")
    with pytest.raises(
        ValueError, match="no answer is recorded for 'Mono' against 'Stereo' in progmat 'Sting'"
    ):
        who.compare(cell(3, 0), cell(3, 2))
    with pytest.raises(
        ValueError, match="pair 0 compares options in progmat 'Beethoven' and in progmat 'Sting'"
    ):
        who.compare(cell(0, 0), cell(3, 2))
    assert who.count == 0
    with pytest.raises(ValueError, match=r"rater '620' is not one of .*; did you mean '62'"):
        sound_quality_annotator(0, listener="620")
    with pytest.raises(ValueError, match=r"column 'ratr' is not one of rater, .*; did you mean 'rater'"):
        sound_quality().where(ratr="04")
    with pytest.raises(ValueError, match="column 'music' is not one of"):
        sound_quality().wins("music")
    with pytest.raises(ValueError, match=r"the recorded answers need 1, 1 \(contexts\) and 8 \(options\)"):
        RecordedAnnotator(sound_quality_world(), 0, sound_quality())


def test_recorded_answers_continue_bit_for_bit():
    whole, part = sound_quality_annotator(8), sound_quality_annotator(8)
    a, b = cell(0, 2, 60), cell(0, 7, 60)
    want = whole.compare(a, b)
    got = [part.compare(a[:25], b[:25])]
    saved = json.loads(json.dumps(part.checkpoint()))
    part = sound_quality_annotator(0)
    part.restore(saved)
    got.append(part.compare(a[25:], b[25:]))
    assert (np.concatenate(got) == want).all()
    assert part.log == whole.log


# ---- ties, missing answers, files ------------------------------------------------------------------------------------


def tied_table() -> OptionTable:
    words = ["a", "a", "b", "tie", "tie", "NA", ""]
    return parse_options(rows(*({"outcome": word} for word in words)))


def test_ties_are_handled_as_told():
    table = tied_table()
    assert table.wins(ties="half")[0].tolist() == [[0, 3], [2, 0]]
    assert table.wins(ties="drop")[0].tolist() == [[0, 2], [1, 0]]
    assert table.preferences(ties="half")[0].tolist() == [[0.5, 0.6], [0.4, 0.5]]
    with pytest.raises(
        ValueError, match=r"2 of 7 comparisons are ties, the first at index 3 \('Mono' and 'Stereo'\)"
    ):
        table.wins()
    with pytest.raises(ValueError, match="ties is 'coin'"):
        table.wins(ties="coin")
    model = FiniteMDP.dense(np.ones((1, 1, 2, 1)), [np.zeros((1, 2))])
    who = RecordedAnnotator(model, 0, table, ties="half")
    assert who.probability(cell(0, 0), cell(0, 1))[0] == 0.6
    assert np.isnan(parse_options(rows({"outcome": "NA"})).preferences()[0, 0, 1])
    nobody = RecordedAnnotator(model, 0, parse_options(rows({"outcome": ""})))
    with pytest.raises(ValueError, match="in the only context"):
        nobody.compare(cell(0, 0), cell(0, 1))


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_files_round_trip(tmp_path, suffix):
    table, path = tied_table(), tmp_path / f"answers.{suffix}"
    table.save(path)
    again = read_options(path)
    assert again.rows() == table.rows()
    assert again.levels == table.levels == {"rater": ("1",), "music": ("x",)}
    assert (again.outcomes == table.outcomes).all()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_shipped_file_is_what_is_read(tmp_path):
    sound_quality().save(tmp_path / "copy.csv")
    shipped = files("preflab.envs").joinpath("data", "sound_quality.csv").read_text(encoding="utf-8")
    assert (tmp_path / "copy.csv").read_text(encoding="utf-8") == shipped


def test_bad_rows_are_named():
    good = [{}] * 16
    with pytest.raises(ValueError, match=r"^comparison 17: outcome must be a, b or tie, got 'x'$"):
        parse_options(rows(*good, {"outcome": "x"}))
    with pytest.raises(ValueError, match="comparison 1: outcome must be a, b or tie, got '-1'"):
        parse_options(rows({"outcome": "-1"}))
    with pytest.raises(
        ValueError, match=r"^comparison 3: option 'Sterio' is not one of .*; did you mean 'Stereo'\?$"
    ):
        parse_options(rows({}, {}, {"option_b": "Sterio"}), MODES)
    with pytest.raises(ValueError, match="comparison 2: option 'Mono' is compared with itself"):
        parse_options(rows({}, {"option_b": "Mono"}))
    with pytest.raises(
        ValueError, match="there is no column 'option_b'; the columns are rater, option_a, outcome"
    ):
        parse_options([{"rater": "1", "option_a": "x", "outcome": "a"}])
    with pytest.raises(ValueError, match="comparison 2: expected the columns rater, music, option_a"):
        parse_options([ROW, {k: v for k, v in ROW.items() if k != "option_a"}])
    assert len(parse_options([])) == 0


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "x.csv"
    header = "rater,option_a,option_b,outcome\n"
    for line in ("1,Mono,Stereo", "1,Mono,Stereo,a,extra"):
        path.write_text(header + "1,Mono,Stereo,a\n" + line + "\n")
        with pytest.raises(ValueError, match="comparison 2: expected the columns"):
            read_options(path)
    lines = tmp_path / "x.jsonl"
    good = json.dumps(ROW)
    for line, what in (("{", "not a JSON object"), ("[1]", r"not a JSON object: \[1\]")):
        lines.write_text(good + "\n" + line + "\n")
        with pytest.raises(ValueError, match=f"comparison 2: {what}"):
            read_options(lines)
    lines.write_text(json.dumps(ROW | {"outcome": None}) + "\n")
    assert read_options(lines).outcomes.tolist() == [-1]
    for act in (lambda: read_options(tmp_path / "x.txt"), lambda: tied_table().save(tmp_path / "x.txt")):
        (tmp_path / "x.txt").write_text("")
        with pytest.raises(ValueError, match=r"ends in '.txt'; expected .csv or .jsonl"):
            act()
